"""Orthogonal matrices that are quick to multiply by: Hadamard's, with random signs, for any width.

A Hadamard matrix has entries ±1 and orthogonal rows, so H/√d spreads one large entry of a vector evenly
over all d of them.  Signs drawn at random first (x → (x · signs) H/√d) keep an adversarial or merely
unlucky direction from lining up with a row of H.  Sylvester's doubling, H_2n = [[H_n, H_n], [H_n, −H_n]],
gives every power of two; other widths 2^k · m are Kronecker products with a small matrix of m · 2^j rows, a
Hadamard matrix where Paley's constructions know one (12, 20, 28, …), a random orthogonal one where they do
not.  A vector is multiplied by a Kronecker product one small factor at a time: 128 products and sums a
number at width 4096, where a dense matrix takes 4096.

Sources: Ashkboos et al. 2024 (QuaRot, arXiv:2404.00456), section 3; Paley 1933, "On orthogonal matrices",
constructions I (order p + 1, p ≡ 3 mod 4) and II (2(p + 1), p ≡ 1 mod 4).

Legend: D the width, R any number of vectors, P a prime.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
_LARGEST_SMALL = 512  # of the dense factor: beyond it multiplying would cost more than it is worth
_FACTOR = 64  # Sylvester's matrices of this size are multiplied as they are: a processor's best case
_STRIPE = 2**16  # numbers transformed at once, so that they stay in a core's cache


class Orthogonal:
    """x → x Q for row vectors of width D; Q is orthogonal, drawn from `seed`, and never built.

    `kind` says what it is: "hadamard", or "hadamard x random" / "random" where no Hadamard matrix of
    that width is known.
    """

    def __init__(self, width: int, seed: int, *, hadamard: bool = True) -> None:
        generator = np.random.default_rng(seed)
        self.width, self.seed = width, seed
        self._signs_D = generator.choice(np.array([-1.0, 1.0]), size=width)
        small = _small_factor(width) if hadamard else width
        known = paley(small) if hadamard else None
        last = random_orthogonal(small, generator) if known is None else known / np.sqrt(small)
        self._factors = [*_sylvester_factors(width // small), last]
        self.kind = "hadamard" if known is not None else "random" if small == width else "hadamard x random"

    def __call__(self, x_RD: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """x Q in the precision of x, for (R, D) or (D,); x itself is left alone."""
        rows = x_RD.reshape(-1, self.width)
        out = np.empty(rows.shape, dtype=rows.dtype)
        step = max(1, _STRIPE // self.width)
        signs_D = self._signs_D.astype(rows.dtype)
        factors = [factor.astype(rows.dtype) for factor in self._factors]
        for start in range(0, len(rows), step):
            out[start : start + step] = _times_kronecker(rows[start : start + step] * signs_D, factors)
        return out.reshape(x_RD.shape)

    def matrix(self) -> Doubles:
        """Q itself, float64 (D, D)."""
        return np.asarray(self(np.eye(self.width)))


def _times_kronecker(x_RD: npt.NDArray[Any], factors: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """x (F_1 ⊗ F_2 ⊗ …): x is an array with one axis a factor, and each axis is multiplied by its own."""
    rows, after = len(x_RD), 1
    # The last factor mixes neighbors, the one before it numbers as far apart as the last is long, and so on.
    for factor in reversed(factors):
        if after == 1:
            x_RD = x_RD.reshape(-1, len(factor)) @ factor
        else:
            x_RD = np.matmul(factor.T, x_RD.reshape(-1, len(factor), after))
        after *= len(factor)
    return x_RD.reshape(rows, after)


def _sylvester_factors(width: int) -> list[Doubles]:
    """Normalized Hadamard matrices whose Kronecker product is Sylvester's of this power of two."""
    found = []
    while width > 1:
        size = min(width, _FACTOR)
        found.append(sylvester(size) / np.sqrt(size))
        width //= size
    return found


def sylvester(size: int) -> Doubles:
    """±1, float64 (size, size), for a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix


def _small_factor(width: int) -> int:
    """The factor m · 2^j of a width m · 2^k that Paley knows, or the odd m itself.

    >>> [_small_factor(width) for width in (4096, 576, 896, 5120, 3328)]
    [1, 36, 28, 20, 13]
    """
    candidate = odd = width // (width & -width)  # without its factors of two
    while width % candidate == 0 and candidate <= _LARGEST_SMALL:
        if paley_prime(candidate) or candidate == 1:
            return candidate
        candidate *= 2
    return odd


def paley_prime(order: int) -> int:
    """The prime from which one of Paley's constructions makes this order, or 0.

    >>> [paley_prime(order) for order in (12, 20, 28, 36, 52)]
    [11, 19, 13, 17, 0]
    """
    if order % 4 == 0 and _is_prime(order - 1):
        return order - 1
    half = order // 2 - 1
    return half if order % 4 == 0 and half % 4 == 1 and _is_prime(half) else 0


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def paley(order: int) -> Doubles | None:
    """A Hadamard matrix of ±1, float64 (order, order), or None where Paley's primes do not reach."""
    if order == 1:
        return np.ones((1, 1))
    prime = paley_prime(order)
    if not prime:
        return None
    # The Jacobsthal matrix: is i − j a square modulo P?  Its rows are orthogonal but for a constant.
    squares = {value * value % prime for value in range(1, prime)}
    character_P = np.array([0] + [1 if value in squares else -1 for value in range(1, prime)], dtype=float)
    index_P = np.arange(prime)
    jacobsthal_PP = character_P[(index_P[:, None] - index_P[None, :]) % prime]
    core = np.zeros((prime + 1, prime + 1))
    core[0, 1:], core[1:, 1:] = 1, jacobsthal_PP
    if prime == order - 1:  # I: skew, S + I
        core[1:, 0] = -1
        return core + np.eye(order)
    core[1:, 0] = 1  # II: symmetric; each entry becomes a 2 × 2 block
    diagonal = np.array([[1.0, -1.0], [-1.0, -1.0]])
    return np.kron(core, np.array([[1.0, 1.0], [1.0, -1.0]])) + np.kron(np.eye(prime + 1), diagonal)


def random_orthogonal(size: int, generator: np.random.Generator) -> Doubles:
    """Uniform over all rotations and reflections: QR of normal numbers, R's signs taken out
    (Mezzadri 2007, arXiv:math-ph/0609050)."""
    q, r = np.linalg.qr(generator.standard_normal((size, size)))
    return np.asarray(q * np.sign(np.diag(r)))
