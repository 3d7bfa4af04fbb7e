"""A tiny Llama with random weights: its GGUF, written with the `gguf` package, and its float64 reference.

Legend: V vocabulary, D width, F feed-forward width, H query heads, G key/value heads, K head width,
T token positions.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf.constants import TokenType

Doubles = npt.NDArray[np.float64]


def byte_letters() -> list[str]:
    """GPT-2's printable stand-in for each of the 256 bytes (Radford et al. 2019, `encoder.py`):
    printable bytes stand for themselves, the others for code points from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


MERGES = ["t h", "th e", "Ġ the", "a n", "an d", "Ġ and"]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
BOS, EOS, IM_START, IM_END = range(4)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def vocabulary() -> list[str]:
    return SPECIAL + byte_letters() + [merge.replace(" ", "") for merge in MERGES]


@dataclass
class TinyLlama:
    layers: int = 2
    D: int = 64
    F: int = 128
    H: int = 4
    G: int = 2
    context: int = 128
    rope_base: float = 10000.0
    eps: float = 1e-5
    seed: int = 0
    chat_template: str | None = None
    weights: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = np.random.default_rng(self.seed)
        K = self.D // self.H

        def add(name: str, *shape: int, scale: float = 0.0) -> None:
            noise = generator.standard_normal(shape)
            self.weights[name] = (noise * scale if scale else 1 + 0.1 * noise).astype(np.float32)

        add("token_embd.weight", len(vocabulary()), self.D, scale=1.0)
        add("output.weight", len(vocabulary()), self.D, scale=0.4)
        add("output_norm.weight", self.D)
        for i in range(self.layers):
            add(f"blk.{i}.attn_norm.weight", self.D)
            add(f"blk.{i}.attn_q.weight", self.H * K, self.D, scale=0.25)
            add(f"blk.{i}.attn_k.weight", self.G * K, self.D, scale=0.25)
            add(f"blk.{i}.attn_v.weight", self.G * K, self.D, scale=0.25)
            add(f"blk.{i}.attn_output.weight", self.D, self.H * K, scale=0.25)
            add(f"blk.{i}.ffn_norm.weight", self.D)
            add(f"blk.{i}.ffn_gate.weight", self.F, self.D, scale=0.2)
            add(f"blk.{i}.ffn_up.weight", self.F, self.D, scale=0.2)
            add(f"blk.{i}.ffn_down.weight", self.D, self.F, scale=0.2)

    def parrot(self, after: int, text: str, end: int = EOS) -> TinyLlama:
        """Weights under which token `after` is followed by the bytes of `text`, then `end`, for sure.

        The blocks add nothing, embeddings are one-hot and the output layer maps each token to its
        successor, so every byte may occur only once.  An `end` among them makes the text endless.
        """
        letters = [len(SPECIAL) + byte for byte in text.encode()]
        chain = [after, *letters, end]
        assert len(set(chain[:-1])) == len(chain) - 1 < self.D
        for name in self.weights:
            if name.endswith(("attn_output.weight", "ffn_down.weight")):
                self.weights[name][:] = 0
        embedding, output = self.weights["token_embd.weight"], self.weights["output.weight"]
        embedding[:], output[:] = 1e-3, 0
        self.weights["output_norm.weight"][:] = 1
        for axis, (token, successor) in enumerate(itertools.pairwise(chain)):
            embedding[token, axis] = 1
            output[successor, axis] = 5
        return self

    def write(self, path: Path) -> Path:
        writer = gguf.GGUFWriter(str(path), "llama")
        writer.add_block_count(self.layers)
        writer.add_context_length(self.context)
        writer.add_embedding_length(self.D)
        writer.add_feed_forward_length(self.F)
        writer.add_head_count(self.H)
        writer.add_head_count_kv(self.G)
        writer.add_layer_norm_rms_eps(self.eps)
        writer.add_rope_freq_base(self.rope_base)
        writer.add_rope_dimension_count(self.D // self.H)
        writer.add_vocab_size(len(vocabulary()))
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(vocabulary())
        kinds = [TokenType.CONTROL] * len(SPECIAL)
        writer.add_token_types(kinds + [TokenType.NORMAL] * (len(vocabulary()) - len(SPECIAL)))
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(BOS)
        writer.add_eos_token_id(IM_END if self.chat_template else EOS)
        writer.add_add_bos_token(True)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)
        for name, weight in self.weights.items():
            writer.add_tensor(name, weight)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def probabilities(self, tokens: list[int]) -> Doubles:
        """The distribution after the last token, by the textbook formulas in float64."""
        w = {name: weight.astype(np.float64) for name, weight in self.weights.items()}
        x_TD = w["token_embd.weight"][tokens]
        for i in range(self.layers):
            layer = {name.split(".")[2]: weight for name, weight in w.items() if name.startswith(f"blk.{i}.")}
            x_TD = x_TD + self._attention(self._norm(x_TD, layer["attn_norm"]), layer)
            h_TD = self._norm(x_TD, layer["ffn_norm"])
            gate_TF = h_TD @ layer["ffn_gate"].T
            swish_TF = gate_TF / (1 + np.exp(-gate_TF))
            x_TD = x_TD + (swish_TF * (h_TD @ layer["ffn_up"].T)) @ layer["ffn_down"].T
        logits_V = w["output.weight"] @ self._norm(x_TD, w["output_norm.weight"])[-1]
        exponentials = np.exp(logits_V - logits_V.max())
        return exponentials / exponentials.sum()

    def _norm(self, x_TD: Doubles, weight_D: Doubles) -> Doubles:
        return x_TD / np.sqrt((x_TD**2).mean(axis=-1, keepdims=True) + self.eps) * weight_D

    def _rotate(self, x_THK: Doubles) -> Doubles:
        """RoPE on neighbouring pairs, the layout of GGUF's `llama` architecture."""
        T, _, K = x_THK.shape
        angle_TP = np.arange(T)[:, None] * self.rope_base ** (-np.arange(0, K, 2) / K)
        cosine, sine = np.cos(angle_TP)[:, None], np.sin(angle_TP)[:, None]
        even, odd = x_THK[..., 0::2], x_THK[..., 1::2]
        pairs = np.stack([even * cosine - odd * sine, even * sine + odd * cosine], axis=-1)
        return pairs.reshape(x_THK.shape)

    def _attention(self, x_TD: Doubles, layer: dict[str, Doubles]) -> Doubles:
        T, K = len(x_TD), self.D // self.H
        q_THK = self._rotate((x_TD @ layer["attn_q"].T).reshape(T, self.H, K))
        k_TGK = self._rotate((x_TD @ layer["attn_k"].T).reshape(T, self.G, K))
        v_TGK = (x_TD @ layer["attn_v"].T).reshape(T, self.G, K)
        k_THK, v_THK = (np.repeat(part, self.H // self.G, axis=1) for part in (k_TGK, v_TGK))
        scores_HTT = np.einsum("thk,shk->hts", q_THK, k_THK) / np.sqrt(K)
        scores_HTT[:, np.triu(np.ones((T, T), dtype=bool), 1)] = -np.inf
        weights_HTT = np.exp(scores_HTT - scores_HTT.max(axis=-1, keepdims=True))
        weights_HTT /= weights_HTT.sum(axis=-1, keepdims=True)
        return np.einsum("hts,shk->thk", weights_HTT, v_THK).reshape(T, -1) @ layer["attn_output"].T
