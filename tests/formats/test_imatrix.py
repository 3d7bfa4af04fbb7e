"""Importance matrices in both of llama.cpp's forms, and everything that may be wrong with one."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from dither.errors import DitherError, FormatError
from dither.formats.imatrix import read_imatrix
from formats.imatrix_util import dat_bytes, write_gguf


def test_sums_become_means_and_an_expert_without_tokens_weighs_one(tmp_path: Path) -> None:
    sums = np.array([[2.0, 4.0], [0.0, 0.0], [9.0, 3.0]])
    matrix = read_imatrix(write_gguf(tmp_path / "m.gguf", {"blk.0.x.weight": (sums, np.array([2, 0, 3]))}))
    assert np.array_equal(matrix.means["blk.0.x.weight"], [[1, 2], [1, 1], [3, 1]])
    assert matrix.unseen == {"blk.0.x.weight": 1}
    assert matrix.datasets == ("books.txt",)
    assert matrix.chunks == 5


def test_the_old_form(tmp_path: Path) -> None:
    path = tmp_path / "m.dat"
    path.write_bytes(dat_bytes({"a.weight": (4, [8.0, 2.0]), "b.weight": (0, [3.0, 5.0])}))
    matrix = read_imatrix(path)
    assert np.array_equal(matrix.means["a.weight"], [[2, 0.5]])
    assert np.array_equal(matrix.means["b.weight"], [[3, 5]])
    assert (matrix.chunks, matrix.datasets) == (3, ("books.txt",))


@pytest.mark.parametrize(("value", "said"), [(np.nan, "NaN"), (np.inf, "infinite"), (-1.0, "negative")])
def test_bad_values_are_refused_by_name(tmp_path: Path, value: float, said: str) -> None:
    path = tmp_path / "m.dat"
    path.write_bytes(dat_bytes({"good.weight": (1, [1.0]), "bad.weight": (1, [1.0, value])}))
    with pytest.raises(FormatError, match=said) as caught:
        read_imatrix(path)
    assert "bad.weight" in str(caught.value)


def test_an_expert_of_zeros_saw_nothing_whatever_its_count_says(tmp_path: Path) -> None:
    """Matrices converted from the old form count the same tokens for every expert."""
    sums = np.array([[2.0, 4.0], [0.0, 0.0]])
    matrix = read_imatrix(write_gguf(tmp_path / "m.gguf", {"blk.0.x.weight": (sums, np.array([2, 2]))}))
    assert np.array_equal(matrix.means["blk.0.x.weight"], [[1, 2], [1, 1]])
    assert matrix.unseen == {"blk.0.x.weight": 1}


def test_a_tensor_that_is_zero_throughout_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"blk.0.x.weight": (np.zeros((2, 2)), np.array([2, 2]))})
    with pytest.raises(FormatError, match=r"blk\.0\.x\.weight: is zero throughout"):
        read_imatrix(path)


def test_a_model_is_no_matrix(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("blk.0.x.weight", np.ones((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match="no importance values"):
        read_imatrix(tmp_path / "model.gguf")


WHOLE = dat_bytes({"a.weight": (4, [8.0, 2.0]), "b.weight": (1, [3.0, 5.0])})


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(cut=st.integers(0, len(WHOLE)), at=st.integers(0, len(WHOLE) - 1), byte=st.integers(0, 255))
def test_damaged_bytes_give_an_error_or_sane_numbers(tmp_path: Path, cut: int, at: int, byte: int) -> None:
    path = tmp_path / "m.dat"
    data = bytearray(WHOLE)
    data[at] = byte
    path.write_bytes(data[:cut])
    try:
        matrix = read_imatrix(path)
    except DitherError:
        return
    for values in matrix.means.values():
        assert np.isfinite(values).all()
        assert (values >= 0).all()
