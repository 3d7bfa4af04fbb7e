"""Handing over: parts that llama.cpp loads, LM Studio's folders, an upload to a hub that is local."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from llama_util import TinyLlama
from stub_hub import StubHub

import dither
from dither.containers.split import plan_parts, split
from dither.errors import DitherError, OutputError, UsageError

LIMIT = 128 * 1024


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return TinyLlama(layers=3).write(folder / "tiny.gguf")


def tensors(path: Path) -> dict[str, tuple[tuple[int, ...], bytes]]:
    return {t.name: (tuple(t.shape), t.data.tobytes()) for t in gguf.GGUFReader(str(path)).tensors}


def test_parts_hold_every_tensor_whole_and_the_keys_of_llama_cpp(model: Path, tmp_path: Path) -> None:
    parts = split(model, tmp_path, LIMIT)
    count = len(parts)
    assert count > 2 and [p.name for p in parts] == [
        f"tiny-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)
    ]
    found: dict[str, tuple[tuple[int, ...], bytes]] = {}
    for number, part in enumerate(parts):
        assert part.stat().st_size <= LIMIT
        reader = gguf.GGUFReader(str(part))
        keys = {key: reader.fields[key] for key in reader.fields if key.startswith("split.")}
        values = {key: int(field.parts[-1][0]) for key, field in keys.items()}
        whole = tensors(model)
        assert values == {"split.no": number, "split.count": count, "split.tensors.count": len(whole)}
        kinds = {key: field.types[0].name for key, field in keys.items()}
        assert kinds == {"split.no": "UINT16", "split.count": "UINT16", "split.tensors.count": "INT32"}
        assert ("general.architecture" in reader.fields) == (number == 0)
        found |= tensors(part)
    assert found == whole
    assert list(found) == list(whole)  # in the order that they had


def test_llama_cpp_computes_the_same_from_the_parts(model: Path, tmp_path: Path) -> None:
    from dither.engines.llamacpp import LlamaCpp

    first = split(model, tmp_path, LIMIT)[0]
    prompt = [9, 40, 77, 100]
    with LlamaCpp(model, threads=1) as whole:
        expected = whole.next_token_probabilities(prompt)
    with LlamaCpp(first, threads=1) as parts:
        assert np.array_equal(parts.next_token_probabilities(prompt), expected)


def test_a_split_that_is_repeated_writes_only_what_is_missing(model: Path, tmp_path: Path) -> None:
    parts = split(model, tmp_path, LIMIT)
    written = [part.stat().st_mtime_ns for part in parts]
    content = parts[1].read_bytes()
    parts[1].unlink()
    split(model, tmp_path, LIMIT)
    assert [p.stat().st_mtime_ns == w for p, w in zip(parts, written, strict=True)].count(False) == 1
    assert parts[1].read_bytes() == content


def test_a_limit_below_one_tensor_is_refused(model: Path, tmp_path: Path) -> None:
    largest = max(len(data) for _, data in tensors(model).values())
    with pytest.raises(UsageError, match="header alone take"):
        plan_parts(model, tmp_path, largest)


def test_parts_are_not_split_again(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one part of a model already"):
        split(split(model, tmp_path, LIMIT)[0], tmp_path / "more", LIMIT)


def test_lm_studio_finds_publisher_model_file(model: Path, tmp_path: Path) -> None:
    done = dither.export(model, "lmstudio", tmp_path, publisher="Jane Doe/x")
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.gguf")] == ["Jane-Doe-x/tiny-GGUF/tiny.gguf"]
    assert done.how == "linked" and (Path(done.place) / "tiny.gguf").samefile(model)


def test_a_copy_is_made_where_no_link_can_be(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    for how in ("copied", "kept"):
        done = dither.export(model, "lmstudio", tmp_path)
        assert done.how == how
    copy = Path(done.place) / "tiny.gguf"
    assert copy.read_bytes() == model.read_bytes() and not copy.samefile(model)
    copy.write_bytes(b"other")
    with pytest.raises(OutputError, match="another file"):
        dither.export(model, "lmstudio", tmp_path)


def test_a_folder_and_an_unknown_place_are_refused(checkpoint: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(DitherError, match="Make a GGUF"):
        dither.export(checkpoint, "ollama", tmp_path)
    with pytest.raises(UsageError, match="Choose ollama"):
        dither.export(model, "floppy", tmp_path)
    with pytest.raises(UsageError, match="OWNER/NAME"):
        dither.export(model, "hf", "../../etc")


def hub_command(model: Path, hub: StubHub, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": "hf_test",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HOME": str(model.parent / "home"),
    }
    command = [sys.executable, "-m", "dither", "export", str(model), "--hf", "me/model", "--shard", "1MiB"]
    return subprocess.run(
        [*command, *options, "--json"], env=env | environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Above a MiB, with a proof beside it."""
    path = TinyLlama(layers=8, F=256).write(tmp_path_factory.mktemp("large") / "large.gguf")
    path.with_name("large.gguf.measure.json").write_text('{"schema_version": 1}')
    return path


@pytest.mark.slow
def test_nothing_is_sent_unless_asked_for(large: Path) -> None:
    with StubHub() as hub:
        dry = hub_command(large, hub)
        offline = hub_command(large, hub, "--yes", HF_HUB_OFFLINE="1")
        assert (hub.requests, hub.puts) == (0, 0)
    assert dry.returncode == 0 and json.loads(dry.stdout)["sent"] is False
    assert offline.returncode == 2 and "HF_HUB_OFFLINE" in json.loads(offline.stdout)["error"]["thing"]
    assert not large.with_name("large.gguf.hub").exists()


@pytest.mark.slow
def test_an_upload_that_broke_off_goes_on_and_arrives_whole(large: Path, tmp_path: Path) -> None:
    with StubHub(lose=1) as hub:
        broken = hub_command(large, hub, "--yes", "--private")
        assert broken.returncode == 1, broken.stdout + broken.stderr
        assert "goes on" in json.loads(broken.stdout)["error"]["way_out"]
        sent = hub_command(large, hub, "--yes", "--private")
        assert sent.returncode == 0, sent.stdout + sent.stderr
    document = json.loads(sent.stdout)
    assert document["sent"] is True and {n: len(b) for n, b in hub.files.items()} == document["files"]
    assert hub.created[0]["visibility"] == "private" and hub.tokens == {"Bearer hf_test"}
    assert hub.puts == 1 + len(hub.objects)  # one was lost, none was sent twice
    for name, data in hub.files.items():
        (tmp_path / name).write_bytes(data)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 1
    joined = {name: tensor for part in parts for name, tensor in tensors(part).items()}
    assert joined == tensors(large)
    card = hub.files["README.md"].decode()
    assert card.startswith("---\n") and 'tags: ["gguf"' in card and "| architecture | llama |" in card
    assert "large.gguf.measure.json" in hub.files
