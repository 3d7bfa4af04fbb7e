"""Two answers side by side: in two columns where the terminal has 80 or more, else one below the other.

Where they first part stands ▶ in both, and from there on words that only one of them has stand between
⟨ and ⟩: shapes, and colors for those who see them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

from rich.console import Group
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from dither.cli.harmless import harmless
from dither.cli.screen import out
from dither.units import counted

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dither.running.divergence import Divergence

WIDE = 80  # columns from which two answers have room beside each other
MARK, OPEN, CLOSE = "▶", "⟨", "⟩"
_FIRST, _APART = "bold yellow", "cyan"
_SHOWN = 3  # differences that the summary spells out
_LONG = 8  # words of each


def answers(titles: Sequence[str], texts: Sequence[str | Text], width: int) -> RenderableType:
    """Both, under their titles."""
    shown = [text if isinstance(text, Text) else Text(harmless(text)) for text in texts]
    names = [Text(harmless(title), style="bold", overflow="ellipsis", no_wrap=True) for title in titles]
    if width < WIDE:
        parts = [part for pair in zip(names, shown, strict=True) for part in pair]
        return Group(*parts[:2], Rule(style="dim"), *parts[2:])
    table = Table(box=None, pad_edge=False, padding=(0, 1), width=width)
    for name in names:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*shown)
    return table


def marked(found: Divergence) -> tuple[Text, Text]:
    """Both texts with the marks."""
    ours, theirs = Text(), Text()
    parted = False
    for stretch in found.stretches:
        for text, words in ((ours, stretch.ours), (theirs, stretch.theirs)):
            said = harmless("".join(words))
            if stretch.same:
                text.append(said)
                continue
            if not parted:
                text.append(f" {MARK}", style=_FIRST)
            bare = said.lstrip()
            text.append(said.removesuffix(bare))
            text.append(f"{OPEN}{bare}{CLOSE}", style=_APART)
        parted = parted or not stretch.same
    return ours, theirs


def summary(found: Divergence) -> list[str]:
    """In plain words, a line each: where they part, what each says, where they meet again."""
    if found.character is None:
        return [f"Both answers are the same, {counted(found.words, 'word')}."]
    lines = [f"The same for {counted(found.words, 'word')}; {MARK} marks where they part."]
    apart = [(this, after) for this, after in pairwise((*found.stretches, None)) if this and not this.same]
    for stretch, after in apart[:_SHOWN]:
        again = f", then again the same for {counted(len(after.ours), 'word')}" if after is not None else ""
        lines.append(f"{_said(stretch.ours)} here, {_said(stretch.theirs)} there{again}")
    lines += ["…"] if len(apart) > _SHOWN else []
    lines.append(f"{100 * found.shared:.0f} % of the words are in both, in the same order.")
    if found.cut:
        lines.append("Only the beginnings were compared: the answers are long.")
    return lines


def _said(words: Sequence[str]) -> str:
    more = " …" if len(words) > _LONG else ""
    return f"“{harmless(' '.join(''.join(words[:_LONG]).split()))}{more}”" if words else "nothing"


@contextmanager
def growing(titles: Sequence[str]) -> Iterator[Callable[[Sequence[str | Text]], None]]:
    """A place on the terminal that is written anew whenever the answers have grown."""
    from rich.live import Live

    with Live(console=out, refresh_per_second=8, vertical_overflow="visible") as live:
        yield lambda texts: live.update(answers(titles, texts, out.width))
