"""bitsandbytes' NF4 of a checkpoint: blocks of 64, absmax in float32 as it is without double quantization.

    pip install torch==2.13.0
    pip install torch==2.13.0 bitsandbytes==0.50.2 transformers==5.23.0 accelerate==1.15.0
    python benchmarks/peers/bitsandbytes_nf4.py MODEL TOKENS.npy OUT

NF4 has no data to learn from: TOKENS.npy, the bits and the group are not looked at.
"""

from __future__ import annotations

import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from contract import Clock, Request, Spent, answer, read_request


def main() -> None:
    request = read_request(__doc__)
    answer(request, quantize(request), "bitsandbytes")


def quantize(request: Request) -> Spent:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, **request.options
    )
    clock = Clock()  # it quantizes as it loads
    model = AutoModelForCausalLM.from_pretrained(
        request.model, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    spent = clock.spent()
    model.save_pretrained(request.out)
    AutoTokenizer.from_pretrained(request.model).save_pretrained(request.out)
    return spent


if __name__ == "__main__":
    main()
