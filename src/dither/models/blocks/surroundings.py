"""What every block reads besides hidden states: positions, their rotary embedding, a mask.

All sequences are whole: positions count from 0, nothing is padded, and each token sees those before it,
at most a window's width of them in a local layer (token q sees token k where 0 ≤ q − k < window).

Legend: T tokens of a sequence, D rotated dimensions of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel


class Surroundings:
    """Makes them for a layer and a length, and keeps those of the latest length: the same for all sequences, and for
    all layers of one kind.  They are named as transformers' decoder layers name their arguments."""

    def __init__(self, skeleton: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
        config = skeleton.config
        self._rotary = rotary_embedding(skeleton).to(device)
        self._by_kind = "full_attention" in config.rope_parameters
        self._window = getattr(config, "sliding_window", None)
        every = "sliding_attention" if self._window else "full_attention"
        self._kinds = getattr(config, "layer_types", None) or [every] * config.num_hidden_layers
        self._is_implied = config._attn_implementation == "sdpa"  # fused attention is causal without a mask
        self._like = torch.empty(0, device=device, dtype=dtype)
        self._length = 0
        self._made: dict[str, dict[str, Any]] = {}

    def __call__(self, layer: int, length: int) -> dict[str, Any]:
        if length != self._length:
            self._length, self._made = length, {}
        kind = self._kinds[layer]
        self._made[kind] = self._made.get(kind) or self._make(kind, length)
        return self._made[kind]

    @torch.inference_mode(False)  # kept for later calls, some of which may record gradients
    def _make(self, kind: str, length: int) -> dict[str, Any]:
        position_1T = torch.arange(length, device=self._like.device)[None]
        with torch.no_grad():
            rotation = self._rotary(self._like, position_1T, *([kind] if self._by_kind else []))  # 2 × (1, T, D)
        window = self._window if kind == "sliding_attention" else None
        mask_11TT = None  # where causality alone decides
        if not self._is_implied or (window and window < length):
            # Zero where a token may look, −∞ elsewhere.
            behind_TT = position_1T.T - position_1T
            hidden_TT = (behind_TT < 0) | (behind_TT >= (window or length))
            mask_11TT = self._like.new_zeros(length, length).masked_fill_(hidden_TT, -torch.inf)[None, None]
        return {
            "attention_mask": mask_11TT,  # added to attention scores
            "position_ids": position_1T,
            "position_embeddings": rotation,
            "past_key_values": None,
            "use_cache": False,
        }


def rotary_embedding(skeleton: PreTrainedModel) -> torch.nn.Module:
    """transformers' own module, with memory."""
    rotary: torch.nn.Module = type(skeleton.get_submodule("model.rotary_emb"))(skeleton.config)
    return rotary
