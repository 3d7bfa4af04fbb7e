"""A LoRA adapter laid over a served file: one that changes a single successor of a model of known words."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from llama_util import SPECIAL, TinyLlama, vocabulary
from serving_util import ask

import dither

pytestmark = pytest.mark.slow  # real servers and engines: `make test` runs it, `make check` does not


def write_adapter(path: Path, model: TinyLlama, after: int, successor: int) -> Path:
    """ΔW = B·A on the output matrix: the embedding of `after` then points at `successor`."""
    axis = int(model.weights["token_embd.weight"][after].argmax())
    a, b = np.zeros((1, model.D), np.float32), np.zeros((len(vocabulary()), 1), np.float32)
    a[0, axis], b[successor, 0] = 1, 50
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 1.0)
    writer.add_tensor("output.weight.lora_a", a)
    writer.add_tensor("output.weight.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_adapter_changes_what_is_said(tmp_path: Path) -> None:
    newline, a, d = (len(SPECIAL) + ord(letter) for letter in "\nad")
    model = TinyLlama(context=512).parrot(newline, "abc", end=a)
    file = model.write(tmp_path / "model.gguf")
    adapter = write_adapter(tmp_path / "adapter.gguf", model, a, d)
    body = {"prompt": "\n", "max_tokens": 2, "temperature": 0}
    for loras, said in (((), "ab"), ((adapter,), "ad")):
        with dither.serve(file, loras=loras, context=256, slots=1, threads=1) as server:
            assert ask(server.url, "/v1/completions", body).json()["choices"][0]["text"] == said
