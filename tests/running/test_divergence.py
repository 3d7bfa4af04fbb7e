"""Where two answers part: against a plain longest common subsequence, and as a terminal shows it."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st
from rich.console import Console

from dither.cli.conversation import beside
from dither.running.divergence import diverge, words

OURS = "The door was red, and the sea was quiet that night."
THEIRS = "The door was blue and old, and the sea was quiet again."
TEXTS = st.lists(st.sampled_from(["a", " b", " c", "\n", "  d"]), max_size=12).map("".join)


def common(ours: list[str], theirs: list[str]) -> int:
    """The longest common subsequence, by the textbook's recursion."""
    row = [0] * (len(theirs) + 1)
    for a in ours:
        before = row[:]
        for j, b in enumerate(theirs):
            row[j + 1] = before[j] + 1 if a == b else max(row[j], before[j + 1])
    return row[-1]


@given(TEXTS, TEXTS)
def test_stretches_are_both_texts_and_share_no_more_than_they_can(ours: str, theirs: str) -> None:
    found = diverge(ours, theirs)
    assert "".join(word for stretch in found.stretches for word in stretch.ours) == ours
    assert "".join(word for stretch in found.stretches for word in stretch.theirs) == theirs
    assert all((stretch.ours == stretch.theirs) == stretch.same for stretch in found.stretches)
    total = len(words(ours)) + len(words(theirs))
    assert found.shared <= (2 * common(words(ours), words(theirs)) / total if total else 1) + 1e-9
    assert (found.character is None) == (ours == theirs)
    if found.character is not None:
        at = found.character
        assert ours[:at] == theirs[:at] and ours[at : at + 1] != theirs[at : at + 1]


def test_they_part_and_come_together_again() -> None:
    found = diverge(OURS, THEIRS)
    assert (found.character, found.words) == (13, 3)
    assert found.again is not None and "".join(found.again.ours).strip() == "and the sea was quiet"
    assert beside.summary(found) == [
        "The same for 3 words; ▶ marks where they part.",
        "“red,” here, “blue and old,” there, then again the same for 5 words",
        "“that night.” here, “again.” there",
        f"{100 * found.shared:.0f} % of the words are in both, in the same order.",
    ]


def test_equal_answers_are_told_so() -> None:
    assert beside.summary(diverge(OURS, OURS)) == ["Both answers are the same, 11 words."]
    assert diverge("", "").character is None and diverge("a", "").character == 0


def screen(width: int, ours: str = OURS, theirs: str = THEIRS) -> list[str]:
    console = Console(width=width, record=True, file=None, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(beside.answers(["a.gguf", "b.gguf"], beside.marked(diverge(ours, theirs)), width))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_at_80_columns_they_stand_side_by_side_and_marked_without_color() -> None:
    lines = screen(80)
    assert "a.gguf" in lines[0] and "b.gguf" in lines[0]
    assert lines[1].count("The door was ▶") == 2 and max(map(len, lines)) <= 80
    assert "⟨red,⟩" in lines[1] and "⟨blue and old,⟩" in " ".join(lines)
    assert "".join(lines).count("▶") == 2  # the first difference alone


def test_below_80_columns_one_stands_under_the_other() -> None:
    lines = screen(60)
    assert lines[0] == "a.gguf" and "b.gguf" in lines[1:]
    assert not any("a.gguf" in line and "b.gguf" in line for line in lines)


@pytest.mark.parametrize("width", [60, 100])
def test_what_models_write_is_no_markup_and_no_command(width: int) -> None:
    text = "\n".join(screen(width, "[bold]x[/] \x1b[2Jy", "[red]x[/] \x1b]0;t\x07y"))
    assert "[bold]x[/]" in text and "\x1b" not in text and "␛[2Jy" in text and "\x07" not in text
