"""One choice per item, least cost under a limit of weight: the multiple-choice knapsack, exactly.

1. *Hulls.*  Of every item only the choices on its lower convex hull matter to the relaxed problem.  Taking
   hull steps in falling order of gain per weight until the limit breaks solves it: the breaking step's gain λ
   is the Lagrange multiplier that bisection would converge to, the choices so far are the *base*, and base
   cost − λ · room left is a lower bound that no choice can beat (Sinha & Zoltners 1979).
2. *Core.*  The best choices differ from the base in few items, those with a step whose gain is nearly λ.
   Items join one by one, nearest first, in a dynamic program over states (weight, cost) in which only
   undominated states stay.  A state whose own bound, with the best gains the items still outside have to
   offer, cannot beat the best choices seen is dropped; so is a choice by its reduced cost.  When no state is
   left, or no item, the best seen is proven (Pisinger 1995, "A minimal algorithm for the multiple-choice
   knapsack problem"; Kellerer, Pferschy & Pisinger, *Knapsack Problems*, ch. 11).

Rounding.  Weights and costs are float64 and ≥ 0, and only sums of them are compared, so each comparison is
good to n · 2⁻⁵³.  Costs nearer than `_ROUNDING` (relative) are one cost: no better choices by more than that
exist.

Pathological instances (every choice of every item on one line, and the limit never met) would keep all sums
apart. To make no more than `_MADE` the states are thinned to even steps of cost, each standing in for more
costly neighbors that weigh more; what that may lose is added up, and the bound says so.  `_WORK` bounds the
time.

Legend: n items, J choices of one item, S states.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
Indices = npt.NDArray[Any]

_ROUNDING = 1e-12
_MADE = 2**23  # states that one item may make of those before; to stay below, states are thinned
_WORK = 5 * 10**7  # states made by all; beyond these, few are kept
_MADE_LATE = 2**17


@dataclass(frozen=True)
class Solution:
    chosen: tuple[int, ...]  # of every item, the place of its choice
    bound: float  # no choices cost less; the cost itself, as summed here, where `exact`
    exact: bool


@dataclass(frozen=True)
class _Item:
    """The undominated choices: weight rises, cost falls."""

    weight_J: Numbers
    cost_J: Numbers
    place_J: Indices  # where each stood among the choices given


@dataclass(frozen=True)
class Relaxed:
    """The relaxed problem's solution: base choices, the multiplier, the bound, and the base filled up."""

    base_n: list[int]
    slope: float  # λ, cost per weight; 0 where the limit binds nothing
    bound: float
    filled_n: list[int]


def undominated(weight_J: Numbers, cost_J: Numbers) -> Indices:
    """Places of the choices for which none is as light and as cheap, lightest first."""
    # By weight, and by cost among equal weights; then whoever is no cheaper than all lighter ones goes.
    order = np.lexsort((cost_J, weight_J))
    cheapest = np.minimum.accumulate(np.concatenate([[np.inf], cost_J[order]]))[:-1]
    kept: Indices = order[cost_J[order] < cheapest]
    return kept


def relax(items: Sequence[tuple[Numbers, Numbers]], limit: float) -> Relaxed:
    """Step 1, for items of (weights, costs) in which weight rises and cost falls.

    The lightest choices must be within the limit.  `filled_n` takes, behind the breaking step, every later
    step that still fits.
    """
    # Along each hull gains fall, so one sorted list takes every item's steps in their own order.
    steps = sorted(
        (-gain, i, j) for i, item in enumerate(items) for gain, j in _hull(item[0].tolist(), item[1].tolist())
    )
    base = [0] * len(items)
    weight = math.fsum(float(weight_J[0]) for weight_J, _ in items)
    filled: list[int] | None = None
    slope = room = 0.0
    for gain, i, j in steps:
        weight_J = items[i][0]
        at = base if filled is None else filled
        # Of one item the steps follow each other; where one did not fit, the next leaps over it.
        after = weight + float(weight_J[j] - weight_J[at[i]])
        if after <= limit:
            at[i], weight = j, after
        elif filled is None:
            # The first that breaks the limit: its gain is the multiplier, and the base is what came before.  What
            # fits behind it goes into a copy, a first answer that the search has to beat.
            slope, room, filled = -gain, limit - weight, list(base)
    # Could the room that is left be filled at the breaking step's gain, nothing would cost less: the lower bound.
    cost = math.fsum(float(item[1][j]) for item, j in zip(items, base, strict=True))
    return Relaxed(base, slope, max(0.0, cost - slope * room), base if filled is None else filled)


def _hull(weight: list[float], cost: list[float]) -> list[tuple[float, int]]:
    """(gain per weight, choice) of the steps along the lower convex hull: gains fall."""
    steps: list[tuple[float, int]] = []
    for j in range(1, len(weight)):
        # A step that gains no less than the one before it means that the corner between them lies above the
        # hull: the corner goes, and the step starts from the corner before.
        while True:
            origin = steps[-1][1] if steps else 0
            gain = (cost[origin] - cost[j]) / (weight[j] - weight[origin])
            if not steps or gain < steps[-1][0]:
                break
            steps.pop()
        steps.append((gain, j))
    return steps


def solve(
    items: Sequence[tuple[Numbers, Numbers]], limit: float, *, weight_grain: float = 0.0, cost_grain: float = 0.0
) -> Solution:
    """The place of one choice per item with the least Σ cost such that Σ weight ≤ limit.

    `items` are (weight_J, cost_J), all ≥ 0, of which the lightest fit.  Grains are what all differences are
    multiples of, where they are integers: with `weight_grain` the lower weight decides between equal costs.
    """
    kept = [_Item(weight[at], cost[at], at) for weight, cost in items for at in [undominated(weight, cost)]]
    relaxed = relax([(item.weight_J, item.cost_J) for item in kept], limit)
    # Without a breaking step everything fitted: the base holds every item's cheapest choice.
    search = _Search(kept, relaxed, limit, weight_grain, cost_grain)
    best_n = search.run() if relaxed.slope else relaxed.base_n
    exact = search.lost == 0
    bound = search.best_cost if exact else max(relaxed.bound, search.best_cost - search.lost)
    chosen = tuple(int(item.place_J[j]) for item, j in zip(kept, best_n, strict=True))
    return Solution(chosen, bound, exact)


class _Search:
    """Step 2.  `others_*` is what the base gives for the items that are not in the states."""

    def __init__(
        self, items: Sequence[_Item], relaxed: Relaxed, limit: float, weight_grain: float, cost_grain: float
    ) -> None:
        self.items, self.relaxed, self.limit = items, relaxed, limit
        self.grain, self.cost_grain = weight_grain, cost_grain
        self.lost = 0.0  # what thinning may have cost
        self.best_n = relaxed.filled_n
        pairs = list(zip(items, self.best_n, strict=True))
        self.best_weight = math.fsum(float(item.weight_J[j]) for item, j in pairs)
        self.best_cost = math.fsum(float(item.cost_J[j]) for item, j in pairs)
        self.best_at: tuple[int, int] | None = None  # stage and state, where it is not `best_n`
        self.history: list[tuple[int, Indices, Indices]] = []  # item, parent_S, choice_S

    def run(self) -> list[int]:
        # How near an item's best way up or down comes to the multiplier says how likely it leaves the base:
        # the likeliest first, because good states that are met early cut off most of the others.
        gains = [_gains(item, j) for item, j in zip(self.items, self.relaxed.base_n, strict=True)]
        slope = self.relaxed.slope
        order = sorted(range(len(gains)), key=lambda i: min(slope - gains[i][0], gains[i][1] - slope))
        # For every stage k, of the items from k on that are still outside: what the base gives for them
        # together, the most any of them saves per weight, and the least any of them costs per weight.
        base = [
            (self.items[i].weight_J[j], self.items[i].cost_J[j])
            for i, j in ((i, self.relaxed.base_n[i]) for i in order)
        ]
        rest = np.cumsum([(0.0, 0.0), *reversed(base)], axis=0)[::-1]
        up = np.maximum.accumulate([0.0, *(gains[i][0] for i in reversed(order))])[::-1]
        down = np.minimum.accumulate([np.inf, *(gains[i][1] for i in reversed(order))])[::-1]
        skipped = np.zeros(2)
        weight_S = cost_S = np.zeros(1)
        work, widest = 0, max(len(item.weight_J) for item in self.items)
        for k, i in enumerate(order):
            choices = self._worth_trying(i)
            # Only the base's own choice has hope: the item stays outside for good, with what the base gives.
            if len(choices) == 1:
                skipped += base[k]
                continue
            work += len(weight_S) * len(choices)
            weight_S, cost_S = self._join(
                i, choices, weight_S, cost_S, skipped + rest[k + 1], float(up[k + 1]), float(down[k + 1])
            )
            weight_S, cost_S = self._thin(weight_S, cost_S, (_MADE if work < _WORK else _MADE_LATE) // widest)
            # No state can beat the best any more: that is the proof.
            if not len(weight_S):
                break
            self._remember(weight_S, cost_S, skipped + rest[k + 1])
        return self._best()

    def _worth_trying(self, i: int) -> Indices:
        """The choices whose reduced cost leaves hope, the base's own among them."""
        item, j, slope = self.items[i], self.relaxed.base_n[i], self.relaxed.slope
        extra_J = (item.cost_J - item.cost_J[j]) + slope * (item.weight_J - item.weight_J[j])
        # The bound, with this item forced to a choice instead of the base's: it rises by the reduced cost.
        bound_J = self.relaxed.bound + extra_J
        hope_J = bound_J < self.best_cost - self._margin
        # Or as cheap and lighter by a grain: the same bound with a limit that much below the best's weight.
        if self.grain:
            lighter = self.best_weight - self.grain
            hope_J |= bound_J + slope * (self.limit - lighter) <= self.best_cost + self._margin
        hope_J[j] = True
        return np.flatnonzero(hope_J)

    def _join(
        self, i: int, choices: Indices, weight_S: Numbers, cost_S: Numbers, others: Numbers, up: float, down: float
    ) -> tuple[Numbers, Numbers]:
        """All states with every choice of item i, those that have hope and are undominated, by weight."""
        item = self.items[i]
        made = []
        # Hopeless states are dropped before the rest are put in order.
        for j in choices:
            weight_S1, cost_S1 = weight_S + item.weight_J[j], cost_S + item.cost_J[j]
            at = np.flatnonzero(self._hope(weight_S1 + others[0], cost_S1 + others[1], up, down))
            made.append((weight_S1[at], cost_S1[at], at.astype(np.int32), np.full(len(at), j, np.int16)))
        weight_S2, cost_S2, parent_S2, choice_S2 = map(np.concatenate, zip(*made, strict=True))
        at = np.argsort(weight_S2, kind="stable")  # runs that are sorted already: merged, not sorted
        # A state stays if it is cheaper than all that are lighter, as in `undominated`.
        found = cost_S2[at]
        least = np.minimum.accumulate(np.concatenate([[np.inf], found]))[:-1]
        at = at[found < least]
        if len(at) > 1:  # of equal weights the last is the cheapest
            at = at[np.append(np.diff(weight_S2[at]) > 0, True)]
        # Which state and which choice each came from: `_best` walks this back to the choices.
        self.history.append((i, parent_S2[at], choice_S2[at]))
        return weight_S2[at], cost_S2[at]

    def _hope(self, weight_S: Numbers, cost_S: Numbers, up: float, down: float) -> npt.NDArray[np.bool_]:
        """Which states may still lead to something better: cheaper, or as cheap and lighter."""
        hope_S = _bound(weight_S, cost_S, self.limit, up, down) < self.best_cost - self._margin
        if self.grain:
            lighter = self.best_weight - self.grain
            hope_S |= _bound(weight_S, cost_S, lighter, up, down) <= self.best_cost + self._margin
        return hope_S

    @property
    def _margin(self) -> float:
        return max(_ROUNDING * self.best_cost, self.cost_grain / 2)

    def _thin(self, weight_S: Numbers, cost_S: Numbers, most: int) -> tuple[Numbers, Numbers]:
        """At most `most` states: of each step of cost the lightest, which is its most costly."""
        if len(weight_S) <= most:
            return weight_S, cost_S
        # Weight rises and cost falls along the states.  Of a step the first, lightest one is kept: it fits
        # wherever the others would, and costs at most a step more than the last of them, which is added up.
        step = float(cost_S[0] - cost_S[-1]) / (most - 1)
        bucket_S = ((cost_S[0] - cost_S) // step).astype(np.int64)
        first_S = np.flatnonzero(np.append(True, np.diff(bucket_S) > 0))
        last_S = np.append(first_S[1:], len(cost_S)) - 1
        self.lost += float((cost_S[first_S] - cost_S[last_S]).max())
        item, parent_S, choice_S = self.history[-1]
        self.history[-1] = (item, parent_S[first_S], choice_S[first_S])
        return weight_S[first_S], cost_S[first_S]

    def _remember(self, weight_S: Numbers, cost_S: Numbers, others: Numbers) -> None:
        """The cheapest state within the limit, where it beats the best; cost falls as weight rises."""
        # Completed with the base's choices for all items outside, the heaviest state that fits is the cheapest.
        at = int(np.searchsorted(weight_S + others[0], self.limit, side="right")) - 1
        if at < 0:
            return
        cost = float(cost_S[at] + others[1])
        # Of states that cost the same but for rounding the lightest, where fewer bytes decide.
        same_S = cost_S[: at + 1] + others[1] <= cost + self._margin
        at = int(np.argmax(same_S)) if self.grain else at
        weight, cost = float(weight_S[at] + others[0]), float(cost_S[at] + others[1])
        cheaper = cost < self.best_cost - self._margin
        if cheaper or (cost <= self.best_cost + self._margin and weight < self.best_weight):
            self.best_cost = cost if cheaper else min(cost, self.best_cost)
            self.best_weight, self.best_at = weight, (len(self.history), at)

    def _best(self) -> list[int]:
        if self.best_at is None:
            return self.best_n
        stages, state = self.best_at
        best_n = list(self.relaxed.base_n)
        for item, parent_S, choice_S in reversed(self.history[:stages]):
            best_n[item], state = int(choice_S[state]), int(parent_S[state])
        return best_n


def _gains(item: _Item, base: int) -> tuple[float, float]:
    """Most cost saved per weight added, least cost added per weight saved, moving away from the base."""
    weight_J, cost_J = item.weight_J - item.weight_J[base], item.cost_J - item.cost_J[base]
    up = float((-cost_J[base + 1 :] / weight_J[base + 1 :]).max(initial=0.0))
    down = float((-cost_J[:base] / weight_J[:base]).min(initial=np.inf))
    return up, down


def _bound(weight_S: Numbers, cost_S: Numbers, limit: float, up: float, down: float) -> Numbers:
    """The least cost a state can end with: room is filled at gain `up`, excess is shed at price `down`."""
    room_S = limit - weight_S
    shed_S = np.multiply(-room_S, down, out=np.zeros_like(room_S), where=room_S < 0)
    bound: Numbers = cost_S - up * np.maximum(room_S, 0.0) + shed_S
    return bound
