"""Two answers to one question: where they part, where they come together again, how much they share.

Greedy answers of a quantized model and its original agree word for word up to the first token whose
likeliest neighbor changed places; from there on each goes its own way.  Often they come together again:
the words are aligned as lines of a text are (Ratcliff and Obershelp's longest matching blocks, in
Python's difflib), after the first difference too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

MOST_WORDS = 2000  # of each that are aligned: the time grows with the square
_WORD = re.compile(r"\s*\S+|\s+$")


@dataclass(frozen=True)
class Stretch:
    """Words of both answers from one place on: the same in both, or what each has instead."""

    same: bool
    ours: tuple[str, ...]
    theirs: tuple[str, ...]


@dataclass(frozen=True)
class Divergence:
    """`character` is where the texts part, None where they are equal; `words` were the same until then.

    `shared` is the share of words that both have in this order (2 · common / all), 1 where both are empty.
    """

    character: int | None
    words: int
    stretches: tuple[Stretch, ...]
    shared: float
    cut: bool = False  # only the first words were aligned

    @property
    def again(self) -> Stretch | None:
        """The first words that both have once more after they parted."""
        parted = False
        for stretch in self.stretches:
            if parted and stretch.same:
                return stretch
            parted = parted or not stretch.same
        return None


def diverge(ours: str, theirs: str) -> Divergence:
    """
    >>> found = diverge("a red door, shut", "a blue door, shut")
    >>> found.character, found.words, [s.ours for s in found.stretches if not s.same]
    (2, 1, [(' red',)])
    """
    ours_W, theirs_W = words(ours), words(theirs)
    cut = max(len(ours_W), len(theirs_W)) > MOST_WORDS
    ours_W, theirs_W = ours_W[:MOST_WORDS], theirs_W[:MOST_WORDS]
    matcher = SequenceMatcher(None, ours_W, theirs_W, autojunk=False)
    stretches = tuple(
        Stretch(kind == "equal", tuple(ours_W[a:b]), tuple(theirs_W[c:d])) for kind, a, b, c, d in matcher.get_opcodes()
    )
    parted = first_difference(ours_W, theirs_W)
    same = len(ours_W) if parted is None else parted
    return Divergence(first_difference(ours, theirs), same, stretches, matcher.ratio(), cut)


def words(text: str) -> list[str]:
    """Words with the white space before them: joined, they are the text.

    >>> words("so it is ")
    ['so', ' it', ' is', ' ']
    """
    return _WORD.findall(text)


def first_difference(ours: Sequence[str], theirs: Sequence[str]) -> int | None:
    """The first place in which two texts, or two lists of pieces, differ; None where they are the same.

    >>> first_difference(["A", " b"], ["A", " c"]), first_difference("A", "A.")
    (1, 1)
    """
    if ours == theirs:
        return None
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
