"""What a path may be that is no model's plain file or folder, and what is made of it.

References: the layout of huggingface_hub's cache as that library makes it, general.type as llama.cpp's
converters write it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

import dither
from dither.containers.journal import unfinished
from dither.errors import SourceError, UsageError
from dither.models.hub.fetch import HubId, choose
from dither.models.source import open_headers, open_model
from dither.quantizing.paths import file_stem

ONES = {"blk.0.ffn_up.weight": np.ones((4, 32), np.float32)}
BLOB = "sha256-" + "6a07" * 16


def write(path: Path, arch: str = "llama", kind: str = "model", name: str = "", tensors: object = None) -> Path:
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_type(kind)
    if name:
        writer.add_name(name)
    for tensor, values in (ONES if tensors is None else tensors).items():  # type: ignore[attr-defined]
        writer.add_tensor(tensor, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("arch", "kind", "said"),
    [
        ("llama", "adapter", "is a LoRA adapter.*llama-export-lora"),
        ("clip", "mmproj", r"\(mmproj\).*--mmproj"),
        ("clip", "model", r"\(mmproj\).*--mmproj"),  # as files before general.type "mmproj" have it
        ("controlvector", "model", "is a control vector"),
    ],
)
def test_ggufs_that_are_no_models(tmp_path: Path, arch: str, kind: str, said: str) -> None:
    with pytest.raises(SourceError, match=said):
        open_model(write(tmp_path / "m.gguf", arch, kind))


def test_a_vocabulary_alone_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    path, made = write(tmp_path / "vocab.gguf", tensors={}), tmp_path / "made.gguf"
    with pytest.raises(SourceError, match=r"vocab\.gguf: holds a vocabulary and no tensors.*weights"):
        dither.quantize(path, "Q4_0", made)
    assert not made.exists() and not any(left.exists() for left in unfinished(made))


@pytest.mark.parametrize(("content", "said"), [(b"tjgg" + bytes(9), "legacy ggml"), (b"\x80\x02}q", "as pickle")])
def test_a_bin_is_a_pickle_only_where_it_is_one(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "m.bin").write_bytes(content)
    with pytest.raises(SourceError, match=said):
        open_model(tmp_path / "m.bin")


def test_files_of_a_model_point_to_their_folder(checkpoint: Path) -> None:
    with pytest.raises(SourceError, match=f"Name the folder: {checkpoint}"):
        open_model(checkpoint / "tokenizer.json")


# ---------------------------------------------------------------------------------------- the hub's cache


@pytest.fixture
def cached(checkpoint: Path, tmp_path: Path) -> Path:
    """A repository as huggingface_hub keeps it: files in blobs, a snapshot of links to them, refs."""
    folder, commit = tmp_path / "models--acme--tiny-3b", "a1" * 20
    for part in ("blobs", "refs", f"snapshots/{commit}"):
        (folder / part).mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    for index, file in enumerate(checkpoint.iterdir()):
        if file.is_file():
            shutil.copy(file, folder / "blobs" / f"{index:040x}")
            (folder / "snapshots" / commit / file.name).symlink_to(Path("../../blobs") / f"{index:040x}")
    return folder


def test_a_repository_of_the_cache_is_its_snapshot(cached: Path, checkpoint: Path) -> None:
    model = open_model(cached)
    assert {tensor.name for tensor in model.tensors} == {tensor.name for tensor in open_model(checkpoint).tensors}
    assert any("snapshot a1a1a1a" in note for note in model.notes)
    assert file_stem(model) == file_stem(open_model(cached / "snapshots" / ("a1" * 20))) == "tiny-3b"
    with open_headers(str(cached)) as (outline, _, _):
        assert len(outline.tensors) == len(model.tensors)


def test_a_cache_with_several_snapshots_or_none(cached: Path) -> None:
    (cached / "snapshots" / ("b2" * 20)).mkdir()
    assert open_model(cached).arch == "llama"  # main says which
    (cached / "refs" / "main").unlink()
    with pytest.raises(UsageError, match=r"holds 2 snapshots of acme/tiny-3b.*a1a1.*b2b2"):
        open_model(cached)
    shutil.rmtree(cached / "snapshots")
    (cached / "snapshots").mkdir()
    with pytest.raises(SourceError, match=r"holds no snapshot of acme/tiny-3b.*naming the repository: acme/tiny-3b"):
        open_model(cached)


def test_a_folder_of_models_lists_them(cached: Path) -> None:
    with pytest.raises(SourceError, match=r"is no model itself, but 1 folder in it may be.*acme/tiny-3b"):
        open_model(cached.parent)


# ------------------------------------------------------------------------------------------ names and choices


def test_a_blob_is_called_by_the_name_in_it(tmp_path: Path) -> None:
    named = open_model(write(tmp_path / BLOB, name="Llama 3.1 8B/Instruct Q4_0"))
    assert file_stem(named) == "Llama-3.1-8B-Instruct"
    other = "sha256-" + "ab12" * 16
    nameless = open_model(write(tmp_path / other))
    assert file_stem(nameless) == nameless.name == other
    assert any("-o gives a name" in note for note in nameless.notes)


def test_a_projector_beside_a_model_is_no_second_one(tmp_path: Path) -> None:
    write(tmp_path / "gemma-Q4_0.gguf", name="Gemma")
    write(tmp_path / "mmproj-gemma-F16.gguf", "clip", "mmproj")
    model = open_model(tmp_path)
    assert model.name == "Gemma" and any("mmproj-gemma-F16.gguf is beside" in note for note in model.notes)


def test_a_projector_on_the_hub_is_no_second_model_either() -> None:
    names = ["gemma-Q4_0.gguf", "mmproj-gemma-F16.gguf", "README.md"]
    assert choose(names, HubId("org/name")) == (["gemma-Q4_0.gguf"], "gemma-Q4_0.gguf")
    assert choose(names[1:], HubId("org/name"))[1] == "mmproj-gemma-F16.gguf"  # which is then told for what it is


def test_a_folder_whose_weights_never_came(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(checkpoint / "config.json", tmp_path)
    with pytest.raises(SourceError, match=r"holds a config\.json and no weights.*never finished"):
        open_model(tmp_path)
