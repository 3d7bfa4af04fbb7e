"""Two answers to one question: where they diverge, where they agree again, how much they share.

Greedy answers of a quantized model and its original agree word for word up to the first position where another
token is the likeliest; from there on they differ.  Often they agree again later: the words are aligned as a diff
aligns lines (Ratcliff and Obershelp's longest matching blocks, in Python's difflib).
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
    """A run of words that is the same in both answers, or what each has in its place."""

    same: bool
    ours: tuple[str, ...]
    theirs: tuple[str, ...]


@dataclass(frozen=True)
class Divergence:
    """`character` is where the texts diverge, None if they are equal; `words` is how many were the same until then.

    `shared` is the share of words that both have in this order (2 · common / all), 1 if both are empty.
    """

    character: int | None
    words: int
    stretches: tuple[Stretch, ...]
    shared: float
    cut: bool = False  # only the first words were aligned

    @property
    def again(self) -> Stretch | None:
        """The first words on which they agree again after they diverged."""
        first = next((place for place, stretch in enumerate(self.stretches) if not stretch.same), 0)
        return next((stretch for stretch in self.stretches[first + 1 :] if stretch.same), None)


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
