"""A hub id is judged by its headers: a hub on the loopback interface counts every byte it gives out."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from range_hub import RangeHub, range_hub
from safetensors.numpy import load_file, save_file
from sources_util import folder_bytes, run_python

import dither

REPO = "someone/a-model"
CODE = """
import json, sys, dither
from dither.errors import DitherError
try:
    print(json.dumps(dither.fit(%r, memory="8GiB", vram=0).to_json()))
except DitherError as error:
    print(json.dumps({"error": [type(error).__name__, str(error)]}))
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bandwidth is measured once for all tests of the session, outside the user's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def judged(hub: RangeHub, tmp_path: Path, model: str = REPO, **environment: str) -> dict[str, Any]:
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")} | environment
    answer: dict[str, Any] = json.loads(run_python(CODE % model, **settings))
    return answer


def sharded(checkpoint: Path, folder: Path) -> dict[str, bytes]:
    """The checkpoint in two shards with an index, tokenizer and a readme beside it."""
    folder.mkdir()
    tensors = load_file(checkpoint / "model.safetensors")
    names = sorted(tensors)
    parts = (names[: len(names) // 2], names[len(names) // 2 :])
    index = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((checkpoint / name).read_bytes())
    (folder / "README.md").write_text("read me")
    return folder_bytes(folder)


def header_bytes(data: bytes) -> int:
    return 8 + int(struct.unpack_from("<Q", data)[0])


def comparable(document: dict[str, Any]) -> list[tuple[Any, ...]]:
    keys = ("type", "weights_bytes", "cache_bytes", "compute_bytes", "overhead_bytes")
    return [tuple(row[key] for key in keys) for row in document["candidates"]]


def test_a_sharded_checkpoint_costs_its_headers(checkpoint: Path, tmp_path: Path) -> None:
    files = sharded(checkpoint, tmp_path / "sharded")
    local = dither.fit(tmp_path / "sharded", memory="8GiB", vram=0).to_json()
    with range_hub(REPO, files) as hub:
        found = judged(hub, tmp_path)
    assert comparable(found) == comparable(local)
    shards = [data for name, data in files.items() if name.endswith(".safetensors")]
    texts = len(files["config.json"]) + len(files["model.safetensors.index.json"])
    least = texts + sum(map(header_bytes, shards))
    assert least <= hub.sent <= texts + sum(max(8192, header_bytes(data)) for data in shards)
    assert hub.sent < sum(map(len, shards)) / 20
    assert found["bytes_read"] == hub.sent
    assert hub.fetched == {name for name in files if name.endswith(("safetensors", "index.json"))} | {"config.json"}


def test_a_gguf_costs_its_header(tmp_path: Path) -> None:
    file = tmp_path / "demo-Q8_0.gguf"
    demo = Path(dither.__file__).parent / "demo_model"
    dither.quantize(demo, "Q8_0", file)
    local = dither.fit(file, memory="8GiB", vram=0).to_json()
    with range_hub(REPO, {"demo-Q8_0.gguf": file.read_bytes(), "README.md": b""}) as hub:
        found = judged(hub, tmp_path)
    assert comparable(found) == comparable(local)
    assert found["chosen"] == "Q8_0" and found["candidates"][0]["file"] == REPO
    assert hub.sent <= 256 * 1024 < file.stat().st_size / 10


def test_a_header_longer_than_the_first_piece_is_read_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "long.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    for key, value in (("block_count", 2), ("embedding_length", 64), ("attention.head_count", 2)):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_string("padding.text", "x" * 300_000)
    writer.add_tensor("token_embd.weight", np.zeros((8192, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with range_hub(REPO, {"long.gguf": file.read_bytes()}) as hub:
        found = judged(hub, tmp_path)
    assert found["parameters"] == 8192 * 64
    assert 300_000 < hub.sent <= 512 * 1024


def test_a_server_that_ignores_ranges_is_read_no_further(checkpoint: Path, tmp_path: Path) -> None:
    files = folder_bytes(checkpoint)
    with range_hub(REPO, files) as hub:
        hub.ranges = False
        found = judged(hub, tmp_path)
    assert found["fits"] and found["bytes_read"] < len(files["model.safetensors"]) / 10


def test_offline_asks_nobody(checkpoint: Path, tmp_path: Path) -> None:
    with range_hub(REPO, folder_bytes(checkpoint)) as hub:
        found = judged(hub, tmp_path, HF_HUB_OFFLINE="1")
        assert hub.requests == []
    assert found["error"][0] == "SourceError" and "HF_HUB_OFFLINE" in found["error"][1]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: struct.pack("<Q", 2**62) + data[8:], "promises a header of"),
        (lambda data: data[:8] + b"x" + data[9:], "does not begin with"),
        (lambda data: data[:5], "too few"),
    ],
)
def test_hostile_headers_are_refused_before_anything_is_allocated(
    checkpoint: Path, tmp_path: Path, damage: Any, says: str
) -> None:
    files = folder_bytes(checkpoint)
    files["model.safetensors"] = damage(files["model.safetensors"])
    with range_hub(REPO, files) as hub:
        found = judged(hub, tmp_path)
        assert hub.sent < 100_000
    assert found["error"][0] == "FormatError" and says in found["error"][1]


def test_a_claimed_size_that_no_file_has_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    with range_hub(REPO, folder_bytes(checkpoint)) as hub:
        hub.claimed["model.safetensors"] = 2**63 - 1
        found = judged(hub, tmp_path)
    assert found["error"][0] == "SourceError" and "claims" in found["error"][1]


def test_a_repository_that_is_not_there_is_named(tmp_path: Path) -> None:
    with range_hub(REPO, {}) as hub:
        found = judged(hub, tmp_path, "someone/else")
    assert found["error"][0] == "SourceError" and "someone/else" in found["error"][1]
