"""Small real checkpoints, made here: random weights on disk in Hugging Face's layout.

Legend: V vocabulary, H hidden width, F feed-forward width.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

# The same examples in every run: a failure is a change's doing, not luck's.
hypothesis.settings.register_profile("steady", derandomize=True, deadline=None)
hypothesis.settings.load_profile("steady")


def on_cores_of_its_own() -> None:
    """Of several workers each has its cores: threads that wait by spinning would take each other's time."""
    worker, count = (os.environ.get(f"PYTEST_XDIST_WORKER{end}", "") for end in ("", "_COUNT"))
    if worker.startswith("gw") and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[int(worker[2:]) % len(cores) :: int(count)])


on_cores_of_its_own()  # before anything counts them

BUNDLED = Path(str(files("dither") / "demo_model"))
FEW_TYPES = ["Q2_K", "Q4_K", "Q6_K", "Q8_0"]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums of torch in one order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def wide_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes in the type it is asked for: where a processor has AVX-512's BF16 it packs weights anew on their
    first use and multiplies in bfloat16, whose rounding is a hundred times what a test of decoding looks for."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of many lengths, so that most sequences carry padding."""
    from families_util import TEXT

    path = tmp_path_factory.mktemp("data") / "records.jsonl"
    pieces = [TEXT[at : at + 15 + 19 * (at % 7)] for at in range(0, 900, 40)]
    path.write_text("\n".join(json.dumps({"text": piece}) for piece in pieces))
    return path


SENTENCES = [
    "The sea was quiet, and the old man slept in the boat.",
    "She opened the letter twice before she understood it.",
    "In 1879 there were 42 houses in the village; today there are 7.",
    "“Come back,” he said, “before the winter does.”",
]


def write_checkpoint(
    folder: Path, *, hidden: int = 256, ffn: int = 512, layers: int = 2, seed: int = 0, tied: bool = False
) -> Path:
    """A random Llama with grouped-query attention, F32 safetensors, and a byte-level BPE tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(folder)
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": normal(vocabulary, hidden),
        "model.norm.weight": np.ones(hidden, np.float32),
    }
    if not tied:
        tensors["lm_head.weight"] = normal(vocabulary, hidden)
    for i in range(layers):
        block = f"model.layers.{i}."
        for name, rows, columns in (
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", hidden // 2, hidden),
            ("self_attn.v_proj", hidden // 2, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", ffn, hidden),
            ("mlp.up_proj", ffn, hidden),
            ("mlp.down_proj", hidden, ffn),
        ):
            tensors[f"{block}{name}.weight"] = normal(rows, columns)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{block}{norm}.weight"] = np.ones(hidden, np.float32)
    save_file(tensors, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_tokenizer(folder: Path) -> int:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "add_bos_token": False})
    )
    return tokenizer.get_vocab_size()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def odd_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 320: no multiple of 256, so K-quants fall back."""
    return write_checkpoint(tmp_path_factory.mktemp("models") / "odd-llama", hidden=320, ffn=512)


@pytest.fixture(scope="session")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model's evidence of few tokens, with the costs of `FEW_TYPES`; not to be spoilt."""
    import dither

    folder = tmp_path_factory.mktemp("learnt") / "evidence"
    dither.calibrate(BUNDLED, tokens=2048, context=128, out=folder, seed=1)
    dither.plan(BUNDLED, bpw=4, evidence=folder, solver="nearest", types=FEW_TYPES)
    return folder


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """A folder of quantized files with measurements, the original in the folder above; not to be spoilt."""
    from shelf_util import fill

    return fill(tmp_path_factory.mktemp("shelf"), checkpoint)


@pytest.fixture
def own_evidence(learnt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(learnt, tmp_path_factory.mktemp("own") / "evidence"))
