"""Files that are not what their names say: each is named for what it is, with the way to the right one.

References: the specification of git-lfs for its pointers, ggml's own list of types for what it dropped, the
`gguf` package as writer.
"""

from __future__ import annotations

import gzip
import io
import pickle
import zipfile
from pathlib import Path

import gguf
import pytest
from gguf_bytes import F32, build

from dither.errors import FormatError, SourceError
from dither.formats import gguf as ours, safetensors
from dither.formats.ggml import GGML_BY_ID
from dither.system.files import read_bytes
from dither.system.json_text import parse_object

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 12345\n"


def _zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("model/data.pkl", b"x")
    return stream.getvalue()


MISTAKEN = {
    "is empty": b"",
    "`git lfs pull`": POINTER,
    "is a web page": b"\xef\xbb\xbf\n <!DOCTYPE html><html><body>404</body></html>",
    "saved under this name": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    "is a legacy ggml file": b"tjgg" + bytes(100),
    "PyTorch saves weights": pickle.dumps({"w": [1.0]}),
    "or a zip archive": _zip(),
    "is a compressed archive": gzip.compress(b"model"),
    "its download was begun and never finished": bytes(4096),
}


@pytest.mark.parametrize("said", MISTAKEN)
@pytest.mark.parametrize("parse", [ours.parse_header, safetensors.parse_header])
def test_a_file_of_another_kind_is_named(said: str, parse: object) -> None:
    with pytest.raises(FormatError) as caught:
        parse(MISTAKEN[said], "folder/model")  # type: ignore[operator]
    assert said in str(caught.value) and caught.value.thing == "folder/model" and caught.value.way_out


def test_a_pointer_stands_for_small_files_too(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(POINTER)
    with pytest.raises(FormatError, match=r"tokenizer\.json: is a pointer of git-lfs.*git lfs pull"):
        read_bytes(tmp_path / "tokenizer.json", 2**20, "")


@pytest.mark.parametrize(("raw", "said"), [(b"", "is empty"), (MISTAKEN["is a web page"], "is a web page")])
def test_json_that_is_none(raw: bytes, said: str) -> None:
    with pytest.raises(FormatError, match=said):
        parse_object(raw, "config.json")


def test_each_format_names_the_other() -> None:
    with pytest.raises(FormatError, match=r"is GGUF, though.*Rename it to \.gguf"):
        safetensors.parse_header(build(), "m.safetensors")
    header, _ = safetensors.lay_out([("w", "F32", (2,))], {})
    with pytest.raises(FormatError, match=r"is safetensors, though.*Rename it to \.safetensors"):
        ours.parse_header(header + bytes(8), "m.gguf")


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (4, r"Q4_2 \(type 4\), which llama\.cpp dropped\. Take the Q4_0 file"),
        (31, r"Q4_0_4_4 \(type 31\), which llama\.cpp dropped\. Take the Q4_0 file"),
        (38, r"IQ4_NL_8_8 \(type 38\), which llama\.cpp dropped\. Take the IQ4_NL file"),
        (36, r"I2_S \(type 36\).*bitnet\.cpp"),
        (139, r"IQ4_K \(type 139\), which only the fork ik_llama\.cpp has\. Run it with ik_llama\.cpp"),
        (212, r"type 212 with its rows interleaved, which only the fork ik_llama\.cpp has"),
        (9999, r"type 9999 of ggml, which is not known here"),
    ],
)
def test_a_foreign_type_is_named_with_who_reads_it(number: int, said: str) -> None:
    with pytest.raises(FormatError, match=rf"m\.gguf, tensor w: is stored as {said}"):
        ours.parse_header(build(tensors=[(b"w", (32,), number, 0)], data=bytes(128)), "m.gguf")


def test_no_type_that_ggml_has_is_called_foreign() -> None:
    from dither.formats.foreign_types import _BY_NUMBER

    ggmls = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
    for number, name in _BY_NUMBER.items():
        assert number not in GGML_BY_ID
        assert ggmls.get(number, name) == name


def test_old_and_turned_files_say_how_to_get_a_newer_one() -> None:
    weight = [(b"w", (32,), F32, 0)]
    with pytest.raises(SourceError, match=r"is GGUF version 1.*take a newer GGUF"):
        ours.parse_header(build(tensors=weight, version=1), "m.gguf")
    with pytest.raises(SourceError, match=r"is big-endian GGUF.*Convert the original model here"):
        ours.parse_header(build(tensors=weight, order=">"), "m.gguf")
