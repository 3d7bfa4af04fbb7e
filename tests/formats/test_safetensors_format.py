"""The safetensors header against the reference implementation, and what is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dither.errors import FormatError
from dither.formats.safetensors import DTYPE_BITS, parse_header, read_header


def build(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(begin: int, end: int, shape: Any = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def test_reads_what_the_reference_writes(tmp_path: Path) -> None:
    dtypes = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
        "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
        "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U64": torch.uint64,
        "U32": torch.uint32,
        "U16": torch.uint16,
        "U8": torch.uint8,
        "BOOL": torch.bool,
        "C64": torch.complex64,
    }
    assert set(DTYPE_BITS) - set(dtypes) == {"F6_E2M3", "F6_E3M2", "F4"}
    tensors = {name: torch.ones(3, 2, 4).to(dtype) for name, dtype in dtypes.items()}
    tensors |= {"scalar": torch.tensor(2.0), "empty": torch.zeros(0, 5)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert {tensor.name for tensor in header.tensors} == set(tensors)
    content = path.read_bytes()
    for found in header.tensors:
        tensor = tensors[found.name]
        assert found.shape == tuple(tensor.shape)
        assert found.dtype == ("F32" if found.name in ("scalar", "empty") else found.name)
        stored = bytes(tensor.contiguous().flatten().view(torch.uint8).tolist()) if tensor.numel() else b""
        assert content[found.offset : found.offset + found.nbytes] == stored


BAD_FILES = {
    "too few": b"\0" * 7,
    "promises a header of 9223372036854775808 bytes": build({}, length=2**63),
    "promises a header of 3 bytes; the file has 10": build({}, length=3),
    "does not begin with {": build(b' {"a": 1}'),
    "no readable JSON": build(b"{"),
    "no readable JSON (maximum recursion": build(b'{"a":' * 100_000),
    "no readable JSON ('utf-8'": build(b'{"\xff": 1}'),
    "no readable JSON (Exceeds the limit": build(b'{"a":' + b"9" * 5000 + b"}"),
    "key a: occurs twice": build(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{}}', b"x"),
    "key shape: occurs twice": build(b'{"a":{"shape":[1],"shape":[2]}}'),
    "__metadata__: is not a map": build({"__metadata__": {"a": 1}}),
    "tensor a: has no description": build({"a": 1}),
    "tensor a: has dtype Q4": build({"a": entry(0, 1, dtype="Q4")}, b"x"),
    "tensor a: has dtype ['U8']": build({"a": entry(0, 1) | {"dtype": ["U8"]}}, b"x"),
    "tensor a: has shape [-1]": build({"a": entry(0, 1, [-1])}, b"x"),
    "tensor a: has shape [1.0]": build({"a": entry(0, 1, [1.0])}, b"x"),
    "tensor a: has shape [True]": build({"a": entry(0, 1, [True])}, b"x"),
    "tensor a: has shape 1": build({"a": entry(0, 1, 1)}, b"x"),
    "tensor a: has 33 dimensions": build({"a": entry(0, 1, [1] * 33)}, b"x"),
    "tensor a: has data_offsets [1, 0]": build({"a": entry(1, 0, [1])}, b"x"),
    "tensor a: has data_offsets [0, 1, 2]": build({"a": entry(0, 1) | {"data_offsets": [0, 1, 2]}}, b"x"),
    "tensor a: has data_offsets None": build({"a": {"dtype": "U8", "shape": [1]}}, b"x"),
    "tensor a: has 1 bytes, which is not what [2] of U8": build({"a": entry(0, 1, [2])}, b"x"),
    "tensor a: has 0 bytes, which is not what [4611686018427387903, 4611686018427387903]": build(
        {"a": entry(0, 0, [2**62 - 1, 2**62 - 1])}
    ),
    "tensor a: ends at byte": build({"a": entry(0, 2)}, b"x"),
    "tensor b: overlaps": build({"a": entry(0, 2), "b": entry(1, 3)}, b"xxx"),
    "tensor b: leaves a gap": build({"a": entry(0, 1), "b": entry(2, 3)}, b"xxx"),
    "has 2 bytes that belong to no tensor": build({"a": entry(0, 1)}, b"xxx"),
}


@pytest.mark.parametrize("reason", BAD_FILES)
def test_refuses(reason: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_header(BAD_FILES[reason], "bad.safetensors")
    assert reason in str(caught.value)
    assert "bad.safetensors" in caught.value.thing
    assert caught.value.way_out


def test_headers_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as file:
        file.write(build(b"{}", length=100_000_001))
        file.truncate(200_000_000)
    with pytest.raises(FormatError, match="promises a header of 100000001 bytes"):
        read_header(path)
