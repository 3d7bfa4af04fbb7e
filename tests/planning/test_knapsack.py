"""The knapsack against brute force, against an integer dynamic program, and on a model's shape."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from dither.errors import UsageError
from dither.formats.ggml import GGML_TYPES
from dither.planning import minimal_core
from dither.planning.knapsack import Allocation, Item, TypeChoice, allocate, random_allocation, smallest

# Sixteenths add up exactly, so ties are real ties; any floats find what rounding could do.
SIXTEENTHS = st.integers(0, 64).map(lambda k: k / 16)
KLS = st.one_of(SIXTEENTHS, st.floats(1e-25, 10))


def item_lists(kls: st.SearchStrategy[float] = KLS) -> st.SearchStrategy[list[Item]]:
    sizes = st.one_of(st.integers(0, 6), st.integers(0, 100), st.integers(0, 10**9))
    choice = st.builds(TypeChoice, st.just("Q"), sizes, kls)
    item = st.lists(choice, min_size=1, max_size=5).map(lambda choices: Item(("t",), tuple(choices)))
    return st.lists(item, min_size=1, max_size=5)


def make_items(*items: list[tuple[int, float]]) -> list[Item]:
    return [
        Item((f"t{i}",), tuple(TypeChoice(f"Q{j}", size, kl) for j, (size, kl) in enumerate(choices)))
        for i, choices in enumerate(items)
    ]


def everything(items: list[Item]) -> list[tuple[int, float]]:
    combinations = itertools.product(*(item.choices for item in items))
    return [(sum(c.bytes for c in chosen), math.fsum(c.kl for c in chosen)) for chosen in combinations]


def budgets(items: list[Item]) -> tuple[int, int]:
    return tuple(sum(pick(c.bytes for c in item.choices) for item in items) for pick in (min, max))


def check(items: list[Item], found: Allocation) -> None:
    """What is said of the choices is true of them."""
    assert all(choice in item.choices for item, choice in zip(items, found.chosen, strict=True))
    assert found.bytes == sum(choice.bytes for choice in found.chosen)
    assert found.kl == math.fsum(choice.kl for choice in found.chosen)


@settings(max_examples=500)
@given(item_lists(), st.floats(0, 1.1))
def test_allocate_is_brute_force(items: list[Item], part: float) -> None:
    low, high = budgets(items)
    budget = low + int(part * (high - low))
    found = allocate(items, budget)
    kl = min(kl for size, kl in everything(items) if size <= budget)
    check(items, found)
    assert found.bytes <= budget
    assert found.kl == pytest.approx(kl, rel=1e-11)
    assert found.bound == found.kl  # proven


@settings(max_examples=300)
@given(item_lists(SIXTEENTHS), st.floats(0, 1.1))
def test_equal_kl_takes_fewer_bytes(items: list[Item], part: float) -> None:
    low, high = budgets(items)
    budget = low + int(part * (high - low))
    found = allocate(items, budget)
    assert (found.kl, found.bytes) == min((kl, size) for size, kl in everything(items) if size <= budget)


@settings(max_examples=300)
@given(item_lists(), st.floats(0, 1))
def test_smallest_is_brute_force(items: list[Item], part: float) -> None:
    all_kls = sorted(kl for _, kl in everything(items))
    limit = all_kls[int(part * (len(all_kls) - 1))]  # reached exactly by some allocation
    found = smallest(items, limit)
    size, kl = min(pair for pair in everything(items) if pair[1] <= limit)
    check(items, found)
    assert found.bytes == size == found.bound
    assert found.kl <= limit and found.kl == pytest.approx(kl, rel=1e-11)


def integer_program(items: list[Item], budget: int) -> float:
    """The textbook's table over every byte, which shares nothing with the search."""
    least = np.zeros(budget + 1)
    for item in items:
        after = np.full(budget + 1, np.inf)
        for choice in item.choices:
            if choice.bytes <= budget:
                after[choice.bytes :] = np.minimum(
                    after[choice.bytes :], least[: budget + 1 - choice.bytes] + choice.kl
                )
        least = after
    return float(least[budget])


@pytest.mark.parametrize("seed", range(24))
def test_medium_instances_agree_with_an_integer_program(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, kinds = int(rng.integers(10, 60)), int(rng.integers(2, 12))
    sizes = rng.integers(0, 120, (n, kinds))
    if seed % 3 == 0:  # nothing in common
        kls = rng.random((n, kinds))
    elif seed % 3 == 1:  # nearly on a line: the hard kind
        kls = (130 - sizes) * (1 + 0.01 * rng.random((n, kinds)))
    else:  # as quantization is: a few bits more, a few times less
        kls = np.exp(rng.normal(size=(n, 1)) - sizes / 20 + 0.1 * rng.random((n, kinds)))
    items = make_items(
        *([(int(s), float(k)) for s, k in zip(*pair, strict=True)] for pair in zip(sizes, kls, strict=True))
    )
    low, high = budgets(items)
    for part in (0.0, 0.1, 0.37, 0.6, 0.9):
        budget = low + int(part * (high - low))
        found = allocate(items, budget)
        check(items, found)
        assert found.kl == pytest.approx(integer_program(items, budget), rel=1e-11)
        assert found.bound == found.kl and found.bytes <= budget
        assert smallest(items, found.kl).bytes == found.bytes


def test_no_items_and_one_choice() -> None:
    assert allocate([], 0) == Allocation((), 0, 0.0, 0.0)
    only = make_items([(7, 0.5)])
    assert allocate(only, 7) == allocate(only, 10**12) == Allocation(only[0].choices, 7, 0.5, 0.5)
    assert smallest(only, 0.5).bytes == 7


def test_a_huge_budget_takes_the_best_not_the_largest() -> None:
    items = make_items([(1, 3.0), (5, 1.0), (9, 1.0)], [(2, 0.0), (1, 0.0)])
    found = allocate(items, 10**15)
    assert [choice.bytes for choice in found.chosen] == [5, 1] and found.kl == 1.0


def test_choices_above_the_hull_are_taken_where_only_they_fit() -> None:
    items = make_items([(0, 10.0), (5, 9.0), (10, 0.0)])
    assert allocate(items, 9).bytes == 5 and allocate(items, 10).bytes == 10


def test_a_budget_met_exactly() -> None:
    items = make_items([(3, 5.0), (8, 1.0)], [(4, 5.0), (9, 2.0)])
    assert allocate(items, 17).bytes == 17 and allocate(items, 16).bytes == 12


def test_equal_bytes_and_zero_kl() -> None:
    items = make_items([(4, 2.0), (4, 1.0), (4, 3.0)], [(4, 0.0), (2, 0.0)])
    found = allocate(items, 8)
    assert (found.bytes, found.kl) == (6, 1.0)
    assert smallest(make_items([(4, 0.0), (3, 1.0)]), 0.0).bytes == 4


def test_what_cannot_be_met_names_the_way_out() -> None:
    items = make_items([(1000, 0.5), (3000, 0.25)], [(2000, 0.125)])
    with pytest.raises(UsageError, match=r"smallest types need 3000 bytes \(2.93 KiB\).*--types"):
        allocate(items, 2999)
    with pytest.raises(UsageError, match="smallest types need 3000 bytes"):
        random_allocation(items, 2999, 0)
    with pytest.raises(UsageError, match=r"0\.375 nats"):
        smallest(items, 0.37)


@pytest.mark.parametrize("kl", [math.nan, math.inf, -0.1])
def test_a_prediction_that_is_no_number_is_refused(kl: float) -> None:
    with pytest.raises(UsageError, match="t0: Q1 has 2 bytes and a predicted KL"):
        allocate(make_items([(1, 0.0), (2, kl)]), 5)
    with pytest.raises(UsageError, match="t: has no type"):
        allocate([Item(("t",), ())], 5)


TYPES = (
    "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0",
    "BF16", "Q3_K", "IQ4_NL", "Q5_0",
)  # fmt: skip


def seventy_billion(noise: float, seed: int = 0) -> list[Item]:
    """80 blocks of seven matrices, embedding and output, 15 types; KL falls 4-fold a bit, give or take."""
    rng = np.random.default_rng(seed)
    shapes = [8192 * 8192, 8192 * 1024, 8192 * 1024, 8192 * 8192, *[8192 * 28672] * 3]
    weights = [128256 * 8192] * 2 + shapes * 80
    items = []
    for i, count in enumerate(weights):
        sensitivity = count * 1e-9 * math.exp(noise * rng.normal())
        choices = tuple(
            TypeChoice(
                name,
                count // GGML_TYPES[name].block * GGML_TYPES[name].block_bytes,
                sensitivity * 4.0 ** -GGML_TYPES[name].bits_per_weight * math.exp(0.1 * noise * rng.normal()),
            )
            for name in TYPES
        )
        items.append(Item((f"t{i}",), choices))
    return items


@pytest.mark.parametrize("noise", [1.0, 0.0], ids=["measured", "every block alike"])
@pytest.mark.parametrize("bits", [2.6, 4.25, 6.0])
def test_a_70b_model_is_filled_and_proven(bits: float, noise: float) -> None:
    items = seventy_billion(noise)
    budget = int(70.55e9 * bits / 8)
    found = allocate(items, budget)
    check(items, found)
    assert 0.995 * budget < found.bytes <= budget
    assert found.bound == found.kl
    drawn = [random_allocation(items, budget, seed) for seed in range(4)]
    assert min(each.kl for each in drawn) > found.kl


def test_more_bytes_are_never_worse() -> None:
    items = seventy_billion(0.5)[:60]
    low, high = budgets(items)
    found = [allocate(items, low + (high - low) * k // 40) for k in range(41)]
    assert all(a.kl >= b.kl for a, b in itertools.pairwise(found))
    for each in found[:20]:
        back = smallest(items, each.kl)
        assert back.bytes == each.bytes and back.kl == each.kl


def test_thinned_searches_admit_their_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """All choices nearly on one line, a limit between their sums: too many states for a small memory."""
    rng = np.random.default_rng(5)
    items = make_items(
        *([(0, float(size) * (1 + 1e-3 * rng.random())), (int(size), 0.0)] for size in 1000 + rng.integers(0, 10, 40))
    )
    budget = 20_500
    best = integer_program(items, budget)
    monkeypatch.setattr(minimal_core, "_MADE", 80)
    found = allocate(items, budget)
    check(items, found)
    assert found.bytes <= budget
    assert found.bound < found.kl  # not proven, and it says so
    assert found.bound <= best <= found.kl * (1 + 1e-12)


@given(item_lists(), st.floats(0, 1.1), st.integers(0, 2**32 - 1))
def test_random_allocations_fit_and_leave_no_upgrade(items: list[Item], part: float, seed: int) -> None:
    low, high = budgets(items)
    budget = low + int(part * (high - low))
    found = random_allocation(items, budget, seed)
    check(items, found)
    assert found == random_allocation(items, budget, seed)
    assert found.bytes <= budget
    assert found.bound <= min(kl for size, kl in everything(items) if size <= budget) * (1 + 1e-11)
    for item, choice in zip(items, found.chosen, strict=True):
        larger = [other.bytes for other in item.choices if other.bytes > choice.bytes]
        assert all(found.bytes - choice.bytes + size > budget for size in larger)


def test_random_allocations_differ() -> None:
    items = seventy_billion(1.0)[:40]
    budget = sum(budgets(items)) // 3
    drawn = {random_allocation(items, budget, seed).chosen for seed in range(8)}
    assert len(drawn) == 8
    assert all(sum(choice.bytes for choice in chosen) > 0.98 * budget for chosen in drawn)
