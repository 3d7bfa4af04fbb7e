"""llm-compressor's GPTQ of a checkpoint, on the CPU, in compressed-tensors' packed layout.

    pip install torch==2.13.0
    pip install torch==2.13.0 llmcompressor==0.14.0.1 "transformers<=5.17"
    python benchmarks/peers/llmcompressor_gptq.py MODEL TOKENS.npy OUT --bits 4 --group 128
        [--option actorder=weight] [--option symmetric=False] [--option observer=mse]

Its default order is `actorder=static`; of the others `weight` is the same by another name and `group` is
refused ("Only 'weight' and 'static' are supported for GPTQ").  `transformers` has to be one that it pins.
With `--option=device='cuda'` it runs on a GPU, in the checkpoint's own type.
"""

from __future__ import annotations

import os
import sys

if "--option=device='cuda'" not in sys.argv:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from contract import Clock, Request, Spent, answer, read_request

OF_WEIGHTS = ("symmetric", "observer", "observer_kwargs")  # the other options are the modifier's own


def main() -> None:
    request = read_request(__doc__)
    answer(request, quantize(request), "llmcompressor")


def quantize(request: Request) -> Spent:
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = dict(request.options)
    device = options.pop("device", "cpu")
    weights = {
        "num_bits": request.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": request.group,
    }
    weights |= {name: options.pop(name) for name in OF_WEIGHTS if name in options}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    recipe = GPTQModifier(config_groups=groups, ignore=["lm_head"], **options)

    # In float32: bfloat16 products are five times as slow where the processor has none of its own.
    dtype = torch.float32 if device == "cpu" else "auto"
    model = AutoModelForCausalLM.from_pretrained(request.model, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(request.model)
    ids_ST = torch.tensor(request.tokens_ST, dtype=torch.long)
    rows = [{"input_ids": row_T, "attention_mask": torch.ones_like(row_T)} for row_T in ids_ST]
    clock = Clock()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=DataLoader(rows, batch_size=8),
        recipe=recipe,
        num_calibration_samples=len(rows),
        max_seq_length=ids_ST.shape[1],
    )
    spent = clock.spent()
    model.save_pretrained(request.out, save_compressed=True)
    tokenizer.save_pretrained(request.out)
    return spent


if __name__ == "__main__":
    main()
