"""How engines for GPUs lay quantized weights out in safetensors: bytes to plain arrays and back.

One file per layout.  Each has `parts`, the tensors that a matrix becomes (their suffixes, number types and
shapes, known before any weight is), `pack`, which fills them, and `unpack`, which reads a span of rows from
them.  What lies between is one of `parts.py`'s records: codes and the scales that give them meaning.

    gptq          integers below a zero point, packed along the inputs
    awq           the same, packed along the outputs in an order of its own
    compressed    compressed-tensors' pack-quantized integers
    integers      one signed byte per weight: compressed-tensors' int-quantized, bitsandbytes' LLM.int8
    float8        E4M3 bytes under scales per block, row or tensor; `dither.models.fp8` reads them
    micro         MXFP4 and NVFP4, as compressed-tensors and as gpt-oss keep them
    bnb           bitsandbytes' NF4 and FP4, also with a quantized absmax
    recode        which of these are GGUF's Q4_0 or Q4_1 to the bit

What config.json calls a method, and how others speak of it, stands in the file of its layout too: `METHODS`,
found by iterating this folder (`methods.methods`).

Nothing here opens a file or knows a model.  Shapes are trusted: whoever reads a stranger's file checks them
first (`dither.models.packed`).
"""

from __future__ import annotations

from dither.formats.layouts.parts import Affine, Int8, Micro, Table4
from dither.system.discovery import room_path

__path__ = room_path(__path__, __name__)

__all__ = ["Affine", "Int8", "Micro", "Table4"]
