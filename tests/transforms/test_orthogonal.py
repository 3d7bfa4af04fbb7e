"""Orthogonal matrices against their definitions.

Legend: D width, R vectors.
"""

from __future__ import annotations

import numpy as np
import pytest

from dither.transforms.orthogonal import Orthogonal, paley, random_orthogonal, sylvester

HADAMARD_WIDTHS = (1, 2, 64, 256, 1024, 12, 36, 576, 896, 768, 2560 // 8)
OTHER_WIDTHS = {52: "hadamard x random", 13: "random", 30: "hadamard x random", 100: "hadamard x random"}


@pytest.mark.parametrize("width", HADAMARD_WIDTHS)
def test_rows_are_orthonormal_and_all_entries_equally_large(width: int) -> None:
    rotation = Orthogonal(width, seed=1)
    q_DD = rotation.matrix()
    assert rotation.kind == "hadamard"
    np.testing.assert_allclose(q_DD @ q_DD.T, np.eye(width), atol=1e-12)
    np.testing.assert_allclose(np.abs(q_DD), 1 / np.sqrt(width), rtol=1e-12)


@pytest.mark.parametrize(("width", "kind"), OTHER_WIDTHS.items())
def test_widths_without_a_known_hadamard_matrix_are_orthogonal_too(width: int, kind: str) -> None:
    rotation = Orthogonal(width, seed=1)
    assert rotation.kind == kind
    np.testing.assert_allclose(rotation.matrix() @ rotation.matrix().T, np.eye(width), atol=1e-12)


def test_plain_random_on_request() -> None:
    rotation = Orthogonal(64, seed=1, hadamard=False)
    q_DD = rotation.matrix()
    assert rotation.kind == "random"
    np.testing.assert_allclose(q_DD @ q_DD.T, np.eye(64), atol=1e-12)
    assert np.abs(q_DD).max() > 2 / np.sqrt(64)


@pytest.mark.parametrize("width", [64, 4096 // 2, 36 * 16, 52])
def test_multiplying_is_the_kronecker_product_written_out(width: int) -> None:
    """Signs, then Sylvester's matrix by its recursion, then the small one: built densely here."""
    rotation = Orthogonal(width, seed=3)
    generator = np.random.default_rng(3)
    signs_D = generator.choice([-1.0, 1.0], size=width)
    small = {52: None, 576: paley(36)}.get(width, np.ones((1, 1)))
    small = random_orthogonal(13, generator) if small is None else small / np.sqrt(len(small))
    power = np.ones((1, 1))
    while len(power) < width // len(small):
        power = np.block([[power, power], [power, -power]])
    expected_DD = signs_D[:, None] * np.kron(power / np.sqrt(len(power)), small)
    x_RD = np.random.default_rng(0).standard_normal((37, width))
    np.testing.assert_allclose(rotation(x_RD), x_RD @ expected_DD, atol=1e-11)
    single = rotation(x_RD.astype(np.float32))
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, x_RD @ expected_DD, atol=1e-5)
    np.testing.assert_allclose(rotation(x_RD[0]), x_RD[0] @ expected_DD, atol=1e-11)


def test_sylvester_is_his_recursion() -> None:
    np.testing.assert_array_equal(sylvester(4), [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])


@pytest.mark.parametrize("order", [4, 8, 12, 20, 24, 28, 36, 44, 60, 76, 108, 124])
def test_paley_makes_hadamard_matrices(order: int) -> None:
    matrix = paley(order)
    assert matrix is not None
    assert set(np.unique(matrix)) == {-1.0, 1.0}
    np.testing.assert_array_equal(matrix @ matrix.T, order * np.eye(order))


def test_the_seed_decides() -> None:
    assert np.array_equal(Orthogonal(96, 5).matrix(), Orthogonal(96, 5).matrix())
    assert not np.allclose(Orthogonal(96, 5).matrix(), Orthogonal(96, 6).matrix())
