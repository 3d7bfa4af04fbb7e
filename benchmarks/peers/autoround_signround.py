"""AutoRound's SignRound of a checkpoint, on the CPU: rounding and ranges learned by signed gradients.

    pip install torch==2.13.0
    pip install torch==2.13.0 auto-round==0.16.1
    python benchmarks/peers/autoround_signround.py MODEL TOKENS.npy OUT --bits 4 --group 128
        [--option iters=50] [--option sym=False]

Its packed formats cover 4 bits; at other widths OUT is a dense checkpoint of the de-quantized weights.
"""

from __future__ import annotations

import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from contract import Clock, Request, Spent, answer, read_request

PACKED_BITS = 4


def main() -> None:
    request = read_request(__doc__)
    answer(request, quantize(request), "auto-round")


def quantize(request: Request) -> Spent:
    import torch
    from auto_round import AutoRound
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # In float32: bfloat16 products are five times as slow where the processor has none of its own.
    model = AutoModelForCausalLM.from_pretrained(request.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(request.model)
    ids_ST = torch.tensor(request.tokens_ST, dtype=torch.long)
    rows = [{"input_ids": row_T, "attention_mask": torch.ones_like(row_T)} for row_T in ids_ST]
    solver = AutoRound(
        model,
        tokenizer,
        bits=request.bits,
        group_size=request.group,
        dataset=DataLoader(rows, batch_size=8),
        nsamples=len(rows),
        seqlen=ids_ST.shape[1],
        device_map="cpu",
        amp=False,
        **request.options,
    )
    clock = Clock()
    solver.quantize()
    spent = clock.spent()
    solver.save_quantized(request.out, format="auto_gptq" if request.bits == PACKED_BITS else "fake")
    return spent


if __name__ == "__main__":
    main()
