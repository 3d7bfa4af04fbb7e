"""GGUF files and hub repositories as sources, and how a text becomes one of them.

References: the `gguf` package's writer and decoders, and huggingface_hub itself talking to a hub on
the loopback interface.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from sources_util import COMMIT, folder_bytes, local_hub, run_python

from dither.codecs import all_codecs
from dither.errors import FormatError, SourceError, UnsupportedError, UsageError
from dither.formats.ggml import GGML_TYPES
from dither.formats.gguf import read_header
from dither.models.gguf_source import open_gguf
from dither.models.hub.fetch import HubId, choose, parse_id
from dither.models.source import open_model


def write_gguf(path: Path, tensors: Mapping[str, tuple[np.ndarray, str]], **options: Any) -> Path:
    writer = gguf.GGUFWriter(str(path), "llama", **options)
    writer.add_name("Tiny")
    writer.add_array("tokenizer.ggml.tokens", ["a", "ü"])
    for name, (raw, kind) in tensors.items():
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_rows(kind: str, rows: int = 5) -> np.ndarray:
    """Stored bytes in any type: random weights by ggml's own encoder, or simply random bytes where
    that one builds its search tables for half a minute."""
    import libgguf

    rng = np.random.default_rng(3)
    columns = 2 * max(GGML_TYPES[kind].block, 32)
    w_RC = rng.standard_normal((rows, columns)).astype(np.float32)
    if kind in ("F32", "F16"):
        return w_RC.astype({"F32": np.float32, "F16": np.float16}[kind])
    qtype = gguf.GGMLQuantizationType[kind]
    if kind == "BF16":
        return gguf.quants.quantize(w_RC, qtype)
    if kind.startswith(("IQ1", "IQ2", "IQ3")):
        return rng.integers(0, 256, (rows, 2 * GGML_TYPES[kind].block_bytes), dtype=np.uint8)
    return libgguf.quantize_rows(w_RC, qtype, imatrix=np.ones(columns, np.float32)).view(np.uint8)


@pytest.mark.parametrize("kind", sorted(all_codecs()))
def test_every_codec_decodes_as_the_reference_does(tmp_path: Path, kind: str) -> None:
    raw = random_rows(kind)
    path = write_gguf(tmp_path / "m.gguf", {"w": (raw, kind)})
    with np.errstate(all="ignore"):  # random scales may be infinite
        expected_RC = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    tensor = open_gguf(path).tensors[0]
    assert (tensor.name, tensor.stored, tensor.shape) == ("w", kind, expected_RC.shape)
    assert tensor.stored_bytes == raw.nbytes
    assert np.array_equal(tensor.read(0, 5), expected_RC, equal_nan=True)
    assert np.array_equal(tensor.read(1, 3), expected_RC[1:3], equal_nan=True)
    assert tensor.read_raw is not None
    assert tensor.read_raw(1, 4).tobytes() == raw[1:4].tobytes()


def test_types_without_a_codec(tmp_path: Path) -> None:
    codecs = set(all_codecs())
    numbers = {"F64": np.float64, "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64}
    assert codecs | set(numbers) | {"Q8_1", "Q8_K"} == set(GGML_TYPES)
    w_RC = np.arange(-6, 6).reshape(3, 4)
    tensors = {kind: (w_RC.astype(dtype), kind) for kind, dtype in numbers.items()}
    tensors["Q8_K"] = (np.zeros((3, 292), np.uint8), "Q8_K")
    model = open_gguf(write_gguf(tmp_path / "m.gguf", tensors))
    for tensor in model.tensors:
        assert tensor.read_raw is None
        if tensor.stored in numbers:
            assert np.array_equal(tensor.read(1, 3), w_RC[1:3])
        else:
            with pytest.raises(UnsupportedError, match="tensor Q8_K: is stored as Q8_K"):
                tensor.read(0, 1)


def test_metadata_is_carried_over_untouched(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"w": (np.ones((2, 32), np.float32), "F32")})
    model = open_gguf(path)
    assert model.metadata == read_header(path).metadata
    assert (model.name, model.arch, model.kind, model.files) == ("Tiny", "llama", "gguf", (str(path),))
    assert model.parameters == 64
    overridden = open_model(path, pre="qwen2")
    assert overridden.metadata["tokenizer.ggml.pre"].value == "qwen2"
    assert "tokenizer.ggml.pre" not in model.metadata and any("qwen2" in note for note in overridden.notes)
    with pytest.raises(UsageError, match="no-such-pre"):
        open_model(path, pre="no-such-pre")


@pytest.fixture
def split(tmp_path: Path) -> tuple[list[Path], dict[str, np.ndarray]]:
    rng = np.random.default_rng(4)
    tensors = {f"blk.{i}.w": rng.standard_normal((3, 32)).astype(np.float32) for i in range(5)}
    stored = {name: (w_RC, "F32") for name, w_RC in tensors.items()}
    write_gguf(tmp_path / "big.gguf", stored, split_max_tensors=2)
    return sorted(tmp_path.glob("*.gguf")), tensors


def test_a_split_model_is_one_model(split: tuple[list[Path], dict[str, np.ndarray]]) -> None:
    paths, tensors = split
    assert len(paths) == 3
    models = [open_model(path) for path in paths] + [open_model(paths[0].parent)]
    for model in models:
        assert {tensor.name: None for tensor in model.tensors} == dict.fromkeys(tensors)
        for tensor in model.tensors:
            assert np.array_equal(tensor.read(0, 3), tensors[tensor.name])
        assert model.files == tuple(map(str, paths))
        assert not any(key.startswith("split.") for key in model.metadata)
        assert model.metadata["general.name"].value == "Tiny"
        assert model.fingerprint == models[0].fingerprint


def test_a_split_model_needs_all_its_parts(split: tuple[list[Path], Any], tmp_path: Path) -> None:
    paths = split[0]
    content = paths[1].read_bytes()
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(FormatError, match="is not part 2 of 3"):
        open_gguf(paths[0])
    paths[1].unlink()
    with pytest.raises(SourceError, match=r"big-00002-of-00003.gguf") as caught:
        open_gguf(paths[0])
    assert "1 is missing" in caught.value.reason
    paths[1].write_bytes(content)
    renamed = paths[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(SourceError, match="is part 1 of 3, but its name does not say so"):
        open_gguf(renamed)


def test_what_is_no_model(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "i.gguf"), "")
    writer.add_type("imatrix")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SourceError, match="is an importance matrix"):
        open_model(tmp_path / "i.gguf")
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(SourceError, match="neither GGUF nor safetensors"):
        open_model(tmp_path / "x.txt")


# ------------------------------------------------------------------------------- paths and names


def test_gguf_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"w": (np.ones((2, 32), np.float32), "F32")})
    assert open_model(str(path.rename(tmp_path / "blob"))).arch == "llama"


def test_a_folder_with_several_ggufs_needs_a_choice(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        write_gguf(tmp_path / name, {"w": (np.ones((2, 32), np.float32), "F32")})
    with pytest.raises(UsageError, match=r"holds 2 GGUF models.*a.gguf, b.gguf"):
        open_model(tmp_path)


def test_a_checkpoint_opens_as_a_model(checkpoint: Path) -> None:
    whole, single = open_model(checkpoint), open_model(checkpoint / "model.safetensors")
    assert whole.kind == "safetensors" and whole.arch == "llama"
    assert [tensor.name for tensor in single.tensors] == [tensor.name for tensor in whole.tensors]


def test_slips_never_reach_for_the_network(tmp_path: Path) -> None:
    code = f"""
import os, sys
os.chdir({str(tmp_path)!r}); os.mkdir("models")
from pathlib import Path
from dither.errors import SourceError
from dither.models.source import open_model
paths = "nothing ./a/b /a/b ~/a/b a/b/c models/tiny org/x.gguf a\\0b/c".split()
for source in (*paths, Path("org/name")):
    try:
        open_model(source)
    except SourceError as error:
        assert "no such file or folder" in str(error), error
    else:
        raise AssertionError(source)
print([name for name in ("huggingface_hub", "torch", "transformers", "socket") if name in sys.modules])
"""
    assert run_python(code).strip() == "[]"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("org/name", HubId("org/name")),
        ("hf://org/name", HubId("org/name")),
        ("org/name@v1.0", HubId("org/name", "v1.0")),
        ("org/name@refs/pr/1:sub/m.gguf", HubId("org/name", "refs/pr/1", "sub/m.gguf")),
        ("Qwen/Qwen2.5-0.5B:m.gguf", HubId("Qwen/Qwen2.5-0.5B", None, "m.gguf")),
        ("name", None),
        ("a/b/c", None),
        ("/a/b", None),
        ("../b", None),
        ("./b", None),
        ("a/..", None),
        ("C:\\b", None),
    ],
)
def test_names_of_the_hub(text: str, expected: HubId | None) -> None:
    assert parse_id(text) == expected


REPO = HubId("org/name")


def test_only_what_a_model_needs_is_fetched() -> None:
    listed = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "README.md",
        "model.safetensors.index.json",
        "consolidated.safetensors",
        "pytorch_model.bin",
        "modeling.py",
        "tokenizer.model",
        "tokenizer.json",
        "merges.txt",
        "chat_template.jinja",
        "onnx/model.safetensors",
        "additional_chat_templates/tool.jinja",
        "original/params.json",
        "../x.json",
        "a.gguf",
        "x.pt",
    ]
    wanted, chosen = choose(listed, REPO)
    assert chosen == ""
    assert set(wanted) == {
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
        "tokenizer.json",
        "merges.txt",
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
    }
    assert choose(listed, HubId("org/name", None, "a.gguf")) == (["a.gguf"], "a.gguf")
    parts = ["q/m-00001-of-00002.gguf", "q/m-00002-of-00002.gguf"]
    assert choose(["README.md", *parts], REPO) == (parts, parts[0])
    with pytest.raises(SourceError, match="pickle"):
        choose(["pytorch_model.bin", "config.json"], REPO)
    with pytest.raises(SourceError, match="neither safetensors nor GGUF"):
        choose(["README.md", "../../m.gguf", "/m.gguf"], REPO)


OPEN = """
from dither.errors import DitherError
from dither.models.source import open_model
try:
    model = open_model({source!r})
    print(model.origin, model.arch, model.name, len(model.tensors), list(model.notes), sep="|")
except DitherError as error:
    print(type(error).__name__, error, sep="|")
"""


def test_a_repository_is_fetched_once_and_read_offline(checkpoint: Path, tmp_path: Path) -> None:
    traps = {"pytorch_model.bin": b"x", "modeling.py": b"raise SystemExit(9)", "README.md": b"#"}
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    code = OPEN.format(source="org/tiny-hub")
    with local_hub("org/tiny-hub", folder_bytes(checkpoint) | traps) as hub:
        online = run_python(code, HF_ENDPOINT=hub.url, HF_TOKEN="hf_sesame", **home)
    origin, arch, name, count, notes = online.strip().split("|")
    assert (origin, arch, name) == ("org/tiny-hub", "llama", "tiny-hub")
    assert int(count) == len(open_model(checkpoint).tensors) and "reached" not in notes
    assert hub.fetched == {path.name for path in checkpoint.iterdir()}
    assert all("org/tiny-hub" in path for _, path, _ in hub.requests), "nothing else is asked of the hub"
    assert all(token == "Bearer hf_sesame" for _, _, token in hub.requests)

    assert run_python(code, HF_HUB_OFFLINE="1", **home) == online
    unreachable = run_python(code, HF_ENDPOINT=hub.url, **home)
    assert "could not be reached: an earlier download is used" in unreachable
    assert unreachable.split("|")[:4] == online.split("|")[:4]


def test_what_the_hub_cannot_give(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", {"w": (np.ones((2, 32), np.float32), "F32")})
    content = (tmp_path / "a.gguf").read_bytes()
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with local_hub("org/ggufs", {"a.gguf": content, "b.gguf": content + b"x"}) as hub:
        online = {"HF_ENDPOINT": hub.url, **home}
        several = run_python(OPEN.format(source="org/ggufs"), **online)
        assert several.startswith("UsageError|") and "org/ggufs:FILE of a.gguf, b.gguf" in several
        assert not hub.fetched
        assert run_python(OPEN.format(source="org/ggufs@v2:a.gguf"), **online).startswith(
            "org/ggufs@v2:a.gguf|llama|Tiny|1"
        )
        assert hub.fetched == {"a.gguf"}
        assert any(path.endswith("/v2") for _, path, _ in hub.requests)
        hub.gated = True
        gated = run_python(OPEN.format(source="org/ggufs:b.gguf"), **online)
        assert gated.startswith("SourceError|org/ggufs: is gated") and "HF_TOKEN" in gated
        absent = run_python(OPEN.format(source="org/absent"), **online)
        assert absent.startswith("SourceError|org/absent: is not on the hub") and "HF_TOKEN" in absent
    offline = {"HF_HUB_OFFLINE": "1", **home}
    missing = run_python(OPEN.format(source="org/never"), **offline)
    assert missing.startswith("SourceError|org/never: is not in the cache") and "Unset HF_HUB_OFFLINE" in missing
    partial = run_python(OPEN.format(source="org/ggufs@v2:b.gguf"), **offline)
    assert "in the cache holds no GGUF called b.gguf" in partial and "HF_HUB_OFFLINE" in partial
    snapshot = tmp_path / "home" / "hub" / "models--org--ggufs" / "snapshots" / COMMIT
    assert [path.name for path in snapshot.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize(("mode", "inner"), [(0o000, "m"), (0o444, "m"), (0o111, "m"), (0o000, "m/sub/x.gguf")])
def test_a_folder_that_may_not_be_read_says_so(mode: int, inner: str) -> None:
    """Not that it is empty, nor that it does not exist."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "m"
        (folder / "sub").mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        Path(made).chmod(0o755)
        folder.chmod(mode)
        user = os.geteuid()
        try:
            if user == 0:  # root may read everything
                os.seteuid(65534)
            with pytest.raises(SourceError, match=r"m.*cannot be read \(Permission denied\)"):
                open_model(Path(made) / inner)
        finally:
            os.seteuid(user)
            folder.chmod(0o755)
