"""The recommendation as text: which type to take, the commands that make it, why not each of the others."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from dither.capacity.advice import FITS, GPU, NO, PARTLY, RAM, READING, usable
from dither.capacity.machine import Machine
from dither.capacity.result import Candidate
from dither.models.arch import families
from dither.types import Model
from dither.units import format_bytes

# The types that a recommendation chooses among, the least loss first.  Above Q8_0 there is nothing to gain.
LADDER = (
    "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "IQ4_XS", "Q4_K_S", "Q3_K_L", "Q3_K_M", "IQ3_M", "IQ3_XXS",
    "Q3_K_S", "IQ2_M", "Q2_K", "IQ2_XXS", "IQ1_M", "IQ1_S",
)  # fmt: skip
LEAST_GOOD = "Q4_K_S"  # the last type of the ladder whose loss people usually accept
GOOD_BITS = 4.25  # bits per weight from which a type counts as good where its loss is not known
_PLAIN_BITS = 15  # bits per weight from which a file counts as not quantized
_SHOWN = 8  # types named in one line
_NOT_AT_ALL, _FROM_DISK = "does not fit", "would run from disk"
_PLACES = {GPU: "wholly on the GPU", RAM: "in RAM", PARTLY: "partly on the GPU"}


def recommended(candidates: list[Candidate]) -> Candidate | None:
    """The candidate to take: in the fastest memory that holds a good one, the least loss at reading speed.

    A quantized file that fits is taken as it is: quantizing it again would lose more.  Where none reaches reading
    speed, the smallest that is still good; where none is good, the one that loses least.  Types that need an
    importance matrix are taken when nothing else is good.
    """
    fitting = [candidate for candidate in candidates if candidate.fits]
    own = next((candidate for candidate in fitting if candidate.file), None)
    if own and own.bits_per_weight < _PLAIN_BITS:
        return own
    listed = [candidate for candidate in fitting if candidate.type in LADDER]
    for importance, place in product((False, True), FITS):
        held = [c for c in listed if c.verdict.word == place and (importance or not c.needs_importance)]
        good = [candidate for candidate in held if _is_good(candidate)]
        if good:
            quick = [c for c in good if c.verdict.speed is None or c.verdict.speed.likely >= READING]
            return min(quick, key=_rank) if quick else min(good, key=lambda candidate: candidate.memory.weights)
    return min(listed, key=_rank, default=next(iter(fitting), None))


def _rank(candidate: Candidate) -> int:
    return LADDER.index(candidate.type)


def _is_good(candidate: Candidate) -> bool:
    """Whether it loses no more than 4 bits usually cost, as far as is known."""
    if candidate.quality is None:
        return candidate.bits_per_weight >= GOOD_BITS
    return _rank(candidate) <= LADDER.index(LEAST_GOOD)


def sentence(best: Candidate | None, candidates: list[Candidate], machine: Machine, layers: int, context: int) -> str:
    """The recommendation in one or two sentences."""
    if best is None:
        least = min(candidates, key=lambda candidate: candidate.memory.total)
        disk = " It would run from disk, slowly." if least.verdict.word != NO else ""
        return (
            f"Nothing fits: even {least.type} needs {format_bytes(least.memory.total)}, and of "
            f"{format_bytes(machine.memory.bytes)} it may use {format_bytes(usable(machine))}.{disk} "
            f"Try a shorter context than {context}, --kv q8_0, or a smaller model."
        )
    places = {
        GPU: "entirely on the GPU",
        RAM: "in RAM",
        PARTLY: f"with {best.verdict.gpu_layers} of {layers} layers on the GPU",
    }
    speed = best.verdict.speed
    how_fast = f", about {_rounded(speed.likely)} tokens/s" if speed else ""
    what = "it as it is" if best.file else best.type
    return (
        f"Take {what}: {format_bytes(best.memory.total)} with {context} tokens of context, "
        f"{places[best.verdict.word]}{how_fast}."
    )


def _rounded(value: float) -> str:
    """Two digits that count: no estimate here has more.

    >>> _rounded(2374.1), _rounded(79.2), _rounded(4.04)
    ('2400', '79', '4.0')
    """
    if value >= 10:
        digits = len(f"{value:.0f}") - 2
        return str(round(value / 10**digits) * 10**digits)
    return f"{value:.1f}"


def commands(best: Candidate | None, model: Model, context: int) -> Iterator[str]:
    """Commands that make or fetch the recommended file, or run it if it exists."""
    if best is None:
        return
    name = shlex.quote(model.origin if not model.origin.startswith("-") else f"./{model.origin}")
    if best.file and Path(best.file).exists():
        yield f"dither chat {name} -c {context}"
    elif best.file:
        repo, _, file = model.origin.removeprefix("hf://").partition(":")
        yield f"hf download {shlex.quote(repo)} {shlex.quote(file) if file else '--include *.gguf'}"
    elif model.kind != "gguf" and all(family.arch != model.arch for family in families()):
        yield "python convert_hf_to_gguf.py …  (llama.cpp's own: Dither does not convert this family)"
        yield f"dither quantize model.gguf --to {best.type}"
    elif best.needs_importance:
        yield f"dither calibrate {name} -o evidence"
        yield f"dither quantize {name} --to {best.type} --evidence evidence"
    else:
        yield f"dither quantize {name} --to {best.type}"


def ruled_out(best: Candidate | None, candidates: list[Candidate], machine: Machine) -> Iterator[tuple[str, str]]:
    """Which types are not recommended and why, those with one reason together, in the order of the table."""
    groups: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        if candidate is not best:
            groups.setdefault(_reason(candidate, best), []).append(candidate)
    for reason, group in groups.items():
        names = [candidate.type for candidate in group]
        shown = names if len(names) <= _SHOWN else [*names[: _SHOWN - 1], f"{len(names) - _SHOWN + 1} more"]
        if reason in (_NOT_AT_ALL, _FROM_DISK):
            least = min(candidate.memory.total for candidate in group)
            reason += f": {format_bytes(least)} or more, and {format_bytes(usable(machine))} may be used"
        yield ", ".join(shown), reason


def _reason(candidate: Candidate, best: Candidate | None) -> str:
    word, speed = candidate.verdict.word, candidate.verdict.speed
    if not candidate.fits:
        return _NOT_AT_ALL if word == NO else _FROM_DISK
    if best is None or candidate.memory.weights <= best.memory.weights:
        return "loses more"
    if FITS.index(word) > FITS.index(best.verdict.word):
        return f"would run {word}, not {_PLACES[best.verdict.word]}"
    if {candidate.type, best.type} <= set(LADDER) and _rank(candidate) > _rank(best):
        return "larger, and loses as much or more"
    if speed is None or speed.likely >= READING:
        return "larger, with nothing to gain"
    none_does = best.verdict.speed and best.verdict.speed.likely < READING
    return "slower still" if none_does else "slower than people read"


def memory_notes(machine: Machine) -> Iterator[str]:
    free, total = machine.free, machine.memory.bytes
    if free is not None and free < 0.8 * total:
        yield f"{format_bytes(free)} of {format_bytes(total)} are free right now: that is what was judged by"
