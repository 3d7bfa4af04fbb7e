"""Which type for which tensor: the least predicted KL divergence in so many bytes, or the reverse.

Every tensor (or group that must stay equal) may take one of some types, each with its exact bytes and a
predicted KL divergence; predictions add up.  Choosing one type for each under a budget is the multiple-choice
knapsack problem.  It is hard in theory and easy here: `minimal_core` proves its answers, whichever way it is
asked.

What "exact" means: no allocation within the budget is better by more than a relative 10⁻¹² of KL, the
rounding of sums of float64; within that, fewer bytes win.  A KL below 10⁻³⁰ counts as none.  Bytes are
compared exactly (they are integers below 2⁵³).

`Allocation.bound` is the greatest lower bound that was proven.  It starts as the Lagrangian one and, when the
search ends, as on all instances of a model's shape tried, equals what was found: the optimum is proven.
Where an instance is pathological the search thins its states; `bound` then stays below, and the gap between
them is all that may be lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dither.errors import UsageError
from dither.planning.minimal_core import Numbers, relax, solve, undominated
from dither.units import format_bytes

_SLACK = 1e-12  # of a limit of KL: what sums of floats may differ by
_NOTHING = 1e-30


@dataclass(frozen=True)
class TypeChoice:
    type: str
    bytes: int
    kl: float  # predicted, nats per token, ≥ 0 and finite


@dataclass(frozen=True)
class Item:
    """Tensors that take one type together; a choice's bytes and KL are those of all of them."""

    tensors: tuple[str, ...]
    choices: tuple[TypeChoice, ...]


@dataclass(frozen=True)
class Allocation:
    """One choice per item, in the items' order, and their sums."""

    chosen: tuple[TypeChoice, ...]
    bytes: int
    kl: float
    bound: float  # no allocation is better than this: KL from `allocate`, bytes from `smallest`


def allocate(items: Sequence[Item], budget: int) -> Allocation:
    """The allocation of least KL in at most `budget` bytes; of equal ones the smaller.

    Raises UsageError where the smallest choices exceed the budget, or a choice is no choice.
    """
    bytes_, kls = _arrays(items)
    least = sum(min(choice.bytes for choice in item.choices) for item in items)
    if least > budget:
        reason = f"is too small: the smallest types need {least} bytes ({format_bytes(least)})"
        way_out = f"Ask for at least {least} bytes, or allow smaller types with --types."
        raise UsageError(f"a budget of {budget} bytes ({format_bytes(budget)})", reason, way_out)
    # Sizes differ by whole rows of whole blocks, so all sums stand on a grid of `grain` bytes: what the budget
    # has beyond its last point holds nothing, and two sums of different bytes differ by a grain at least.
    grain = _grain(items)
    limit = least + (budget - least) // grain * grain
    solution = solve(list(zip(bytes_, kls, strict=True)), float(limit), weight_grain=float(grain))
    found = _allocation(items, solution.chosen)
    # The same sum in another order may differ in its last bits: where proven, the bound is the very sum found.
    return replace(found, bound=found.kl if solution.exact else min(solution.bound, found.kl))


def smallest(items: Sequence[Item], max_kl: float) -> Allocation:
    """The smallest allocation with a KL of at most `max_kl`; of equally small ones the best.

    Its `bound` is of bytes.  Raises UsageError where the best choices exceed `max_kl`.
    """
    bytes_, kls = _arrays(items)
    best = math.fsum(min(choice.kl for choice in item.choices) for item in items)
    if not best <= max_kl:
        reason = f"is out of reach: the best types are predicted to cost {best:.6g} nats per token"
        way_out = f"Ask for at least {best * (1 + 1e-6):.6g}, or allow larger types with --types."
        raise UsageError(f"a KL divergence of at most {max_kl:g}", reason, way_out)
    # The same problem with bytes and KL in each other's place: KL is the weight, bytes are what is paid.
    pairs = list(zip(kls, bytes_, strict=True))
    grain = float(_grain(items))
    # Sums in another order differ in their last bits: first be generous, so that the KL of an allocation
    # can be asked for, and strict only where that went beyond what was asked.
    solution = solve(pairs, max_kl * (1 + _SLACK), cost_grain=grain)
    if _allocation(items, solution.chosen).kl > max_kl:
        solution = solve(pairs, max(max_kl * (1 - _SLACK), best), cost_grain=grain)
    # Several allocations may be as small: of these the best, which is the first problem at this very size.
    smallest_found = _allocation(items, solution.chosen)
    found = allocate(items, smallest_found.bytes)
    found = found if found.kl <= max_kl else smallest_found
    return replace(found, bound=float(found.bytes) if solution.exact else min(solution.bound, float(found.bytes)))


def random_allocation(items: Sequence[Item], budget: int, seed: int) -> Allocation:
    """A random allocation of about the budget, to hold a prediction against: never over it.

    Every item draws one of its choices uniformly; random items step down until all fit, then random ones
    take random larger choices until none fits any more.  `bound` is the Lagrangian bound of the optimum.
    Raises UsageError like `allocate`.
    """
    rng = np.random.default_rng(seed)
    bytes_, kls = _arrays(items)
    if sum(int(sizes.min()) for sizes in bytes_) > budget:
        return allocate(items, budget)  # which says why not
    # Drawn without regard to the budget first, so that no item is favored; then whoever comes up gives way.
    at = [int(rng.integers(len(sizes))) for sizes in bytes_]
    total = sum(int(sizes[j]) for sizes, j in zip(bytes_, at, strict=True))
    total = _step_down(bytes_, at, total, budget, rng)
    _fill_up(bytes_, at, total, budget, rng)
    found = _allocation(items, at)
    kept = map(undominated, bytes_, kls)
    pairs = [(sizes[at], kl[at]) for sizes, kl, at in zip(bytes_, kls, kept, strict=True)]
    return replace(found, bound=min(relax(pairs, float(budget)).bound, found.kl))


def _step_down(bytes_: list[Numbers], at: list[int], total: int, budget: int, rng: np.random.Generator) -> int:
    while total > budget:
        # A new order each round: with one order the same items would always shrink first.
        for i in rng.permutation(len(bytes_)):
            smaller = np.flatnonzero(bytes_[i] < bytes_[i][at[i]])
            if total <= budget:
                break
            if len(smaller):
                j = int(rng.choice(smaller))
                total -= int(bytes_[i][at[i]] - bytes_[i][j])
                at[i] = j
    return total


def _fill_up(bytes_: list[Numbers], at: list[int], total: int, budget: int, rng: np.random.Generator) -> None:
    waiting = list(range(len(bytes_)))
    while waiting:
        still = []
        for i in rng.permutation(waiting):
            extra = bytes_[i] - bytes_[i][at[i]]
            fitting = np.flatnonzero((extra > 0) & (extra <= budget - total))
            if len(fitting):
                j = int(rng.choice(fitting))
                total, at[i] = total + int(extra[j]), j
                still.append(int(i))
        waiting = still  # room only shrinks: what does not fit now never will


def _arrays(items: Sequence[Item]) -> tuple[list[Numbers], list[Numbers]]:
    for item in items:
        name = item.tensors[0] if item.tensors else "an item without tensors"
        if not item.choices:
            raise UsageError(name, "has no type to choose", "Allow more types with --types.")
        for choice in item.choices:
            if choice.bytes < 0 or not (math.isfinite(choice.kl) and choice.kl >= 0):
                reason = f"{choice.type} has {choice.bytes} bytes and a predicted KL of {choice.kl}"
                raise UsageError(name, reason, "Both must be finite and at least 0: measure the sensitivity again.")
    # As float64, in which sums of bytes stay exact below 2⁵³; a KL too small to mean anything counts as none.
    bytes_ = [np.array([choice.bytes for choice in item.choices], np.float64) for item in items]
    kls = [np.array([choice.kl if choice.kl > _NOTHING else 0.0 for choice in item.choices]) for item in items]
    return bytes_, kls


def _grain(items: Sequence[Item]) -> int:
    """The greatest number of bytes of which every difference between choices is a multiple."""
    differences = (choice.bytes - item.choices[0].bytes for item in items for choice in item.choices)
    return math.gcd(*differences) or 1


def _allocation(items: Sequence[Item], places: Sequence[int]) -> Allocation:
    chosen = tuple(item.choices[j] for item, j in zip(items, places, strict=True))
    kl = math.fsum(choice.kl for choice in chosen)
    return Allocation(chosen, sum(choice.bytes for choice in chosen), kl, 0.0)
