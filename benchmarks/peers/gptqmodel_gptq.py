"""GPTQModel's GPTQ of a checkpoint, on the CPU, in GPTQ's layout.

    pip install torch==2.13.0
    pip install torch==2.13.0 gptqmodel==7.6.0 optimum==2.3.0 transformers==5.23.0
    python benchmarks/peers/gptqmodel_gptq.py MODEL TOKENS.npy OUT --bits 4 --group 128
        [--option desc_act=True] [--option sym=False --option format=gptq_v2] [--option mse=2.4]

Two workers are asked for, because with fewer processors than its own count it refuses to start.
"""

from __future__ import annotations

import os

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from contract import Clock, Request, Spent, answer, read_request


def main() -> None:
    request = read_request(__doc__)
    answer(request, quantize(request), "gptqmodel")


def quantize(request: Request) -> Spent:
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=request.bits, group_size=request.group, **request.options)
    # In float32: bfloat16 products are five times as slow where the processor has none of its own.
    model = GPTQModel.load(request.model, config, device="cpu", dtype=torch.float32)
    rows = [
        {"input_ids": torch.tensor(row_T), "attention_mask": torch.ones(len(row_T), dtype=torch.long)}
        for row_T in request.tokens_ST.tolist()
    ]
    clock = Clock()
    model.quantize(rows, batch_size=8)
    spent = clock.spent()
    model.save(request.out)
    return spent


if __name__ == "__main__":
    main()
