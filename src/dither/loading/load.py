"""Load: a checkpoint, a GGUF or a hub's repository as a transformers model, quantized on its way into memory.

    model = dither.load("path/to/checkpoint", "nf4")
    model.generate(**tokenizer("The sea was", return_tensors="pt"), max_new_tokens=20)
    model.dither  # {"to": "nf4", "backend": "bitsandbytes", "layers": 28, "bits_per_weight": 4.5, …}

No file is written.  `dither.loading` says how.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dither.errors import UsageError
from dither.formats.tensor_names import EMBEDDING
from dither.loading.methods import choose_backend, find_method
from dither.models.source import open_model
from dither.progress import Progress, Silent
from dither.system.cores import available_cores
from dither.types import Model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

DTYPES = ("float32", "bfloat16", "float16")
STORED = {"BF16": "bfloat16", "F16": "float16"}  # anything else is computed in float32, as transformers does


def load(
    model: str | Path | Model,
    to: str,
    *,
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    backend: str = "auto",
    group: int = 64,
    threads: int | None = None,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """A transformers model whose decoder blocks hold quantized linear layers.

    `to` is "nf4", "fp4", "int8", "int4", "fp8" or "hqq".  The embedding, norms and output matrix are kept
    in `dtype`, which is also what is computed in; by default the type in which the source stores its
    embedding, float32 where that is quantized.  `backend` "auto" takes bitsandbytes' layers where it is
    installed and has the type, and Dither's own otherwise: on torch's 4-bit kernels where there is one for
    the type, the device and `dtype`, else de-quantized for each product.  `group` weights share a scale in
    the 4-bit types.  What became of the matrices is in the attribute `dither` of what is returned.

    Raises UsageError for a choice that is not known or a package that is missing, and whatever
    `open_model` and `models.blocks.open_blocks` raise.
    """
    method = find_method(to, group)
    for package in ("torch", "transformers"):
        if find_spec(package) is None:
            raise UsageError("loading a model", f"needs {package}, which is not installed", "pip install 'dither[bnb]'")
    has_bnb = find_spec("bitsandbytes") is not None
    choose_backend(method, backend, has_bnb, "")  # what cannot be had is said before a model is opened
    opened = model if isinstance(model, Model) else open_model(model)
    embedding = next((tensor.stored for tensor in opened.tensors if tensor.name == EMBEDDING), "")
    name = str(dtype or STORED.get(embedding, "float32")).removeprefix("torch.")
    if name not in DTYPES:
        raise UsageError(f"dtype {name}", f"is not one of {', '.join(DTYPES)}")

    import torch

    from dither.loading.int4 import no_kernel
    from dither.loading.network import LoadOptions, build
    from dither.models.blocks.stream import device_of

    place = device_of(device)
    chosen = choose_backend(method, backend, has_bnb, no_kernel(method, group, place, name))
    wanted = LoadOptions(method, chosen, group, place, getattr(torch, name), threads or available_cores())
    return build(opened, wanted, progress or Silent())
