"""A family is one new file, also when it has rows, a pre-tokenizer, norms and a window of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conftest import write_checkpoint
from dither.capacity.shape import shape_of
from dither.formats.ggml import u32
from dither.models import arch
from dither.models.arch.written import written
from dither.models.checkpoint import open_checkpoint
from dither.models.source import open_model
from dither.system import discovery
from dither.transforms.wiring import strangers

FILE = '''
import numpy as np

from dither.models.arch.changes import Change, Reordered
from dither.models.arch.family import feeds, rules
from dither.models.arch.usual import DECODER, DENSE_FEEDS
from dither.models.tokenizers.pre import GPT2, Chain


class Decay(Change):
    """Stored as the logarithm of what is wanted."""

    new_numbers = True

    def read(self, sources, heads):
        return lambda start, stop: self.apply(sources[0].read(start, stop))

    def apply(self, w):
        return -np.exp(w)

    def undo(self, w):
        return np.log(-w)


class Interleaved(Reordered):
    """Even rows behind odd ones."""

    def view(self, parameter, heads):
        rows, *columns = parameter.shape
        return parameter.reshape(2, rows // 2, *columns).swapaxes(0, 1)


FAMILIES = (
    DECODER.variant(
        "Toy",
        "ToyForCausalLM",
        "toy",
        arch="toy",
        rules=DECODER.rules + rules(
            "model.layers.*.decay -> blk.*.ssm_a [decay]",
            "model.layers.*.mix.weight -> blk.*.attn_gate.weight [interleaved]",
        ),
        feeds=feeds(DENSE_FEEDS.replace("attn_v\\n", "attn_v attn_gate\\n", 1), "ssm_a ->"),
        changes={"decay": Decay(), "interleaved": Interleaved()},
        chains=(Chain("toy-pre", (GPT2,)),),
        window_period=3,
    ),
)
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The file in a folder of its own on the room's path."""
    (tmp_path / "families").mkdir()
    (tmp_path / "families" / "toy.py").write_text(FILE)
    monkeypatch.setattr(arch, "__path__", [*arch.__path__, str(tmp_path / "families")])
    caches = (discovery.modules, arch.families)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()
    sys.modules.pop("dither.models.arch.toy", None)


def test_a_family_with_everything_of_its_own_is_one_file(toy: None, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", hidden=64, ffn=64, layers=6)
    tensors = load_file(folder / "model.safetensors")
    generator = np.random.default_rng(0)
    mix_RC, decay_C = generator.standard_normal((8, 64), np.float32), generator.standard_normal(8, np.float32)
    for layer in range(6):
        tensors |= {f"model.layers.{layer}.mix.weight": mix_RC, f"model.layers.{layer}.decay": decay_C}
    save_file(tensors, folder / "model.safetensors")
    named = {"architectures": ["ToyForCausalLM"], "model_type": "toy"}
    config = json.loads((folder / "config.json").read_text()) | named
    (folder / "config.json").write_text(json.dumps(config))

    model = arch.convert(open_checkpoint(folder))
    by_name = {tensor.name: tensor for tensor in model.tensors}
    assert model.arch == "toy" and model.metadata["tokenizer.ggml.pre"].value == "toy-pre"
    assert open_model(folder, pre="toy-pre").notes
    gate, decay = by_name["blk.2.attn_gate.weight"], by_name["blk.2.ssm_a"]
    np.testing.assert_array_equal(gate.read(0, 8), mix_RC[[0, 4, 1, 5, 2, 6, 3, 7]])
    np.testing.assert_array_equal(gate.read(3, 5), mix_RC[[5, 2]])
    np.testing.assert_array_equal(decay.read(0, 1), -np.exp(decay_C)[None])

    entries = {entry.tensor: entry for entry in written(model)[1]}
    order = entries["blk.2.attn_gate.weight"].order()
    assert order is not None and entries["blk.2.attn_gate.weight"].name == "model.layers.2.mix.weight"
    np.testing.assert_array_equal(gate.read(0, 8)[order], mix_RC)
    np.testing.assert_allclose(entries["blk.2.ssm_a"].change.undo(decay.read(0, 1))[0], decay_C, rtol=1e-6)

    assert strangers(model, arch.feeds("toy")) == {}
    windowed = {**model.metadata, "toy.attention.sliding_window": u32(16)}
    shape, notes = shape_of(type(model)(**{**vars(model), "metadata": windowed}))
    assert [layer.window for layer in shape.layers] == [16, 16, 0, 16, 16, 0] and not notes
