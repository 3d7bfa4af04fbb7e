"""Who loads a folder: what they are known not to, and what transformers' own class takes.

What was loaded by whom is written down where each scheme is (`Scheme.loaded_by`, `without_experts`, `dtypes`), as
transformers 5.23 with the formats' packages did it on tiny models of every family, and vLLM, where it has no kernels
on a CPU, by its loader's source (docs/formats.md has the table).  A format that nobody loads a model from is refused;
one that some do not load it from is written with a note that names them.

transformers' class says by itself which parameters there are: it is built without memory (`models/blocks/network.py`),
in a child unless torch is loaded already, as importing it takes seconds and memory that nothing else here needs.  Where
torch or transformers is not installed the family's tables have the last word.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from dither.containers.folders.mix import is_linear
from dither.containers.folders.scheme import Scheme
from dither.errors import DitherError, SourceError, UnsupportedError
from dither.formats.ggml import FLOAT_TYPES
from dither.formats.tensor_names import is_expert_stack
from dither.models.arch.family import Family
from dither.models.arch.written import Written
from dither.system import isolated
from dither.types import Model

Overrides = Sequence[tuple[str, str]]  # regular expression, type
_KEPT = "--tensor '_exps=BF16'"
_PATIENCE = 300  # seconds for a child to import torch on a slow disk


def refuse_unloaded(scheme: Scheme, model: Model, overrides: Overrides) -> None:
    """Raises UnsupportedError where nobody who runs this format loads the model."""
    refused = scheme.without_experts
    if not set(scheme.loaded_by) <= set(refused) or not _quantizes_experts(scheme, model, overrides):
        return
    reason = f"cannot be loaded by {' or '.join(scheme.loaded_by)}: {refused[scheme.loaded_by[0]]}"
    way_out = f"Take --to w4a16 or fp8, or keep the experts as numbers: {_KEPT}."
    raise UnsupportedError(f"{scheme.title} of a mixture of experts", reason, way_out)


def unloaded_notes(scheme: Scheme, model: Model, overrides: Overrides) -> list[str]:
    """Who does not load the model, of those who usually run this format."""
    if not scheme.without_experts or not _quantizes_experts(scheme, model, overrides):
        return []
    able = " and ".join(name for name in scheme.loaded_by if name not in scheme.without_experts)
    return [
        f"{name} does not run {scheme.title} of a mixture of experts ({why}): it is for {able}"
        for name, why in scheme.without_experts.items()
    ]


def loaders(scheme: Scheme, model: Model, overrides: Overrides) -> tuple[str, ...]:
    """Those that load the model here: transformers before vLLM, which wants a GPU to be of use."""
    without = scheme.without_experts if _quantizes_experts(scheme, model, overrides) else {}
    return tuple(name for name in ("transformers", "vLLM") if name in scheme.loaded_by and name not in without)


def _quantizes_experts(scheme: Scheme, model: Model, overrides: Overrides) -> bool:
    """Whether any stack of experts does not stay numbers."""

    def kind(name: str) -> str:
        return next((kind for pattern, kind in overrides if re.search(pattern, name)), scheme.name)

    stacks = [tensor.name for tensor in model.tensors if is_expert_stack(tensor.name)]
    return scheme.quantizes and any(kind(name).upper() not in FLOAT_TYPES for name in stacks)


def check_network(family: Family, config: Mapping[str, Any], model: Model, entries: Sequence[Written]) -> list[str]:
    """Holds a checkpoint against the class that transformers builds for its config.json.

    Raises UnsupportedError for a tensor that no parameter takes, SourceError for a parameter without one or of
    another shape.  Notes where transformers could not say.
    """
    linear = {tensor.name for tensor in model.tensors if is_linear(tensor) and not is_expert_stack(tensor.name)}
    asked = {
        "family": family.name,
        "config": config,
        "shapes": {tensor.name: list(tensor.shape) for tensor in model.tensors},
        "modules": sorted({entry.module for entry in entries if entry.tensor in linear}),
    }
    if "torch" in sys.modules:
        from dither.models.blocks import check_network as check

        return list(check(asked))
    if find_spec("torch") is None or find_spec("transformers") is None:
        return []
    return _in_a_child(asked)


def _in_a_child(asked: Mapping[str, Any]) -> list[str]:
    said = subprocess.run(
        isolated.command("dither.models.blocks.network"),
        input=json.dumps(asked, default=str),
        capture_output=True,
        text=True,
        timeout=_PATIENCE,
        check=False,
    )
    lines = said.stdout.strip().splitlines()
    if said.returncode or not lines:
        last = (said.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        return [f"transformers could not be asked which tensors it takes ({last[:200]})"]
    answer: dict[str, Any] = json.loads(lines[-1])
    raised: Mapping[str, type[DitherError]] = {"SourceError": SourceError, "UnsupportedError": UnsupportedError}
    if answer["error"]:
        raise raised[answer["kind"]](**answer["error"])
    return list(answer["notes"])
