"""From a model's metadata to the numbers its memory depends on.

The keys are GGUF's, whatever the source was; what they mean for the cache is decided by llama.cpp's
loader, `src/models/*.cpp` and `llama_hparams`, and repeated here:

- **Grouped queries.**  A layer keeps n_kv_head · (d_k + d_v) numbers per token; heads may differ per layer.
- **Sliding windows.**  The window is a key; which layers have it is one too in newer files (a period, or
  a truth value per layer), and built into llama.cpp's graph for older families.
- **Latent attention (MLA).**  Only the compressed vector and the rotary part are kept, kv_lora_rank + rope
  numbers in all, as keys; values are a view of them.  `key_length_mla` marks the files that can do so.
- **Recurrent layers.**  A convolution's tail and a state per slot, in float32 whatever `--kv` says.
- **Shared caches.**  Trailing layers that read an earlier layer's cache keep nothing.

What a file leaves open is taken at its most expensive and said in a note, never guessed in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dither.capacity.memory import Layer, Shape
from dither.errors import SourceError
from dither.formats.tensor_names import EMBEDDING, OUTPUT
from dither.models.arch import window_period
from dither.types import Model

# arch → every so many layers one attends to everything, where the file does not say; 1 where llama.cpp ignores the
# window.  Only architectures of no family here: families know their own (`models.arch.window_period`).
PERIODS = {
    "gemma3n": 5, "gpt-oss": 2, "cohere2": 4, "llama4": 4, "exaone4": 4, "olmo2": 4, "smallthinker": 4, "plamo3": 8,
    "afmoe": 4, "qwen2moe": 1, "mistral3": 1,
}  # fmt: skip
RECURRENT = {"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"}  # nothing but recurrent layers
_LIMIT = 2**12  # layers; llama.cpp itself stops at 512


def shape_of(model: Model) -> tuple[Shape, list[str]]:
    """The shape, and notes on what the metadata leaves open.

    Raises SourceError naming a key that is missing or makes no sense.
    """
    reader = _Reader(model)
    return reader.read(), reader.notes


class _Reader:
    def __init__(self, model: Model) -> None:
        self.arch, self.origin = model.arch, model.origin
        self.values = {key: field.value for key, field in model.metadata.items()}
        self.shapes: Mapping[str, Sequence[int]] = {tensor.name: tensor.shape for tensor in model.tensors}
        self.notes: list[str] = []
        self.count = self.number("block_count", needed=True, most=_LIMIT)
        self.width = self.number("embedding_length", needed=True)

    def read(self) -> Shape:
        self.heads = self.per_layer("attention.head_count", needed=self.arch not in RECURRENT)
        self.kv_heads = self.per_layer("attention.head_count_kv", default=self.heads)
        biggest = max(self.heads, default=0)
        self.key = self.number("attention.key_length") or (self.width // biggest if biggest else 0)
        self.value = self.number("attention.value_length") or (self.width // biggest if biggest else 0)
        windows = self.windows()
        shared = self.number("attention.shared_kv_layers")
        # Leading layers have a cache of their own; for Gemma 3n the number is llama.cpp's.
        kept = 20 if self.arch == "gemma3n" and not shared else self.layers - shared
        layers = tuple(self.layer(i, windows[i], i < kept) for i in range(self.layers))
        experts = self.number("expert_used_count") if self.number("expert_count") else 0
        return Shape(
            layers=layers,
            width=self.width,
            inner=self.inner(experts),
            query=biggest * self.key,
            head=self.key if any(layer.keys for layer in layers) else 0,
            vocabulary=self.vocabulary(),
            experts_used=experts,
            latent=biggest * self.number("attention.key_length_mla"),
            scan=self.number("ssm.inner_size"),
            merges=self.values.get("tokenizer.ggml.model", "gpt2") == "gpt2",
        )

    @property
    def layers(self) -> int:
        """Without the extra ones that only predict further tokens: llama.cpp does not run them by default."""
        return max(1, self.count - self.number("nextn_predict_layers"))

    def layer(self, index: int, window: int, keeps: bool) -> Layer:
        state = self.state(index)
        heads = self.kv_heads[index] if keeps and self.arch not in RECURRENT else 0
        if state and self.linear_interval():
            heads = 0
        if self.number("attention.key_length_mla"):
            return Layer(keys=heads * self.key, state=state)
        key, value = self.key, self.value
        if window:
            key = self.number("attention.key_length_swa") or key
            value = self.number("attention.value_length_swa") or value
        return Layer(heads * key, heads * value, window if heads else 0, state)

    def windows(self) -> list[int]:
        window = self.number("attention.sliding_window")
        known = window_period(self.arch) or PERIODS.get(self.arch)
        if not window or known == 1:
            return [0] * self.count
        pattern = self.value_of("attention.sliding_window_pattern")
        if hasattr(pattern, "__len__") and len(pattern):
            return [window * bool(pattern[i % len(pattern)]) for i in range(self.count)]
        period = int(pattern) if isinstance(pattern, (int, float)) else known
        if period is None:
            self.notes.append(
                f"attention looks back {window} tokens in some layers of {self.arch}, but which is not known "
                "here: all are counted with the whole context"
            )
            return [0] * self.count
        return [window * (period == 0 or i % period < period - 1) for i in range(self.count)]

    def state(self, index: int) -> int:
        """Float32 numbers per slot that layer `index` carries along."""
        if not self.is_recurrent(index):
            return 0
        if self.number("wkv.head_size"):
            shifts = self.number("token_shift_count") or 2
            return self.width * (shifts + self.number("wkv.head_size"))
        if self.number("shortconv.l_cache"):
            return self.width * (self.number("shortconv.l_cache") - 1)
        inner, size = self.number("ssm.inner_size"), self.number("ssm.state_size")
        if not inner:
            note = f"layer {index} of {self.arch} keeps no cache that is known here: counted as nothing"
            self.notes += [note] if note not in self.notes else []
            return 0
        tail = max(0, self.number("ssm.conv_kernel") - 1)
        return tail * (inner + 2 * self.number("ssm.group_count") * size) + size * inner

    def is_recurrent(self, index: int) -> bool:
        if self.arch in RECURRENT or self.arch == "falcon-h1":
            return True
        if self.linear_interval():
            return (index + 1) % self.linear_interval() != 0
        # Layers without heads skip attention in deci, and keep nothing; in Nemotron-H they may be plain feed-forward.
        if self.kv_heads[index] or self.arch == "deci":
            return False
        return self.arch not in ("nemotron_h", "nemotron_h_moe") or not self.per_layer("feed_forward_length")[index]

    def linear_interval(self) -> int:
        """Families that mix linear attention in: every so many layers one attends in full."""
        if not self.number("ssm.inner_size") or not self.arch.startswith(("qwen3next", "qwen35")):
            return 0
        return self.number("full_attention_interval") or 4

    def inner(self, experts_used: int) -> int:
        """Numbers per token inside the widest feed-forward layer, those of all chosen experts together."""
        dense = max(self.per_layer("feed_forward_length"), default=0)
        if not experts_used:
            return dense
        expert = self.number("expert_feed_forward_length") or dense
        leading = dense if self.number("leading_dense_block_count") else 0
        return max(experts_used * expert, leading)

    def vocabulary(self) -> int:
        for name in (EMBEDDING, OUTPUT):
            if self.shapes.get(name):
                return int(self.shapes[name][0])
        tokens = self.values.get("tokenizer.ggml.tokens", ())
        return self.number("vocab_size") or len(tokens)

    def value_of(self, key: str) -> Any:
        return self.values.get(f"{self.arch}.{key}")

    def number(self, key: str, needed: bool = False, most: int = 2**40) -> int:
        """A whole number of the metadata, 0 where there is none."""
        value = self.value_of(key)
        if value is None and not needed:
            return 0
        if isinstance(value, bool) or not isinstance(value, int) or not needed <= value <= most:
            raise self.wrong(key, value)
        return value

    def per_layer(self, key: str, default: list[int] | None = None, needed: bool = False) -> list[int]:
        """A number for each layer, whether the file has one for all or a list."""
        value = self.value_of(key)
        if value is None and needed:
            raise self.wrong(key, value)
        if value is None:
            return default if default is not None else [0] * self.count
        if not hasattr(value, "__len__"):
            return [self.number(key)] * self.count
        numbers = [int(number) for number in value]
        if len(numbers) < self.count or not all(0 <= number < 2**31 for number in numbers):
            raise self.wrong(key, numbers[:4])
        return numbers[: self.count]

    def wrong(self, key: str, value: Any) -> SourceError:
        reason = "is missing: without it the memory cannot be known" if value is None else f"is {value!r}"
        thing, way_out = f"{self.origin}, {self.arch}.{key}", "Take the model from its authors, or a GGUF of it."
        return SourceError(thing, reason, way_out)
