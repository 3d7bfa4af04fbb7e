"""Rows put together again from what `split` made of them.

Legend: R rows, C columns, G groups of a row, N bytes of a packed row.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def joined(c: Any, codes_RC: np.ndarray, *parts_RG: np.ndarray) -> np.ndarray:
    """raw_RN of codes and the parts of a grid, by way of `pack`."""
    _, like = c.unpack(np.zeros((codes_RC.size // c.block, c.block_bytes), np.uint8))
    grid = type(like)(*(part.reshape(old.shape) for part, old in zip(parts_RG, like, strict=True)))
    return c.pack(codes_RC.reshape(-1, c.block), grid).reshape(len(codes_RC), -1)
