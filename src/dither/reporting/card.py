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
    containers = dict.fromkeys(run.container for run in document.runs)
    lines = ["---"]
    if name:
        lines += [f"base_model: {_quoted(name)}", "base_model_relation: quantized"]
    if document.reference and document.reference.license:
        lines.append(f"license: {_quoted(document.reference.license)}")
    lines.append(MARK)
    if "gguf" in containers:
        lines.append('library_name: "gguf"')
    lines += ['pipeline_tag: "text-generation"', "tags:"]
    lines += [f"- {_quoted(tag)}" for tag in ("quantized", "dither", *containers)]
    return "\n".join([*lines, "---"])


def _quoted(text: str) -> str:
    return json.dumps(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", text))


def _escaped(text: str) -> str:
    """Text in Markdown, that stays text."""
    return _SPECIAL.sub(r"\\\1", _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text))


def _intro(document: Document, title: str) -> str:
    text = f"{counted(len(document.runs), 'file')} of {_escaped(title)}"
    if original := document.reference:
        text += f", whose original has {format_count(original.parameters)} parameters in {format_bytes(original.bytes)}"
        text += f" ({original.bits_per_weight:.2f} bits per weight)"
    return f"{text}. Made by {_escaped(document.tool)}."


def _advice(runs: Sequence[RunRecord]) -> str:
    """Each file that nothing beats, and from which size on to take it; then what beats the others."""
    given = points(runs)
    if not given:
        return (
            "## Which should I take\n\nNone was measured, so nobody can tell. `dither measure` measures "
            "them; write this card again then."
        )
    best = [point for point in given if point["pareto"]]
    lines = [
        f"- **{_escaped(point['label'])}** where you have {format_bytes(point['bytes'])} or more for the "
        f"weights: loses {short(point['value'])} nats per token{_interval(point)}."
        for point in reversed(best)
    ]
    beaten = []
    for point in (point for point in given if not point["pareto"]):
        beating = min((p for p in best if p["bytes"] <= point["bytes"]), key=lambda p: p["value"])
        beaten.append(f"{_escaped(point['label'])} ({_escaped(beating['label'])} is no larger and loses no more)")
    if beaten:
        lines.append(f"\nNot worth taking for size and loss alone: {'; '.join(beaten)}.")
    text = (
        "Take the first that fits your memory with room for the context (`dither fit` on a file tells); a "
        "smaller one is faster."
    )
    return "## Which should I take\n\n" + "\n".join([text, "", *lines])


def _interval(point: Point) -> str:
    # A point has both ends of its interval or none.
    return "" if point["low"] is None else f" (95 %: {short(point['low'])} to {short(point['high'])})"


def _table(runs: Sequence[RunRecord]) -> str:
    head = ["file", "type", "bytes", "size", "bits per weight", "KL divergence", "95 % interval", "same top"]
    first, *rows = ("| " + " | ".join(row) + " |" for row in [head, *map(_row, runs)])
    return "\n".join(["## Files\n", first, "|---|---|" + "---:|" * (len(head) - 2), *rows])


def _row(run: RunRecord) -> list[str]:
    size = run.bytes
    kl, top = (None if run.stale else run.metrics.get(key) for key in ("kl_mean", "same_top"))
    return [
        _escaped(run.file),
        _escaped(run.type),
        str(size),
        format_bytes(size),
        f"{run.bpw:.2f}",
        short(kl.value) if kl else "not measured",
        f"{short(kl.low)} … {short(kl.high)}" if kl and kl.low is not None and kl.high is not None else "",
        f"{100 * top.value:.1f} %" if kl and top else "",
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
    apart = " Numbers of different texts are not to be compared." if len(texts) > 1 else ""
    return (
        "KL divergence: the mean over tokens, from the original, in nats; 0 is no loss. Same top: how "
        f"often both find the same token likeliest. Measured on {'; '.join(texts)}.{apart}"
    )


def _making(runs: Sequence[RunRecord]) -> str:
    """Recipe and commands of each file."""
    parts = []
    for run in runs:
        recipe = f"Recipe: {_escaped(run.recipe)}." if run.recipe else "How it was made is not recorded."
        parts.append(f"### {_escaped(run.label or run.type)}\n\n{recipe}")
        if commands := [command for command in (run.command, run.measure_command) if command]:
            parts.append(_fenced(commands))
    return "## How they were made\n\n" + "\n\n".join(parts) if parts else ""


def _fenced(lines: Sequence[str]) -> str:
    """A block of code that its text cannot end: its fence is longer than any run of backticks inside."""
    text = "\n".join(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", line) for line in lines)
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`+", text))])
    return f"{fence}sh\n{text}\n{fence}"
