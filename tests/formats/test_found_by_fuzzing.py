"""What the fuzzer found (tools/campaign/fuzzing.py), smallest inputs first: each is refused in words now."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dither.errors import DitherError, FormatError
from dither.formats.arrays import read_members
from dither.formats.evidence import EvidenceStore
from dither.models.tokenizers import sentencepiece
from dither.system.json_text import parse_json


@pytest.mark.parametrize(
    "trainer", [b"\x1a\x01x", b"\x1a\x05ffff\x18", b"\xc2\x02\x01x"], ids=["kind", "kind and more", "unknown's id"]
)
def test_a_number_of_a_tokenizer_model_that_is_text(trainer: bytes) -> None:
    """Field 2 is the trainer's; its numbers came as bytes: int() and < raised what nobody caught."""
    one = b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02"
    with pytest.raises(FormatError, match="is no sentencepiece model"):
        sentencepiece.parse(one + b"\x12" + bytes([len(trainer)]) + trainer)


@pytest.mark.parametrize("header", ["{'descr': '<f4', 'fortran_order': F\n'", "{'a': (", "{[]: 1}", "{'descr': 5L}"])
def test_a_header_of_an_array_that_is_no_python(tmp_path: Path, header: str) -> None:
    """NumPy tokenizes a header that does not parse, for what Python 2 wrote, and lets the tokenizer's errors out."""
    raw = header.encode().ljust(117) + b"\n"
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("0.mean_square.npy", b"\x93NUMPY\x01\x00" + len(raw).to_bytes(2, "little") + raw + bytes(32))
    with pytest.raises(FormatError, match="is no array"):
        read_members(tmp_path / "x.npz")


@pytest.mark.parametrize("experts", ["1e999", "-1e999", "true", "1.5", '"1"', "null", "1" + "0" * 400])
def test_a_manifest_s_counts_are_whole_numbers(tmp_path: Path, experts: str) -> None:
    entry = f'[{{"tensors": ["t"], "experts": {experts}, "columns": 8}}]'
    text = f'{{"schema_version": 1, "data": {{"sha256": "x"}}, "files": {{"blk.0.npz": {entry}}}}}'
    (tmp_path / "evidence.json").write_text(text)
    with pytest.raises(FormatError, match="is damaged"):
        EvidenceStore.open(tmp_path)


def test_a_number_too_large_for_python_is_not_finite() -> None:
    with pytest.raises(FormatError, match="1e999 is no number here"):
        parse_json("[1e999]", "the text")
    assert parse_json("[1e308, -5e-324]", "the text") == json.loads("[1e308, -5e-324]")
    assert parse_json("[1e999]", "the text", finite=False) == [float("inf")]


def test_reading_a_small_file_takes_no_more_memory_than_it_has(tmp_path: Path) -> None:
    """`read(n)` allocates n bytes before it reads: a config.json of two bytes asked for 256 MiB."""
    (tmp_path / "config.json").write_text("{}")
    script = textwrap.dedent(f"""
        import os, resource
        from pathlib import Path
        from dither.system.files import read_bytes
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (taken + 2**24, resource.RLIM_INFINITY))
        print(len(read_bytes(Path({str(tmp_path / "config.json")!r}), 256 * 2**20, "")))
    """)
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.stdout == "2\n", ran.stderr


def test_a_limit_still_holds(tmp_path: Path) -> None:
    from dither.system.files import read_bytes

    (tmp_path / "x").write_bytes(bytes(np.arange(100, dtype=np.uint8)))
    assert read_bytes(tmp_path / "x", 100, "") == bytes(range(100))
    with pytest.raises(DitherError, match="is too large"):
        read_bytes(tmp_path / "x", 99, "")
