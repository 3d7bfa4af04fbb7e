"""Whether transformers' class takes a checkpoint: its parameters, built without memory, held against tensors.

The class is built from the very config.json that will be written.  Tensors have GGUF's names; the family's rules say
which parameter each becomes, fused or apart, so that what is compared are names and shapes on either side.  A matrix
that is to be quantized must be a module's, for modules are what a quantizer replaces; experts are another matter, as
their layers are one array in some releases of transformers (`Scheme.without_experts`).

Run as a child (`main`) it reads a question as JSON on stdin and answers in one line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM

from dither.errors import SourceError, UnsupportedError
from dither.formats.tensor_names import EMBEDDING, OUTPUT, ROPE_TABLES
from dither.models.arch import families
from dither.models.arch.family import Family
from dither.models.blocks.restore import plan
from dither.system.text import shown

_CLASS = "transformers' class"
_FOLDER = "Write a GGUF instead, or take a model without it."
_AGAIN = "Take config.json and the weights from the same model."
_REPORTED = (
    ValueError, KeyError, TypeError, AttributeError, RuntimeError, ArithmeticError, StrictDataclassError
)  # fmt: skip


def check_network(asked: Mapping[str, Any]) -> list[str]:
    """See `containers.folders.consumers.check_network`, which asks."""
    family = next(one for one in families() if one.name == asked["family"])
    shapes = {name: tuple(shape) for name, shape in asked["shapes"].items()}
    try:
        skeleton = _skeleton(asked["config"])
    except _REPORTED as error:  # whatever its configuration does not like, in a release that knows the family or not
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return [f"transformers could not be asked which tensors it takes ({shown(first)})"]
    _check_tensors(family, skeleton, shapes, bool(asked["config"].get("tie_word_embeddings")))
    _check_modules(skeleton, asked["modules"])
    return []


def _skeleton(config: Mapping[str, Any]) -> Any:
    others = {key: value for key, value in config.items() if key != "model_type"}
    known = AutoConfig.for_model(config["model_type"], **others)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(known)  # type: ignore[no-untyped-call]


def _check_tensors(family: Family, skeleton: Any, shapes: Mapping[str, tuple[int, ...]], tied: bool) -> None:
    takes: dict[str, tuple[int, ...]] = {}
    for restored in plan(family, skeleton.config, skeleton).values():
        takes |= dict(zip(restored.tensors, restored.shapes(), strict=True))
    if not tied:
        takes[OUTPUT] = takes[EMBEDDING]
    for name, shape in takes.items():
        if name not in shapes:
            reason = f"is missing: {_CLASS} for {family.name} would fill it with numbers of its own"
            raise SourceError(f"tensor {shown(name)}", reason, _AGAIN)
        if shapes[name] != shape:
            reason = f"has shape {list(shapes[name])}, but {_CLASS} for {family.name} takes {list(shape)}"
            raise SourceError(f"tensor {shown(name)}", reason, _AGAIN)
    unknown = [name for name in shapes if name not in takes and name not in ROPE_TABLES]
    if unknown:
        reason = f"has no place in {_CLASS} for {family.name}, which would leave it out without a word"
        raise UnsupportedError(f"tensor {shown(unknown[0])}", reason, _FOLDER)


def _check_modules(skeleton: Any, modules: Sequence[str]) -> None:
    known = dict(skeleton.named_modules())
    for name in modules:
        if name not in known:
            raise UnsupportedError(f"module {shown(name)}", f"is none of {_CLASS}", _FOLDER)


def main() -> None:
    asked: dict[str, Any] = json.loads(sys.stdin.read())
    answer: dict[str, Any] = {"error": None, "notes": []}
    try:
        answer["notes"] = check_network(asked)
    except (SourceError, UnsupportedError) as error:
        answer |= {"error": error.to_json(), "kind": type(error).__name__}
    print(json.dumps(answer), flush=True)
