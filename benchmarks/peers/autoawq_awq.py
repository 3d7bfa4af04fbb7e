"""AutoAWQ's AWQ of a checkpoint, on the CPU: its search for scales and for clips, as published.

    pip install torch==2.13.0 setuptools wheel
    pip install --no-build-isolation torch==2.13.0 autoawq==0.2.9 transformers==4.51.3
    python benchmarks/peers/autoawq_awq.py MODEL TOKENS.npy OUT --bits 4 --group 128
        [--option apply_clip=False]

As released it corrupts what it quantizes on a CPU: its search saves the weights with `.cpu()`, which copies
from a GPU but not here, and then scales them in place.  `_copying_quantizer` gives it the copy it means.

AutoAWQ packs 4 bits only ("Only 4-bit are supported for now").  At other widths its search runs all the
same, and OUT becomes a dense checkpoint of the weights that its own rounding gives.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from contract import Clock, Request, Spent, answer, read_request

PACKED_BITS = 4


def main() -> None:
    request = read_request(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        spent = quantize(request, older_checkpoint(Path(request.model), Path(folder)))
    answer(request, spent, "autoawq")


def older_checkpoint(model: Path, folder: Path) -> Path:
    """The checkpoint with its configuration in the words of transformers 4: rope_theta, torch_dtype."""
    for path in model.iterdir():
        if path.is_file():
            shutil.copy(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text())
    config.setdefault("rope_theta", config.get("rope_parameters", {}).get("rope_theta", 10000.0))
    config.setdefault("torch_dtype", config.get("dtype", "bfloat16"))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def quantize(request: Request, folder: Path) -> Spent:
    import torch
    from awq import AutoAWQForCausalLM
    from transformers import AutoTokenizer

    packs = request.bits == PACKED_BITS
    config = {"w_bit": request.bits, "q_group_size": request.group, "zero_point": True, "version": "GEMM"}
    # In float32: the CPU has no fast half-precision products.
    model = AutoAWQForCausalLM.from_pretrained(
        str(folder), torch_dtype=torch.float32, device_map="cpu", low_cpu_mem_usage=False, use_cache=False
    )
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    count, length = request.tokens_ST.shape
    clock = Clock()
    model.quantize(
        tokenizer,
        quant_config=config,
        calib_data=request.tokens_ST.tolist(),
        max_calib_samples=count,
        max_calib_seq_len=length,
        export_compatible=not packs,
        quantizer_cls=_copying_quantizer(),
        **request.options,
    )
    spent = clock.spent()
    if packs:
        model.save_quantized(request.out)
    else:
        round_weights(model.quantizer)
        model.model.save_pretrained(request.out)
    tokenizer.save_pretrained(request.out)
    return spent


def _copying_quantizer() -> type:
    from awq.quantize.quantizer import AwqQuantizer

    class Copying(AwqQuantizer):  # type: ignore[misc]
        def _compute_best_scale(self, x, w_mean, x_mean, module2inspect, *args, **kwargs):  # type: ignore
            state = module2inspect.state_dict
            module2inspect.state_dict = lambda: {name: value.clone() for name, value in state().items()}
            try:
                return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *args, **kwargs)
            finally:
                del module2inspect.state_dict

    return Copying


def round_weights(quantizer: object) -> None:
    """Every linear layer's weights as AutoAWQ would de-quantize them, with float16 scales as it stores."""
    from awq.utils.module import get_named_linears

    for block in quantizer.modules:
        for linear in get_named_linears(block).values():
            rounded, _, _ = quantizer.pseudo_quantize_tensor(linear.weight.data.half())
            linear.weight.data = rounded.float()


if __name__ == "__main__":
    main()
