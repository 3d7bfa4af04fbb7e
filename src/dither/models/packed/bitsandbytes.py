"""bitsandbytes checkpoints: NF4 and FP4, whose shape is in a JSON beside them, and LLM.int8."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np

from dither.errors import UnsupportedError
from dither.formats.layouts import Int8, Table4, bnb, integers
from dither.formats.layouts.parts import TABLES, Arrays
from dither.models.packed.matrix import Joined, Module, modules
from dither.models.packed.settings import WAY_OUT, Quantization
from dither.models.stored import PlainTensor
from dither.system.text import shown

_STATES = tuple(f"weight.quant_state.bitsandbytes__{kind}" for kind in TABLES)
_ARRAYS = ("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")
_INT8 = ("weight", "SCB", "weight_format")


def join(stored: Mapping[str, PlainTensor], found: Quantization) -> list[Joined]:
    found_four = ((module, s) for s in _STATES for module in modules(stored, s, ("weight", *_ARRAYS, s)))
    four = [_four_bits(module, state) for module, state in found_four]
    return four + [_eight_bits(module) for module in modules(stored, "SCB", _INT8)]


def _four_bits(module: Module, state_suffix: str) -> Joined:
    stored = module.part(state_suffix, ["U8"], 1)
    thing = f"tensor {shown(stored.name)}"
    raw = stored.raw()[: bnb.MAX_STATE + 1].tobytes()
    if not any(raw):  # a header whose weights are elsewhere
        raise UnsupportedError(thing, "says its shape among the weights, which are not here", "Fetch it first.")
    state = bnb.read_state(raw, thing)
    if not state_suffix.endswith(state.quant_type):
        raise module.wrong(f"is {state.quant_type}, says the JSON that is called {state_suffix}")
    count = prod(state.shape)
    weight = module.tensors.get("weight")
    # whatever type it is stored as (bnb_4bit_quant_storage), its bytes are codes, filled up to whole numbers
    if weight is None or not (count + 1) // 2 <= weight.nbytes < (count + 1) // 2 + 8:
        size = weight.nbytes if weight else 0
        raise module.wrong(f"has shape {list(state.shape)}, but {size} bytes of codes")
    blocks = -(-count // state.block)
    module.part("weight.absmax", ["U8" if state.nested_block else "F32"], (blocks,))
    module.part("weight.quant_map", ["F32"], (16,))
    if state.nested_block:
        module.part("weight.nested_absmax", ["F32"], (-(-blocks // state.nested_block),))
        module.part("weight.nested_quant_map", ["F32"], (256,))

    def read(arrays: Arrays, start: int, stop: int) -> Table4:
        arrays["weight"] = module.tensors["weight"].raw()
        if not np.allclose(arrays["weight.quant_map"], TABLES[state.quant_type], rtol=0, atol=1e-6):
            raise module.wrong(f"has a quant_map of its own, which is not {state.quant_type}")
        return bnb.unpack(arrays, state, start, stop)

    kind = f"{state.quant_type}-g{state.block}" + "-dq" * bool(state.nested_block)
    return module.joined(state.shape, kind, read, _ARRAYS)


def _eight_bits(module: Module) -> Joined:
    rows, columns = module.part("weight", ["I8"], 2).shape
    module.part("SCB", ["F32"], (rows,))
    if module.has("weight_format"):
        module.part("weight_format", ["U8"], ())

    def read(arrays: Arrays, start: int, stop: int) -> Int8:
        if "weight_format" in arrays and int(arrays["weight_format"]) != integers.ROW_MAJOR:
            reason = "lies in an order of old GPUs (weight_format), which is not read"
            raise UnsupportedError(module.thing, reason, WAY_OUT)
        return integers.unpack(arrays, start, stop)

    return module.joined((rows, columns), "int8-channel", read, _INT8)


METHODS = {"bitsandbytes": join}
