"""How a file was made, in words and as the command that makes it again.

Everything comes from the recipe that the file itself carries (`containers.provenance.recipe_json`).  It holds
names and settings, nothing of the machine that made it, so a command names models, texts and folders as
people call them.  What a recipe leaves open makes no command: none is better than one of another file.
A recipe is a stranger's text: what has not the expected kind counts as absent.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from itertools import chain
from typing import Any

from dither.containers.folders import find_scheme
from dither.measuring.build import SEED
from dither.measuring.schema import Measurement
from dither.system.json_text import object_in
from dither.system.text import shown

_EVIDENCE = "evidence"  # the folder that commands name
_MOST = 2**20  # characters of a recipe that are looked at
_MOST_OVERRIDES = 32  # in a command that people are to copy


def read_recipe(text: object) -> dict[str, Any]:
    """The recipe of a file's metadata; empty where there is none or it is no JSON object."""
    return {} if isinstance(text, str) and len(text) > _MOST else object_in(text)


def in_words(recipe: Mapping[str, Any]) -> str:
    """`gptq, calibrated, awq`.

    >>> in_words({"solver": "gptq", "evidence": {"data": {}}, "transforms": {"awq": {}}})
    'gptq, calibrated, awq'
    """
    evidence = recipe.get("evidence")
    words = [
        (_text(recipe.get("solver")), True),
        ("calibrated with gradients", isinstance(evidence, dict) and evidence.get("gradients")),
        ("calibrated", isinstance(evidence, dict) and not evidence.get("gradients")),
        ("importance matrix", isinstance(recipe.get("imatrix"), dict)),
        ("sequential", recipe.get("statistics") == "sequential"),
        *((name, True) for name in _names(recipe.get("transforms"))),
        ("planned mix", recipe.get("plan")),
        ("types by name", recipe.get("tensors")),
        ("one type", recipe.get("pure")),
        ("act-order", recipe.get("act_order") is True),
    ]
    return ", ".join(word for word, so in words if word and so)


def source_of(recipe: Mapping[str, Any]) -> str:
    return _text(_object(recipe.get("source")).get("name"))


def evidence_sha256(recipe: Mapping[str, Any]) -> str:
    return _text(_object(recipe.get("evidence")).get("sha256"))


def command(recipe: Mapping[str, Any], file: str, source: str = "") -> str | None:
    """The command that makes the file again from `source` (what the recipe calls it unless given).

    None where the recipe does not tell: another tool's file, a plan, whose types stand in a file of its own,
    numbers of a dtype, which another command makes.
    """
    source, to, more = source or source_of(recipe), _text(recipe.get("to")), _options(recipe)
    if not source or not to or more is None or recipe.get("plan") or recipe.get("dtype"):
        return None
    words = ["dither", "quantize", _name(source), "--to", to]
    before = ""
    if isinstance(recipe.get("evidence"), dict):
        made = _calibrate(recipe["evidence"], source)
        if made is None:
            return None
        before, words = f"{made} && ", [*words, "--evidence", _EVIDENCE]
    elif isinstance(recipe.get("imatrix"), dict):
        words += ["--imatrix", _name(_text(recipe["imatrix"].get("name")) or "imatrix.gguf")]
    return before + shlex.join([*words, *more, "-o", _name(file)])


def _options(recipe: Mapping[str, Any]) -> list[str] | None:
    solver = _text(recipe.get("solver"))
    words = ["--solver", solver] if solver else []
    transforms = _names(recipe.get("transforms"))
    if not transforms and _has_default(_text(recipe.get("to"))) and recipe.get("evidence", recipe.get("imatrix")):
        transforms = ["none"]
    for transform in transforms:
        words += ["--transform", transform]
    if recipe.get("statistics") == "sequential":
        words += ["--statistics", "sequential"]
    overrides = recipe.get("tensors", [])
    if not isinstance(overrides, list) or len(overrides) > _MOST_OVERRIDES:
        return None
    for pair in overrides:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            return None
        words += ["--tensor", shown(f"{pair[0]}={pair[1]}", 500)]
    said = {"--output-type": _text(recipe.get("output_type")), "--embedding-type": _text(recipe.get("embedding_type"))}
    said |= {f"--{key}": str(recipe[key]) for key in ("bits", "group") if type(recipe.get(key)) is int}
    words += chain.from_iterable(pair for pair in said.items() if pair[1])
    if isinstance(recipe.get("sym"), bool):
        words.append("--sym" if recipe["sym"] else "--asym")
    return words + [f"--{key.replace('_', '-')}" for key in ("pure", "act_order") if recipe.get(key) is True]


def _has_default(to: str) -> bool:
    """Whether transforms are at work there that nobody asked for."""
    scheme = find_scheme(to)
    return scheme is not None and bool(scheme.transforms)


def _calibrate(evidence: Mapping[str, Any], source: str) -> str | None:
    data = _object(evidence.get("data"))
    name, numbers = _text(data.get("name")), [data.get(key) for key in ("tokens", "context", "seed")]
    if not name or not all(type(number) is int for number in numbers):
        return None
    tokens, context, seed = map(str, numbers)
    words = ["dither", "calibrate", _name(source), "--tokens", tokens, "-c", context]
    words += ["--seed", seed] if name.startswith("self") else ["--data", _name(name)]
    if evidence.get("gradients") is True:
        words.append("--gradients")
    return shlex.join([*words, "-o", _EVIDENCE])


def measure_command(found: Measurement) -> str | None:
    """The command that measures the same again; None where its text cannot be named."""
    words = ["dither", "measure", _name(found.file), "--against", _name(found.reference)]
    if found.data != f"self (seed {SEED})":
        if found.data.startswith(("self", "held back")):
            return None
        words += ["--data", _name(found.data)]
    words += ["--tokens", str(found.sequences * found.context), "-c", str(found.context)]
    if found.skipped != "half":
        words += ["--skip", str(found.skipped)]
    return shlex.join(words)


def _name(text: str) -> str:
    """A name as a command takes it: not for an option, with nothing that a terminal would obey."""
    text = shown(text, 400)
    return f"./{text}" if text.startswith("-") else text


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    return shown(value, 400) if isinstance(value, str) else ""


def _names(value: object) -> list[str]:
    return [shown(str(name), 40) for name in list(value)[:8]] if isinstance(value, (dict, list)) else []
