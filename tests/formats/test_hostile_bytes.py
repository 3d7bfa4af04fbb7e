"""Arbitrary and mutated bytes through both readers.

Whatever comes in, only a DitherError may come out, memory stays within a small multiple of the file,
and what is accepted is consistent: every tensor inside the file and on bytes of its own.  What the
safetensors reader accepts, the reference implementation accepts as well.
"""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import safetensors
from gguf_bytes import F32, STRING, build, text, valid
from hypothesis import given, settings, strategies as st

import dither
from dither.errors import DitherError, OutputError
from dither.formats import gguf, safetensors as ours

FUZZ = settings(derandomize=True, deadline=None, max_examples=150, database=None)
EDGES = [0, 1, 7, 8, 31, 32, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
BYTES_PER_BYTE = 24  # Python's objects for the smallest of strings, fields and tensors

Mutation = Callable[[bytes], bytes]


def mutations(longest: int) -> st.SearchStrategy[list[Mutation]]:
    """Bytes overwritten, cut off, removed, repeated; whole counts replaced by numbers at the edges."""
    at = st.integers(0, longest - 1)

    def overwrite(position: int, new: bytes) -> Mutation:
        return lambda data: data[:position] + new + data[position + len(new) :]

    def cut(start: int, stop: int) -> Mutation:
        return lambda data: data[:start] + data[stop:]

    def repeat(start: int, stop: int) -> Mutation:
        return lambda data: data[:stop] + data[start:stop] + data[stop:]

    one = st.one_of(
        st.builds(overwrite, at, st.binary(min_size=1, max_size=8)),
        st.builds(overwrite, at, st.sampled_from(EDGES).map(struct.Struct("<Q").pack)),
        st.builds(overwrite, at, st.sampled_from([e for e in EDGES if e < 2**32]).map(struct.Struct("<I").pack)),
        st.builds(cut, at, at),
        st.builds(cut, at, st.just(longest)),
        st.builds(repeat, at, at),
    )
    return st.lists(one, min_size=1, max_size=3)


def mutated(data: bytes, changes: Sequence[Mutation]) -> bytes:
    for change in changes:
        data = change(data)
    return data


def parsed(parse: Callable[[bytes, str], Any], data: bytes) -> Any:
    """What a reader makes of bytes: a header, or None where it refuses; memory bounded either way."""
    tracemalloc.start()
    try:
        return parse(data, "file")
    except DitherError:
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < BYTES_PER_BYTE * len(data) + 2**20


def check_positions(header: Any, size: int) -> None:
    tensors = sorted(header.tensors, key=lambda tensor: (tensor.offset, tensor.nbytes))
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    for tensor in tensors:
        assert header.data_offset <= tensor.offset <= tensor.offset + tensor.nbytes <= size
    for before, after in pairwise(tensors):
        assert before.offset + before.nbytes <= after.offset


def check_gguf(data: bytes) -> None:
    header = parsed(gguf.parse_header, data)
    if header is None:
        return
    check_positions(header, len(data))
    tensors = [(tensor.name, tensor.shape, tensor.kind.name) for tensor in header.tensors]
    try:
        layout = gguf.lay_out(header.metadata, tensors)
    except OutputError as error:
        assert "more than 63 bytes" in error.reason
        return
    again = gguf.parse_header(layout.header + bytes(layout.total - len(layout.header)), "again")
    assert [(t.name, t.shape, t.kind.name) for t in again.tensors] == tensors
    assert [(t.offset, t.nbytes) for t in again.tensors] == list(zip(layout.offsets, layout.sizes, strict=True))
    assert gguf.lay_out(again.metadata, tensors).header == layout.header


@FUZZ
@given(st.binary(max_size=300))
def test_gguf_of_arbitrary_bytes(data: bytes) -> None:
    check_gguf(data)
    check_gguf(b"GGUF" + data)
    check_gguf(build() + data)
    check_gguf(b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + data)


@FUZZ
@given(mutations(len(valid())))
def test_gguf_mutated(changes: list[Mutation]) -> None:
    check_gguf(mutated(valid(), changes))


@FUZZ
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.sampled_from(EDGES))
def test_gguf_with_other_counts(tensors: int, fields: int, edge: int) -> None:
    for counts in ((tensors, fields), (edge, 8), (3, edge)):
        check_gguf(valid()[:8] + struct.pack("<QQ", *counts) + valid()[24:])


def test_the_unmutated_file_is_accepted() -> None:
    header = gguf.parse_header(valid(), "file")
    assert len(header.tensors) == 3 and len(header.metadata) == 8
    check_gguf(valid())


@pytest.mark.parametrize("what", ["strings", "arrays", "fields", "tensors"])
def test_many_tiny_things_cost_no_more_than_their_bytes(what: str) -> None:
    count = 10_000
    if what == "strings":
        data = build([(b"k", 9, struct.pack("<IQ", 8, count) + (struct.pack("<Q", 2) + b"\xff\xfe") * count)])
    elif what == "arrays":
        data = build([(b"k", 9, struct.pack("<IQ", 9, count) + struct.pack("<IQB", 0, 1, 5) * count)])
    elif what == "fields":
        data = build([(b"%d" % i, 0, b"\1") for i in range(count)])
    else:
        data = build(tensors=[(b"%d" % i, (1,), 0, 32 * i) for i in range(count)], data=bytes(32 * count))
    header = parsed(gguf.parse_header, data)
    assert max(len(header.metadata), len(header.tensors)) in (1, count)


def valid_safetensors() -> bytes:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "c": {"dtype": "F8_E4M3", "shape": [], "data_offsets": [32, 33]},
        "d": {"dtype": "I64", "shape": [0, 7], "data_offsets": [33, 33]},
    }
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(33)


def check_safetensors(data: bytes) -> None:
    header = parsed(ours.parse_header, data)
    if header is None:
        return
    check_positions(header, len(data))
    reference = dict(safetensors.deserialize(data))
    assert {(t.name, t.shape) for t in header.tensors} == {
        (name, tuple(tensor["shape"])) for name, tensor in reference.items()
    }
    for tensor in header.tensors:
        assert data[tensor.offset : tensor.offset + tensor.nbytes] == bytes(reference[tensor.name]["data"])


@FUZZ
@given(st.binary(max_size=300))
def test_safetensors_of_arbitrary_bytes(data: bytes) -> None:
    check_safetensors(data)
    check_safetensors(struct.pack("<Q", len(data)) + data)
    check_safetensors(struct.pack("<Q", len(data) + 1) + b"{" + data)


@FUZZ
@given(mutations(len(valid_safetensors())))
def test_safetensors_mutated(changes: list[Mutation]) -> None:
    check_safetensors(mutated(valid_safetensors(), changes))


ODD = st.sampled_from([None, True, 1, 1.5, "x", [], {}, [[]], {"dtype": "U8"}, [2**64], "\ud800"])


@FUZZ
@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "c", "__metadata__"]),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["U8", "F32", "F4", "F6_E2M3"]) | ODD,
                "shape": st.lists(st.integers(0, 4), max_size=3) | ODD,
                "data_offsets": st.tuples(st.integers(0, 40), st.integers(0, 40)).map(sorted) | ODD,
            }
        )
        | ODD,
        max_size=3,
    ),
    st.integers(0, 40),
)
def test_safetensors_of_arbitrary_json(header: dict[str, Any], size: int) -> None:
    raw = json.dumps(header).encode()
    check_safetensors(struct.pack("<Q", len(raw)) + raw + bytes(size))


def test_the_unmutated_safetensors_is_accepted() -> None:
    assert len(ours.parse_header(valid_safetensors(), "file").tensors) == 4
    check_safetensors(valid_safetensors())


def test_a_recipe_that_nests_without_end_is_shown_as_text(tmp_path: Path) -> None:
    deep = b"[" * 100_000
    fields = [(b"general.architecture", STRING, text(b"llama")), (b"dither.recipe", STRING, text(deep))]
    weight = [(b"w", (32,), F32, 0)]
    (tmp_path / "deep.gguf").write_bytes(build(fields, weight, bytes(128)))
    found = dither.inspect(tmp_path / "deep.gguf").to_json()["made_by"]["recipe"]
    assert found and deep.decode().startswith(found)
