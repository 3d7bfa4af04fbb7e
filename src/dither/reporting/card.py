"""A model card for a set of quantized files: README.md as the Hugging Face hub reads it.

Front matter for the hub, the picture of size against loss, which file to take, a table of all of them with
the loss and its interval, and for each the recipe and the command that makes it again.  Every number is from
the results document; a file that was not measured says so.

All names are a stranger's: the front matter is written as JSON strings, which YAML reads as they are, and in
Markdown whatever could be markup is escaped.

Source of the keys: the hub's model card metadata (huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from dither.reporting.choice import short
from dither.reporting.document import Document, RunRecord
from dither.reporting.frontier import Point, points
from dither.units import counted, format_bytes, format_count

PICTURE = "frontier.png"
MARK = 'quantized_by: "dither"'  # in every card of ours
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|~#])")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def card(document: Document, picture: str | None = PICTURE) -> str:
    """README.md.  `picture` is the frontier's file beside it, None where there is none."""
    original = document.reference
    name = original.name if original else next((run.reference for run in document.runs if run.reference), "")
    title = name or document.title
    parts = [_front(document, name), f"# {_escaped(title)}, quantized", _intro(document, title)]
    if picture and points(document.runs):
        parts.append(f"![Size against loss of each file]({picture})")
    parts += [_advice(document.runs), _table(document.runs), _reading(document.runs), _making(document.runs)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front(document: Document, name: str) -> str:
    """A value is written as JSON, which is YAML as well, so that no name can add a key."""
    lines = ["---"]
    if name:
        lines.append(f"base_model: {_quoted(name)}")
        lines.append("base_model_relation: quantized")
    if document.reference and document.reference.license:
        lines.append(f"license: {_quoted(document.reference.license)}")
    lines.append(MARK)
    if any(run.container == "gguf" for run in document.runs):
        lines.append('library_name: "gguf"')
    lines += ['pipeline_tag: "text-generation"', "tags:"]
    tags = ["quantized", "dither", *dict.fromkeys(run.container for run in document.runs)]
    lines += [f"- {_quoted(tag)}" for tag in tags]
    return "\n".join([*lines, "---"])


def _quoted(text: str) -> str:
    return json.dumps(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", text))


def _escaped(text: str) -> str:
    """Text in Markdown, that stays text."""
    return _SPECIAL.sub(r"\\\1", _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text))


def _intro(document: Document, title: str) -> str:
    text = f"{counted(len(document.runs), 'file')} of {_escaped(title)}"
    if document.reference is not None:
        original = document.reference
        text += (
            f", whose original has {format_count(original.parameters)} parameters in "
            f"{format_bytes(original.bytes)} ({original.bits_per_weight:.2f} bits per weight)"
        )
    return f"{text}. Made by {_escaped(document.tool)}."


def _advice(runs: Sequence[RunRecord]) -> str:
    """Each file that nothing beats, and from which size on to take it; then what beats the others."""
    given = points(runs)
    if not given:
        return (
            "## Which should I take\n\nNone was measured, so nobody can tell. `dither measure` measures "
            "them; write this card again then."
        )
    lines = [
        f"- **{_escaped(point['label'])}** where you have {format_bytes(point['bytes'])} or more for the "
        f"weights: loses {short(point['value'])} nats per token{_interval(point)}."
        for point in reversed(given)
        if point["pareto"]
    ]
    beaten = [
        f"{_escaped(point['label'])} ({_escaped(_beating(point, given)['label'])} is no larger and loses no more)"
        for point in given
        if not point["pareto"]
    ]
    if beaten:
        lines.append(f"\nNot worth taking for size and loss alone: {'; '.join(beaten)}.")
    text = (
        "Take the first that fits your memory with room for the context (`dither fit` on a file tells); a "
        "smaller one is faster."
    )
    return "## Which should I take\n\n" + "\n".join([text, "", *lines])


def _beating(point: Point, given: Sequence[Point]) -> Point:
    """The best of those that are no larger."""
    return min((p for p in given if p["pareto"] and p["bytes"] <= point["bytes"]), key=lambda p: p["value"])


def _interval(point: Point) -> str:
    if point["low"] is None or point["high"] is None:
        return ""
    return f" (95 %: {short(point['low'])} to {short(point['high'])})"


def _table(runs: Sequence[RunRecord]) -> str:
    head = ["file", "type", "bytes", "size", "bits per weight", "KL divergence", "95 % interval", "same top"]
    rows = [_row(run) for run in runs]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    return "## Files\n\n" + "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _row(run: RunRecord) -> list[str]:
    size = run.file_bytes or run.bytes
    kl, top = run.metrics.get("kl_mean"), run.metrics.get("same_top")
    measured = kl is not None and not run.stale
    low_high = ""
    if kl is not None and kl.low is not None and kl.high is not None and measured:
        low_high = f"{short(kl.low)} … {short(kl.high)}"
    return [
        _escaped(run.file),
        _escaped(run.type),
        str(size),
        format_bytes(size),
        f"{run.bpw:.2f}",
        short(kl.value) if kl is not None and measured else "not measured",
        low_high,
        f"{100 * top.value:.1f} %" if top is not None and measured else "",
    ]


def _reading(runs: Sequence[RunRecord]) -> str:
    """What the numbers mean, and on what they were measured."""
    texts = dict.fromkeys(
        f"{run.measured_on.tokens} tokens of {_escaped(run.measured_on.data)}, in sequences of "
        f"{run.measured_on.context}"
        for run in runs
        if run.measured_on and not run.stale
    )
    if not texts:
        return ""
    lines = [
        "KL divergence: the mean over tokens, from the original, in nats; 0 is no loss. Same top: how "
        "often both find the same token likeliest. Measured on " + "; ".join(texts) + "."
    ]
    if len(texts) > 1:
        lines.append("Numbers of different texts are not to be compared.")
    return " ".join(lines)


def _making(runs: Sequence[RunRecord]) -> str:
    """Recipe and commands of each file."""
    parts = []
    for run in runs:
        commands = [command for command in (run.command, run.measure_command) if command]
        recipe = f"Recipe: {_escaped(run.recipe)}." if run.recipe else "How it was made is not recorded."
        parts.append(f"### {_escaped(run.label or run.type)}\n\n{recipe}")
        if commands:
            parts.append(_fenced(commands))
    return "## How they were made\n\n" + "\n\n".join(parts) if parts else ""


def _fenced(lines: Sequence[str]) -> str:
    """A block of code that its text cannot end: its fence is longer than any run of backticks inside."""
    text = "\n".join(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", line) for line in lines)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}sh\n{text}\n{fence}"
