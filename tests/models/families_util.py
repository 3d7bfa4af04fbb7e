"""Tiny models and tokenizers made on the spot: random weights from transformers, a GGUF of ours.

Legend: R rows, C columns, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from dither.engines.llamacpp import LlamaCpp
from dither.formats.gguf import lay_out
from dither.models.arch import convert
from dither.models.checkpoint import open_checkpoint
from dither.types import Model

TEXT = """
The harbour woke before the town did. By five o'clock the boats were out beyond the wall, and the gulls,
who'd been arguing since dawn, followed them; they're greedy birds. "We've 12 crates," said Ana, "or 120, if
the ice holds." I'd counted 1234 herring and 56789 shrimp. It wasn't luck: it's what you'll get in November.
    def price(crates):
        return crates * 17 + 3   # in cents

Tous les matins, à l'aube, les bateaux étaient déjà loin; le café coûtait 2,50 euros. Die Möwen schrien über
dem Hafen. Ёлка стоит в порту, и дети смеются. 船は朝早く港を出た。我们数了三百条鱼。
naïve façade — coöperate!
WHAT'S THIS? IT'S A TEST, ISN'T IT? HTTPServer getUserName snake_case_name CamelCase123 x=y+z; a[i]!=b[j]
\t\ttabs\there\n\n\nand   many    spaces     in a row.  Two. 3.14159 1,000,000 2024-11-05 +44 20 7946 0958
"""

NASTY = (
    "Hello world",
    " leading space and  two  spaces   three",
    "I'm sure they'll say we've DON'T I'LL He'd it's 'tis rock'n'roll",
    "1 12 123 1234 12345 1234567890 3.14 1,000 v2.0 50% 2nd",
    "line\nbreak\n\ntwo\r\nwindows\n\n\n three\n  indented\n\ttab\t\ttabs",
    "trailing spaces   ",
    "\n",
    "   \n  \n ",
    "price(crates) != a[i]+b*{c};//x --> <=> ### ... ?!?! $5 `q` ~/path_to/file.txt",
    "café naïve coöperate Ёлка стоит Ünïcödé ÀÉÎ",
    "我们数了三百条鱼。 港を出た。 ハーバー 한국어 텍스트",
    "emoji 🙂 👩‍🚀🚀 ❤️ mixed🙂text",
    "CamelCase123HTTPServer getUserName WHAT snake_case",
    "العربية ١٢٣ हिन्दी ไทย",
    "½ Ⅻ ² ① zero\u200bwidth nbsp\u00a0here",
)

Change = Callable[[Path], None]


def byte_level_tokenizer(
    pre: pre_tokenizers.PreTokenizer | None = None, *, size: int = 500, learned_under_it: bool = False
) -> Tokenizer:
    """A byte-level BPE tokenizer that merges whatever its pre-tokenizer leaves in one piece.

    Unless `learned_under_it`, merges are learnt without any pre-tokenizer, so that they lead across
    every boundary one could draw: a wrong one changes the tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    unsplit = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre if pre and learned_under_it else unsplit
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([*NASTY, *TEXT.split("\n")] * 3, trainer)
    tokenizer.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def split_chain(*regexes: str) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer most checkpoints have: isolating splits, then bytes."""
    splits = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in regexes]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def with_bos(tokenizer: Tokenizer, bos: str = "<s>") -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, **settings: Any) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Weights large enough that every part of the network shows in the result."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    offset = 0.0 if config.model_type.startswith("gemma") else 1.0  # Gemma stores norms less one
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(offset + 0.3 * noise)
            elif weight.dim() == 1:
                weight.copy_(0.5 * noise)
            elif "embed" in name:
                # as the output matrix too, the embedding must not make one token certain
                weight.copy_(noise * (1.5 / np.sqrt(config.hidden_size) if config.tie_word_embeddings else 0.8))
            else:
                weight.copy_(noise * 1.6 / np.sqrt(weight.shape[-1]))
    return model


def save_model(model: PreTrainedModel, folder: Path, tokenizer: Tokenizer | None = None) -> Path:
    model.save_pretrained(folder)
    save_tokenizer(tokenizer or byte_level_tokenizer(size=300), folder)
    return folder


def write_gguf(model: Model, path: Path, kind: str = "F32") -> Path:
    """All tensors as float32 or float16 (1-D ones always float32), rows read in uneven pieces."""
    kinds = ["F32" if len(tensor.shape) == 1 else kind for tensor in model.tensors]
    listed = [(tensor.name, tensor.shape, kind) for tensor, kind in zip(model.tensors, kinds, strict=True)]
    layout = lay_out(model.metadata, listed)
    with path.open("wb") as file:
        file.write(layout.header)
        file.truncate(layout.total)
        for tensor, offset, written in zip(model.tensors, layout.offsets, kinds, strict=True):
            file.seek(offset)
            for start in range(0, tensor.rows, 23):
                w_RC = tensor.read(start, min(start + 23, tensor.rows))
                file.write(w_RC.astype(np.float16 if written == "F16" else np.float32).tobytes())
    return path


def converted(folder: Path, kind: str = "F32") -> Path:
    return write_gguf(convert(open_checkpoint(folder)), folder / "model.gguf", kind)


def opened(path: Path, **settings: Any) -> LlamaCpp:
    """The file in llama.cpp.  It computes one token at once: a server closed before its loop has begun
    may wait for it forever, and tests that only tokenize would close it so soon."""
    llama = LlamaCpp(path, threads=1, **{"context": 256} | settings)
    list(llama.generate([0], max_tokens=1))
    return llama


def expected_probabilities(model: PreTrainedModel, prompt: Sequence[int]) -> npt.NDArray[np.float64]:
    with torch.no_grad():
        logits_V = model(torch.tensor([list(prompt)])).logits[0, -1]
    return torch.softmax(logits_V.double(), dim=-1).numpy()
