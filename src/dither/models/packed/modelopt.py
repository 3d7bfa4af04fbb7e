"""NVIDIA ModelOpt's checkpoints: FP8, MXFP8 and NVFP4, one kind or several in one file.

`quant_algo` names the kind, "MIXED_PRECISION" the kinds of `quantized_layers`; which layer has which follows
from what is stored.  NVFP4 has its codes under the plain name `weight` and a scale of the tensor that is
multiplied.  Floats of eight bits are left to `float8`.  Kinds whose layers scale their inputs (AWQ,
SmoothQuant, SVD) hold other weights than the model's, and integers are packed as TensorRT-LLM wants them:
neither is read.

Source: NVIDIA ModelOpt, `torch/export/unified_export_hf.py` and `quant_utils.py`.

Legend: O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dither.formats.layouts import micro
from dither.models.packed.matrix import Joined, Module, modules
from dither.models.packed.settings import Quantization
from dither.models.stored import PlainTensor

READ = ("fp8", "fp8_per_channel_per_token", "mxfp8", "nvfp4", "w4a16_nvfp4", "w4a8_nvfp4_fp8")
_PARTS = ("weight", "weight_scale", "weight_scale_2")


def join(stored: Mapping[str, PlainTensor], found: Quantization) -> list[Joined]:
    for kind in _kinds(found):
        if kind not in READ:
            raise found.refuse(f"as {kind or 'nothing that is named'}, which is not read")
    for name in stored:
        if name.endswith(".pre_quant_scale"):
            raise found.refuse(f"with layers that scale their inputs ({name})")
    return [_nvfp4(module) for module in modules(stored, "weight_scale_2", _PARTS)]


def _kinds(found: Quantization) -> Iterator[str]:
    whole = found.text("quant_algo")
    layers = found.config.get("quantized_layers")
    if whole != "mixed_precision" or not isinstance(layers, dict):
        yield whole
        return
    for layer in layers.values():
        stated = layer if isinstance(layer, dict) else {}
        yield Quantization(found.method, stated, found.thing).text("quant_algo")


def _nvfp4(module: Module) -> Joined:
    rows, half = module.part("weight", ["U8"], 2).shape
    group, columns = micro.GROUPS["NVFP4"], 2 * half
    if not rows or not half or columns % group:
        raise module.wrong(f"has shape {[rows, columns]}, which is no NVFP4")
    module.part("weight_scale", ["F8_E4M3"], (rows, columns // group))
    whole = module.tensors["weight_scale_2"]
    if whole.dtype != "F32" or whole.shape not in ((), (1,)):
        raise module.wrong(f"has a weight_scale_2 of {whole.dtype} and shape {list(whole.shape)}")
    return module.joined((rows, columns), "NVFP4", micro.unpack_modelopt, _PARTS)


METHODS = {"modelopt": join}
LEAVES_FLOATS = True
