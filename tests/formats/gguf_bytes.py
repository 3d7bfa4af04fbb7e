"""GGUF files put together byte by byte, so that a test can break any one of them."""

from __future__ import annotations

import struct
from collections.abc import Sequence

Field = tuple[bytes, int, bytes]  # key, value type, value as stored
TensorInfo = tuple[bytes, tuple[int, ...], int, int]  # name, dimensions (fastest first), type, offset

U32, STRING, ARRAY = 4, 8, 9
F32, Q4_0 = 0, 2


def text(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def array(item: int, count: int, items: bytes) -> bytes:
    return struct.pack("<IQ", item, count) + items


def build(
    fields: Sequence[Field] = (),
    tensors: Sequence[TensorInfo] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,  # tensors, fields
    alignment: int = 32,
    order: str = "<",
) -> bytes:
    parts = [magic, struct.pack(order + "I", version)]
    parts.append(struct.pack(order + "QQ", *(counts or (len(tensors), len(fields)))))
    parts += [text(key) + struct.pack(order + "I", kind) + value for key, kind, value in fields]
    for name, dimensions, kind, offset in tensors:
        parts.append(text(name) + struct.pack(order + "I", len(dimensions)))
        parts.append(struct.pack(f"{order}{len(dimensions)}QIQ", *dimensions, kind, offset))
    header = b"".join(parts)
    return header + bytes(-len(header) % alignment) + data


def valid() -> bytes:
    """A small file with every kind of thing in it, from which mutations start."""
    number = struct.Struct("<I").pack
    fields = [
        (b"general.architecture", STRING, text(b"llama")),
        (b"general.alignment", U32, number(32)),
        (b"tokens", ARRAY, array(STRING, 3, text(b"a") + text("é".encode()) + text(b"\xff\x00"))),
        (b"scores", ARRAY, array(6, 4, struct.pack("<4f", 0, -1, 2.5, 1e30))),
        (b"flags", ARRAY, array(7, 2, b"\x01\x00")),
        (b"nested", ARRAY, array(ARRAY, 2, array(0, 1, b"\x05") + array(STRING, 1, text(b"x")))),
        (b"wide", 10, struct.pack("<Q", 2**63)),
        (b"yes", 7, b"\x01"),
    ]
    tensors = [
        (b"token_embd.weight", (32, 4), Q4_0, 0),
        (b"output_norm.weight", (5,), F32, 96),
        (b"experts", (32, 2, 2), F32, 128),
    ]
    return build(fields, tensors, bytes(range(128)) * 5)
