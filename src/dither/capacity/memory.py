"""What a model needs in memory while llama.cpp runs it: plain numbers in, bytes out.

    total = weights + cache + compute + overhead

Weights are the bytes of the tensors as stored, never parameters times bits.  The cache holds the past
of every slot, layer by layer: keys and values of each token that a layer can still look at, or a state of
fixed size where the layer is recurrent.  Compute is the buffer for one batch of activations, reserved
once for the worst case.  Overhead is what the runtime itself costs: its library, its vocabulary.

Sources.  Cache: `llama_kv_cache`, `llama_kv_cache_iswa` and `llama_memory_recurrent` of llama.cpp, and
`GGML_PAD(n_ctx, 256)` in `llama_context`; equal to the buffer sizes that llama.cpp logs, to the last
digit.  Compute: llama.cpp lets an allocator find it, so that no formula for it exists; ours was read off
the buffers it reserved (`sched_reserve`) for models of many shapes with flash attention on, which is
llama.cpp's default, and bounds them: exact where the feed-forward layer is at least 2.5 times as wide as
the model and for latent attention and Mamba, up to a fifth too large where that layer is narrower.
Overhead: measured; see the constants.

Everything here is a function of numbers, because other programs (a web page, say) compute the same:
`tests/capacity/golden.json` holds inputs and answers for all of them.

Units: bytes and tokens.  A *cell* is one token's place in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

CELLS = 256  # the cache's length is a multiple of it (llama.cpp's GGML_PAD)
BATCH = 512  # tokens computed at once (llama.cpp's n_ubatch)
KV_TYPES = {"f16": (1, 2), "q8_0": (32, 34), "q4_0": (32, 18)}  # ggml type → numbers a block, its bytes

# Resident size of the runtime with nothing in it, on Linux with xllamacpp 2026.10: 5 MiB of library code
# that is touched, 5 MiB of allocations by the server, its threads and the graph.
RUNTIME = 10 * 2**20
# A token costs its text and its places in two hash maps; in byte-level BPE there is about one merge per
# token beside it.  Slopes measured on vocabularies of 4 to 152 thousand tokens.
TOKEN, MERGE = 230, 200
# Allocated by the driver for a process that computes on a GPU, whatever the model: about half a gibibyte
# (an estimate: CUDA contexts take 0.3 to 0.6 GiB, by card and driver).
GPU_RUNTIME = 512 * 2**20
MARGIN_SHARE, MARGIN_MOST = 16, 2**30  # of each memory one part in so many stays free, at most these bytes


@dataclass(frozen=True)
class Layer:
    """What one layer keeps: `keys` and `values` are numbers per token over all its heads, `window` the
    tokens it looks back (0: all of them), `state` float32 numbers per slot in place of or beside a cache."""

    keys: int = 0
    values: int = 0
    window: int = 0
    state: int = 0


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that its memory depends on, beside its weights."""

    layers: tuple[Layer, ...]
    width: int  # of the residual stream
    inner: int  # widest feed-forward layer; with experts, all that one token passes through side by side
    query: int  # all query heads side by side, in the layer that has most
    head: int  # numbers of one key head; 0 where there is no attention
    vocabulary: int
    experts_used: int = 0  # per token; 0 in a dense model
    latent: int = 0  # with latent attention: all query heads side by side before they meet the cache
    scan: int = 0  # inner width of recurrent layers
    merges: bool = True  # the vocabulary is byte-level BPE


@dataclass(frozen=True)
class Memory:
    """Bytes by part."""

    weights: int
    cache: int
    compute: int
    overhead: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.compute + self.overhead


def needed(shape: Shape, weights: int, context: int, kv: str = "f16", slots: int = 1) -> Memory:
    """All of it, for `slots` conversations of `context` tokens each and a cache of type `kv`."""
    return Memory(
        weights, cache_bytes(shape, context, kv, slots), compute_bytes(shape, context, kv, slots), overhead_bytes(shape)
    )


def weights_budget(memory: int, shape: Shape, context: int, kv: str = "f16", slots: int = 1) -> int:
    """Bytes of tensor data that still fit into `memory` bytes beside everything else.

    What `needed` counts for the same context, cache and slots is taken off, and the margin that is left
    to everybody else.  0 where not even that fits.
    """
    return max(0, memory - margin(memory) - needed(shape, 0, context, kv, slots).total)


def memory_for(total: int) -> int:
    """The least memory of which, its margin left free, so many bytes are left."""
    return min(-(-total * MARGIN_SHARE // (MARGIN_SHARE - 1)), total + MARGIN_MOST)


def margin(memory: int) -> int:
    """Memory left free: a sixteenth, at most the 1 GiB per device that llama.cpp leaves by itself."""
    return min(MARGIN_MOST, memory // MARGIN_SHARE)


def padded(count: int, step: int) -> int:
    return -(-count // step) * step


def cells(context: int, window: int = 0, batch: int = BATCH) -> int:
    """Places one slot has in a layer's cache: its whole context, or the window and one batch."""
    whole = padded(context, CELLS)
    return whole if not window else padded(min(whole, window + batch), CELLS)


def batch_tokens(context: int, slots: int = 1) -> int:
    """Tokens computed at once: a batch is never longer than all the contexts together."""
    return min(BATCH, slots * padded(context, CELLS))


def row_bytes(numbers: int, kv: str) -> int:
    """Bytes of so many cached numbers; they come in whole blocks."""
    block, size = KV_TYPES[kv]
    return -(-numbers // block) * size


def cache_bytes(shape: Shape, context: int, kv: str = "f16", slots: int = 1) -> int:
    """Σ over layers of cells · (keys + values), and the states of recurrent layers, for every slot."""
    batch, total = batch_tokens(context, slots), 0
    for layer in shape.layers:
        row = row_bytes(layer.keys, kv) + row_bytes(layer.values, kv)
        total += cells(context, layer.window, batch) * row + 4 * layer.state
    return slots * total


def compute_bytes(shape: Shape, context: int, kv: str = "f16", slots: int = 1) -> int:
    """Activations and masks of one batch, logits and one layer's state per slot, the rotation of a
    quantized cache.

    The mask is float16, one number per token of the batch and cell of its slot; models with windows
    have a second one, and a second rotation, for the windowed layers.
    """
    batch = batch_tokens(context, slots)
    attending = [layer for layer in shape.layers if layer.keys]
    seen = {bool(layer.window): cells(context, layer.window, batch) for layer in attending}
    mask = 2 * sum(seen.values())
    logits = 4 * shape.vocabulary * slots
    states = 4 * slots * max((layer.state for layer in shape.layers), default=0)
    rotations = len(seen) * rotation_bytes(shape.head, kv)
    return batch * (4 * activations(shape) + 32 + mask) + logits + states + rotations


def activations(shape: Shape) -> int:
    """Float32 numbers per token alive at once where that is most: in the feed-forward layer, in
    attention, in a recurrence, or where the answers of all experts wait to be added."""
    key = max((layer.keys for layer in shape.layers), default=0)
    value = max((layer.values for layer in shape.layers), default=0)
    feed_forward = 5 * shape.width + 3 * shape.inner
    attention = shape.width + 3 * shape.query + key + value
    if shape.latent:
        attention = 5 * shape.width + 2 * shape.query + shape.latent
    recurrence = shape.width + 7 * shape.scan
    experts = 3 * shape.width + shape.inner + 2 * shape.experts_used * shape.width
    return max(feed_forward, attention, recurrence, experts if shape.experts_used else 0)


def rotation_bytes(head: int, kv: str) -> int:
    """Two float32 matrices that turn keys and values before they are quantized: one of the largest power
    of two that divides a head, one of 64; heads that are no multiple of 64 are not turned."""
    size = head & -head
    return 0 if kv == "f16" or size < 64 else 4 * (size * size + 64 * 64)


def overhead_bytes(shape: Shape) -> int:
    return RUNTIME + shape.vocabulary * (TOKEN + MERGE * shape.merges)
