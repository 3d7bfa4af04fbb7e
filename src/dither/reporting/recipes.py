"""How a file was made, in words and as the command that makes it again.

Everything comes from the recipe that the file itself carries (`containers.provenance.recipe_json`).  It holds
names and settings, nothing of the machine that made it, so a command names models, texts and folders as
people call them.  What a recipe leaves open makes no command: none is better than one of another file.
A recipe is a stranger's text: what has not the expected kind counts as absent.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

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
    words = [_text(recipe.get("solver"))]
    evidence = recipe.get("evidence")
    if isinstance(evidence, dict):
        words.append("calibrated with gradients" if evidence.get("gradients") else "calibrated")
    if isinstance(recipe.get("imatrix"), dict):
        words.append("importance matrix")
    if recipe.get("statistics") == "sequential":
        words.append("sequential")
    words += list(_names(recipe.get("transforms")))
    for key, said in (("plan", "planned mix"), ("tensors", "types by name"), ("pure", "one type")):
        if recipe.get(key):
            words.append(said)
    if recipe.get("act_order") is True:
        words.append("act-order")
    return ", ".join(word for word in words if word)


def source_of(recipe: Mapping[str, Any]) -> str:
    source = recipe.get("source")
    return _text(source.get("name")) if isinstance(source, dict) else ""


def evidence_sha256(recipe: Mapping[str, Any]) -> str:
    evidence = recipe.get("evidence")
    return _text(evidence.get("sha256")) if isinstance(evidence, dict) else ""


def command(recipe: Mapping[str, Any], file: str, source: str = "") -> str | None:
    """The command that makes the file again from `source` (what the recipe calls it unless given).

    None where the recipe does not tell: another tool's file, a plan, whose types stand in a file of its own,
    numbers of a dtype, which another command makes.
    """
    source, to = source or source_of(recipe), _text(recipe.get("to"))
    if not source or not to or recipe.get("plan") or recipe.get("dtype"):
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
    more = _options(recipe)
    return None if more is None else before + shlex.join([*words, *more, "-o", _name(file)])


def _options(recipe: Mapping[str, Any]) -> list[str] | None:
    words: list[str] = []
    if _text(recipe.get("solver")):
        words += ["--solver", _text(recipe["solver"])]
    for transform in _names(recipe.get("transforms")):
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
    for key, option in (("output_type", "--output-type"), ("embedding_type", "--embedding-type")):
        if _text(recipe.get(key)):
            words += [option, _text(recipe[key])]
    for key, option in (("bits", "--bits"), ("group", "--group")):
        if type(recipe.get(key)) is int:
            words += [option, str(recipe[key])]
    if isinstance(recipe.get("sym"), bool):
        words.append("--sym" if recipe["sym"] else "--asym")
    words += [f"--{key.replace('_', '-')}" for key in ("pure", "act_order") if recipe.get(key) is True]
    return words


def _calibrate(evidence: Mapping[str, Any], source: str) -> str | None:
    data = evidence.get("data")
    if not isinstance(data, dict):
        return None
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
    if found.data.startswith("self"):
        if found.data != f"self (seed {SEED})":
            return None
    elif found.data.startswith("held back"):
        return None
    else:
        words += ["--data", _name(found.data)]
    words += ["--tokens", str(found.sequences * found.context), "-c", str(found.context)]
    if found.skipped != "half":
        words += ["--skip", str(found.skipped)]
    return shlex.join(words)


def _name(text: str) -> str:
    """A name as a command takes it: not for an option, with nothing that a terminal would obey."""
    text = shown(text, 400)
    return f"./{text}" if text.startswith("-") else text


def _text(value: object) -> str:
    return shown(value, 400) if isinstance(value, str) else ""


def _names(value: object) -> list[str]:
    return [shown(str(name), 40) for name in list(value)[:8]] if isinstance(value, (dict, list)) else []
