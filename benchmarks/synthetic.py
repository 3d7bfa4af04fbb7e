"""A Llama of about 1.1 B parameters (or 6.3 B) in bf16 safetensors, made in seconds: real shapes, no sense.

Gaussian values from one block of 16 M draws, laid end to end at shifted places, so that writing two
gigabytes costs no more than the disk does.

    python benchmarks/synthetic.py FOLDER [large]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HIDDEN, FFN, KV, VOCABULARY = 2048, 5632, 256, 32000
LAYERS = 22  # 1.1 B parameters


class Widths(NamedTuple):
    hidden: int = HIDDEN
    ffn: int = FFN
    kv: int = KV
    kv_heads: int = 4


LARGE, LARGE_LAYERS = Widths(4096, 11008, 1024, 8), 34  # 6.3 B parameters


def shapes(layers: int, widths: Widths = Widths()) -> dict[str, tuple[int, ...]]:
    hidden, ffn, kv, _ = widths
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, hidden),
        "lm_head.weight": (VOCABULARY, hidden),
        "model.norm.weight": (hidden,),
    }
    for i in range(layers):
        block = f"model.layers.{i}."
        found |= {
            f"{block}self_attn.q_proj.weight": (hidden, hidden),
            f"{block}self_attn.k_proj.weight": (kv, hidden),
            f"{block}self_attn.v_proj.weight": (kv, hidden),
            f"{block}self_attn.o_proj.weight": (hidden, hidden),
            f"{block}mlp.gate_proj.weight": (ffn, hidden),
            f"{block}mlp.up_proj.weight": (ffn, hidden),
            f"{block}mlp.down_proj.weight": (hidden, ffn),
            f"{block}input_layernorm.weight": (hidden,),
            f"{block}post_attention_layernorm.weight": (hidden,),
        }
    return found


def write(folder: Path, layers: int = LAYERS, widths: Widths = Widths()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "config.json").exists():
        return folder
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(2**24, dtype=np.float32) * 0.02).view(np.uint32)
    block = ((values + 0x8000) >> 16).astype("<u2")
    header, offset = {}, 0
    for name, shape in shapes(layers, widths).items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for i, shape in enumerate(shapes(layers, widths).values()):
            left, start = int(np.prod(shape)), 7919 * i % len(block)
            while left:
                piece = block[start : start + left]
                file.write(piece.tobytes())
                left, start = left - len(piece), 0
    write_tokenizer(folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": widths.hidden,
        "intermediate_size": widths.ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": widths.kv_heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [f"<filler{i}>" for i in range(VOCABULARY - len(alphabet))]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")


if __name__ == "__main__":
    large = sys.argv[2:] == ["large"]
    print(write(Path(sys.argv[1]), LARGE_LAYERS if large else LAYERS, LARGE if large else Widths()))
