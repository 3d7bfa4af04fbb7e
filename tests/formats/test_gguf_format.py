"""The GGUF layout against the `gguf` package's reader and writer and llama.cpp, and what is refused."""

from __future__ import annotations

import importlib.util
import struct
import sys
from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import pytest
from gguf_bytes import ARRAY, F32, Q4_0, STRING, U32, array, build, text, valid

from dither.errors import DitherError, FormatError, OutputError, SourceError
from dither.formats.ggml import GGML_BY_ID, GGML_TYPES, Field, ValueType, array as array_field, string, u32
from dither.formats.gguf import lay_out, parse_header, read_header

EXTREMES = {
    ValueType.UINT8: 255,
    ValueType.INT8: -128,
    ValueType.UINT16: 65535,
    ValueType.INT16: -32768,
    ValueType.UINT32: 2**32 - 1,
    ValueType.INT32: -(2**31),
    ValueType.UINT64: 2**64 - 1,
    ValueType.INT64: -(2**63),
    ValueType.FLOAT32: -1.5,
    ValueType.FLOAT64: 0.1,
    ValueType.BOOL: True,
    ValueType.STRING: "naïve 🌊",
}


def test_types_are_those_of_the_reference() -> None:
    assert {kind.name: int(kind) for kind in ValueType} == {kind.name: int(kind) for kind in gguf.GGUFValueType}
    reference = {int(kind): (kind.name, block, size) for kind, (block, size) in gguf.GGML_QUANT_SIZES.items()}
    ours = {number: (kind.name, kind.block, kind.block_bytes) for number, kind in GGML_BY_ID.items()}
    assert ours.items() <= reference.items()


def written_by_reference(path: Path, tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]]) -> Path:
    writer = gguf.GGUFWriter(str(path), "llama")
    for kind, value in EXTREMES.items():
        writer.add_key_value(f"one.{kind.name}", value, gguf.GGUFValueType(kind))
        writer.add_key_value(f"many.{kind.name}", [value] * 3, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType(kind))
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def some_tensors() -> dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]]:
    rng = np.random.default_rng(0)
    w_RC = rng.standard_normal((3, 256)).astype(np.float32)
    found = {"odd": (w_RC[0, :7], gguf.GGMLQuantizationType.F32)}
    for kind in (gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q5_1):
        found[kind.name] = (gguf.quants.quantize(w_RC, kind), kind)
    found["experts"] = (rng.standard_normal((2, 3, 5)).astype(np.float32), gguf.GGMLQuantizationType.F32)
    return found


def test_reads_what_the_reference_writes(tmp_path: Path) -> None:
    tensors = some_tensors()
    path = written_by_reference(tmp_path / "model.gguf", tensors)
    header = read_header(path)
    for kind, value in EXTREMES.items():
        assert header.metadata[f"one.{kind.name}"] == Field(kind, value)
        many = header.metadata[f"many.{kind.name}"]
        assert (many.type, many.item, list(many.value)) == (ValueType.ARRAY, kind, [value] * 3)
    content = path.read_bytes()
    assert [entry.name for entry in header.tensors] == list(tensors)
    for entry in header.tensors:
        data, kind = tensors[entry.name]
        assert entry.kind.name == kind.name
        assert content[entry.offset : entry.offset + entry.nbytes] == data.tobytes()
        columns = data.shape[-1] if data.dtype != np.uint8 else 256
        assert entry.shape == (*data.shape[:-1], columns)


def test_lays_out_the_very_bytes_the_reference_writes(tmp_path: Path) -> None:
    path = written_by_reference(tmp_path / "model.gguf", some_tensors())
    header = read_header(path)
    layout = lay_out(header.metadata, [(t.name, t.shape, t.kind.name) for t in header.tensors])
    assert layout.header == path.read_bytes()[: header.data_offset]
    assert layout.offsets == tuple(t.offset for t in header.tensors)
    assert layout.sizes == tuple(t.nbytes for t in header.tensors)
    assert layout.total == path.stat().st_size


@pytest.mark.parametrize("alignment", [None, 32, 256])
def test_the_reference_reads_what_is_laid_out(tmp_path: Path, alignment: int | None) -> None:
    metadata = {"general.architecture": string("llama")}
    metadata |= {"general.alignment": u32(alignment)} if alignment else {}
    metadata |= {kind.name: Field(kind, value) for kind, value in EXTREMES.items()}
    metadata |= {f"a.{kind.name}": array_field(kind, [value] * 2) for kind, value in EXTREMES.items()}
    inner = array_field(ValueType.INT16, [1, -2])
    metadata["nested"] = Field(ValueType.ARRAY, [inner, inner], ValueType.ARRAY)
    tensors = some_tensors()
    layout = lay_out(
        metadata, [(n, d.shape if d.dtype != np.uint8 else (3, 256), k.name) for n, (d, k) in tensors.items()]
    )
    image = bytearray(layout.total)
    image[: len(layout.header)] = layout.header
    for offset, size, (data, _) in zip(layout.offsets, layout.sizes, tensors.values(), strict=True):
        image[offset : offset + size] = data.tobytes()
    path = tmp_path / "ours.gguf"
    path.write_bytes(image)

    reader = gguf.GGUFReader(path)
    assert reader.alignment == (alignment or 32)
    assert all(offset % reader.alignment == 0 for offset in layout.offsets)
    for kind, value in EXTREMES.items():
        assert reader.fields[kind.name].types == [gguf.GGUFValueType(kind)]
        assert reader.fields[kind.name].contents() == value
        assert reader.fields[f"a.{kind.name}"].contents() == [value] * 2
    assert [int(reader.fields["nested"].parts[i][0]) for i in reader.fields["nested"].data] == [1, -2] * 2
    for read, (name, (data, kind)) in zip(reader.tensors, tensors.items(), strict=True):
        assert (read.name, read.tensor_type) == (name, kind)
        assert np.array_equal(read.data.reshape(data.shape), data)
    again = read_header(path).metadata["nested"]
    assert [list(item.value) for item in again.value] == [[1, -2]] * 2


def engine_util() -> ModuleType:
    path = Path(__file__).parent.parent / "engines" / "llama_util.py"
    spec = importlib.util.spec_from_file_location("llama_util", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["llama_util"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("alignment", [32, 128])
def test_llama_cpp_loads_what_is_laid_out(tmp_path: Path, alignment: int) -> None:
    from dither.engines.llamacpp import LlamaCpp

    source = engine_util().TinyLlama(layers=1).write(tmp_path / "reference.gguf")
    content, header = source.read_bytes(), read_header(source)
    # In reverse, so that nothing can agree by having been copied.
    tensors = header.tensors[::-1]
    metadata = header.metadata | {"general.alignment": u32(alignment)}
    layout = lay_out(metadata, [(t.name, t.shape, t.kind.name) for t in tensors])
    image = bytearray(layout.total)
    image[: len(layout.header)] = layout.header
    for offset, entry in zip(layout.offsets, tensors, strict=True):
        image[offset : offset + entry.nbytes] = content[entry.offset : entry.offset + entry.nbytes]
    ours = tmp_path / "ours.gguf"
    ours.write_bytes(image)
    prompt = [0, 100, 50]
    with LlamaCpp(source, threads=1, context=64) as engine:
        expected = engine.next_token_probabilities(prompt)
    with LlamaCpp(ours, threads=1, context=64) as engine:
        assert np.array_equal(engine.next_token_probabilities(prompt), expected)


def test_bytes_that_are_no_utf8_survive() -> None:
    raw = b"\xff\xfe ok \xed\xa0\x80"
    content = build([(b"k", STRING, text(raw)), (b"l", ARRAY, array(STRING, 2, text(raw) + text(b"")))])
    metadata = parse_header(content, "file").metadata
    assert metadata["k"].value.encode("utf-8", "surrogateescape") == raw
    assert lay_out(metadata, []).header == content


def test_version_2_has_the_same_layout() -> None:
    assert parse_header(build(version=2), "file").version == 2


def test_a_quarter_of_a_million_strings() -> None:
    tokens = [f"token {i} ü" for i in range(250_000)]
    header = lay_out({"tokens": array_field(ValueType.STRING, tokens)}, []).header
    assert parse_header(header, "file").metadata["tokens"].value == tokens


@pytest.mark.parametrize("nesting, readable", [(8, True), (9, False)])
def test_nesting_is_bounded(nesting: int, readable: bool) -> None:
    value = array(0, 1, b"\1")
    for _ in range(nesting - 1):
        value = array(ARRAY, 1, value)
    content = build([(b"k", ARRAY, value)])
    if readable:
        assert lay_out(parse_header(content, "file").metadata, []).header == content
    else:
        with pytest.raises(FormatError, match="key k: nests arrays"):
            parse_header(content, "file")


WEIGHT = (b"w", (32,), F32, 0)
BAD_FILES = {
    "is empty": b"",
    "starts with b'abcd'": build(magic=b"abcd"),
    "zip archive": build(magic=b"PK\3\4"),
    "big-endian": build(version=3, order=">"),
    "GGUF version 1": build(version=1),
    "GGUF version 4": build(version=4),
    "promises 4 bytes": b"GGUF\3",
    "metadata keys": build(counts=(0, 2**63)),
    "1152921504606846976 tensors": build(counts=(2**60, 0)),
    "bad.gguf: promises 288230376151711744 tensors": build([(b"k", 0, b"\1")], counts=(2**58, 1)),
    "k: promises 1099511627776 bytes of text": build([(b"k", STRING, struct.pack("<Q", 2**40) + b"x")]),
    "k: promises 1099511627776 numbers": build([(b"k", ARRAY, array(5, 2**40, b"xxxx"))]),
    "k: promises 1099511627776 strings": build([(b"k", ARRAY, array(STRING, 2**40, b"xxxx"))]),
    "k: promises 1099511627776 arrays": build([(b"k", ARRAY, array(ARRAY, 2**40, b"xxxx"))]),
    "k: promises 18446744073709551615 bytes": build(
        [(b"k", ARRAY, array(STRING, 2, text(b"a") + struct.pack("<Q", 2**64 - 1)))]
    ),
    "k: promises 8 bytes": build([(b"k", ARRAY, array(STRING, 2, text(b"a" * 25)))], alignment=1),
    "k: occurs twice": build([(b"k", 0, b"\1"), (b"k", 0, b"\1")]),
    "key : is empty": build([(b"", 0, b"\1")]),
    "unknown type 13": build([(b"k", 13, b"\0" * 8)]),
    "truth value": build([(b"k", 7, b"\2")]),
    "neither 0 nor 1": build([(b"k", ARRAY, array(7, 3, b"\0\1\xff"))]),
    "metadata key at byte 24: is not UTF-8": build([(b"\xff", 0, b"\1")]),
    "alignment: is 0": build([(b"general.alignment", U32, struct.pack("<I", 0))]),
    "alignment: is 48": build([(b"general.alignment", U32, struct.pack("<I", 48))]),
    "alignment: is 2147483648": build([(b"general.alignment", U32, struct.pack("<I", 2**31))]),
    "alignment: is a UINT8": build([(b"general.alignment", 0, b"\x20")]),
    "tensor w: occurs twice": build(tensors=[WEIGHT, (b"w", (1,), F32, 128)], data=bytes(160)),
    "tensor name at byte 24: is not UTF-8": build(tensors=[(b"\xc0", (32,), F32, 0)], data=bytes(128)),
    "w: ends at byte 192, but the file has 191: it is truncated": build(tensors=[WEIGHT], data=bytes(127)),
    "b: overlaps tensor w": build(tensors=[WEIGHT, (b"b", (1,), F32, 96)], data=bytes(128)),
    "w: starts at byte 4": build(tensors=[(b"w", (1,), F32, 4)], data=bytes(128)),
    "w: has a dimension of 0": build(tensors=[(b"w", (32, 0), F32, 0)], data=bytes(128)),
    "w: has a dimension of 18446744073709551615": build(tensors=[(b"w", (2**64 - 1,), F32, 0)]),
    "w: has 1208925819614629174706176 elements": build(tensors=[(b"w", (2**40, 2**40), F32, 0)]),
    "w: has 5 dimensions": build(tensors=[(b"w", (1,) * 5, F32, 0)], data=bytes(32)),
    "w: has 4294967295 dimensions": build(tensors=[(b"w", (), F32, 0)]).replace(b"w" + bytes(4), b"w" + b"\xff" * 4),
    "w: is stored as Q4_2 (type 4),": build(tensors=[(b"w", (32,), 4, 0)], data=bytes(128)),
    "w: has rows of 48, not a multiple of Q4_0's 32": build(tensors=[(b"w", (48,), Q4_0, 0)], data=bytes(64)),
}


@pytest.mark.parametrize("reason", BAD_FILES)
def test_refuses(reason: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(BAD_FILES[reason])
    with pytest.raises(FormatError) as caught:
        read_header(path)
    assert reason in str(caught.value)
    assert "bad.gguf" in caught.value.thing
    assert caught.value.way_out


def test_every_truncation_is_noticed() -> None:
    content = valid()
    parse_header(content, "file")
    needed = max(t.offset + t.nbytes for t in parse_header(content, "file").tensors)
    for length in range(needed):
        with pytest.raises(FormatError):
            parse_header(content[:length], "file")


def test_names_cannot_reach_the_terminal() -> None:
    content = build(tensors=[(b"\x1b[2Jw", (48,), Q4_0, 0)])
    with pytest.raises(FormatError) as caught:
        parse_header(content, "file")
    assert "\x1b" not in str(caught.value) and r"\x1b[2Jw" in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path, "not a regular"),
        (tmp_path / "pipe", "not a regular"),
        (tmp_path / "no", "no such"),
    ):
        with pytest.raises(SourceError, match=reason):
            read_header(path)


UNWRITABLE = [
    ({}, [("w", (48,), "Q4_0")], "tensor w: has rows of 48"),
    ({}, [("w", (32,), "Q9")], "tensor w: cannot be Q9"),
    ({}, [("w", (1,), "F32")] * 2, "tensor w: occurs twice"),
    ({}, [("w" * 64, (1,), "F32")], "more than 63 bytes"),
    ({}, [("w", (1,) * 5, "F32")], "5 dimensions"),
    ({"k": Field(ValueType.UINT8, 256)}, [], "key k: cannot be written as UINT8"),
    ({"k": array_field(ValueType.INT8, [128])}, [], "key k: cannot be written as ARRAY"),
    ({"k": Field(ValueType.ARRAY, np.array([-1]), ValueType.UINT32)}, [], "out of range"),
    ({"k": Field(ValueType.STRING, 5)}, [], "key k: cannot be written as STRING"),
    ({"k": Field(ValueType.STRING, "\ud800")}, [], "key k: cannot be written as STRING"),
    ({"k": Field(ValueType.ARRAY, [1])}, [], "type of its items"),
    ({"general.alignment": u32(48)}, [], "48, not a power of two"),
    ({"general.alignment": Field(ValueType.UINT64, 64)}, [], "is a UINT64, not a UINT32"),
]


@pytest.mark.parametrize("metadata, tensors, reason", UNWRITABLE)
def test_nothing_unreadable_is_written(
    metadata: dict[str, Field], tensors: list[tuple[str, tuple[int, ...], str]], reason: str
) -> None:
    with pytest.raises(DitherError) as caught:
        lay_out(metadata, tensors)
    assert reason in str(caught.value)
    assert isinstance(caught.value, OutputError)


def test_sizes_of_every_type() -> None:
    for kind in GGML_TYPES.values():
        layout = lay_out({}, [("a", (3, kind.block * 2), kind.name), ("b", (1,), "F32")])
        expected = gguf.quant_shape_to_byte_shape((3, kind.block * 2), gguf.GGMLQuantizationType(kind.id))
        assert layout.sizes[0] == int(np.prod(expected))
        assert layout.offsets[1] == -(-(layout.offsets[0] + layout.sizes[0]) // 32) * 32
        assert layout.total == layout.offsets[1] + 32
