"""What a model is called in its GGUF: a name for people, and a size such as 135M or 8x7B.

llama.cpp reads one thing into the name: in a model called "phi-3" or "phi3" white space after a
special token is swallowed, as Phi-3's tokenizer does, and four tokens must exist or it refuses to load.
The name is therefore held to what the tokenizer says, and a change of it is told.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from dither.formats.tensor_names import is_expert_stack
from dither.models.json_object import JsonObject
from dither.models.tokenizers.checkpoint_tokenizer import Tokenizer
from dither.types import Tensor

PHI_3 = re.compile(r"phi-?3", re.IGNORECASE)
PHI_3_TOKENS = {"</s>", "<unk>", "<s>", "<|endoftext|>"}


def model_name(folder: Path, config: JsonObject, tokenizer: Tokenizer) -> tuple[str, list[str]]:
    """A name from the hub's folder layout, config.json or the folder itself, and notes on changes."""
    name = plain_name(folder, config.text("_name_or_path") or "")
    swallows = tokenizer.swallows_space and set(tokenizer.tokens) >= PHI_3_TOKENS
    if swallows and not PHI_3.search(name):
        changed = f"{name} (phi-3)"
        return changed, [f"general.name is {changed!r}: llama.cpp strips space after special tokens by that name"]
    if not swallows and PHI_3.search(name):
        changed = PHI_3.sub("Phi 3", name)
        return changed, [f"general.name is {changed!r}: this tokenizer is not what llama.cpp expects of phi-3"]
    return name, []


def plain_name(folder: Path, recorded: str) -> str:
    """`models--org--name/snapshots/hash` is the hub's cache; elsewhere the folder's own name serves."""
    folder = folder.resolve()
    for part in reversed(folder.parts):
        if part.startswith("models--"):
            return part.split("--")[-1]
    if re.fullmatch(r"[0-9a-f]{40}|", folder.name) and recorded.strip("/"):
        return recorded.rstrip("/").rpartition("/")[2]
    return folder.name or "model"


def size_label(tensors: Iterable[Tensor]) -> str:
    """Parameters to two digits or more: 135M, 1.2B; with experts, 8x7B from one expert's share."""
    shared, expert, experts = 0, 0, 0
    for tensor in tensors:
        if is_expert_stack(tensor.name):
            experts = max(1, tensor.shape[0])
            expert += tensor.size // experts
        else:
            shared += tensor.size
    rounded = rounded_count(shared + expert)
    return f"{experts}x{rounded}" if experts else rounded


def rounded_count(count: int) -> str:
    units = (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3))
    unit, scale = next((pair for pair in units if count >= pair[1]), units[-1])
    number = count / scale
    return f"{number:.1f}{unit}" if number < 9.95 else f"{number:.0f}{unit}"
