"""Importance matrices in both forms, written by the `gguf` package and byte by byte."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np


def write_gguf(path: Path, tensors: dict[str, tuple[np.ndarray, np.ndarray]]) -> Path:
    """Sums (E, C) and counts (E,) per tensor, through the `gguf` package's writer."""
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["books.txt"])
    writer.add_uint32("imatrix.chunk_count", 5)
    for name, (sums, counts) in tensors.items():
        writer.add_tensor(f"{name}.in_sum2", sums.astype(np.float32))
        writer.add_tensor(f"{name}.counts", counts.astype(np.float32).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dat_bytes(entries: dict[str, tuple[int, list[float]]], chunks: int = 3, dataset: str = "books.txt") -> bytes:
    data = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        data += np.array(values, "<f4").tobytes()
    return data + struct.pack("<ii", chunks, len(dataset)) + dataset.encode()
