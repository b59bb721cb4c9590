"""Allocation against an exhaustive search and against Lagrange's bound."""

import itertools
from dataclasses import replace
from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.compress.allocate import GAP, Choice, Limits, allocate
from exporter.planning.budget import SPEED_KL, Budget, chosen
from exporter.planning.resolve import PREFERENCES
from exporter.predict.roofline import Cpu
from exporter.targets.contract import load_target
from exporter.targets.gguf.formats.ggml import ggml_format

pytestmark = pytest.mark.slow

FORMAT = ggml_format("Q8_0")
SHARES = st.floats(0.0, 1.0)
NAMES = ("bytes", "decode_s", "prefill_s")


def problem(seed: int, storages: int, formats: int) -> list[list[Choice]]:
    """Choices whose KL falls about fourfold for each bit, as rounding errors do, and whose times follow no rule."""
    chance = np.random.default_rng(seed)
    found = []
    for _ in range(storages):
        size, scale = int(chance.integers(10, 1000)), float(chance.lognormal(0, 2))
        bits = np.sort(chance.choice(np.arange(2, 9), formats, replace=False))
        times = chance.uniform(0.5, 2, (formats, 2)) * size * 1e-9
        found.append(
            [
                Choice(FORMAT, size * int(b), scale * 4.0**-b * float(chance.uniform(0.7, 1.4)), *map(float, pair))
                for b, pair in zip(bits, times, strict=True)
            ]
        )
    return found


def total(choices: list[Choice], name: str) -> float:
    return sum(getattr(choice, name) for choice in choices)


def between(choices: list[list[Choice]], name: str, share: float) -> float:
    least, most = (sum(pick(getattr(c, name) for c in some) for some in choices) for pick in (min, max))
    return least + share * (most - least)


def within(some: list[Choice], limits: Limits) -> bool:
    return all(total(some, name) <= limit for name, limit in vars(limits).items())


@given(
    seed=st.integers(0, 10_000),
    shares=st.tuples(SHARES, st.one_of(st.none(), SHARES), st.one_of(st.none(), SHARES)),
)
def test_it_is_the_best_of_all_and_never_over_a_limit(seed: int, shares: tuple[float | None, ...]) -> None:
    choices = problem(seed, 5, 4)
    limits = Limits(
        **{
            name: inf if share is None else between(choices, name, share)
            for name, share in zip(NAMES, shares, strict=True)
        }
    )
    every = [list(one) for one in itertools.product(*choices) if within(list(one), limits)]
    found = allocate(choices, limits)
    if found is None:
        # The solver keeps a hair's breadth away from its limits.
        assert all(any(total(one, name) > (1 - 1e-7) * getattr(limits, name) for name in NAMES) for one in every)
        return
    assert within(found, limits)
    assert all(choice in some for choice, some in zip(found, choices, strict=True))
    inside = [one for one in every if all(total(one, name) <= (1 - 1e-7) * getattr(limits, name) for name in NAMES)]
    if inside:
        assert total(found, "kl") <= min(total(one, "kl") for one in inside) * (1 + 2 * GAP)


def test_with_many_storages_it_is_within_its_gap_of_the_bound() -> None:
    choices = problem(0, 200, 5)
    budget = sum(some[2].bytes for some in choices)
    found = allocate(choices, Limits(bytes=budget))
    assert found is not None
    prices = np.geomspace(1e-12, 1, 20_000)
    bytes_of = np.array([[c.bytes for c in some] for some in choices])
    kl_of = np.array([[c.kl for c in some] for some in choices])
    # Lagrange's bound: no allocation within the budget is better than min(kl + price * bytes) - price * budget.
    bound = max(float((kl_of + price * bytes_of).min(axis=1).sum() - price * budget) for price in prices)
    assert bound <= total(found, "kl") <= 1.001 * bound


def test_where_the_best_takes_too_long_to_prove_the_best_so_far_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    # What one choice spares of all limits together is what it costs, so that bounds tell nothing.
    used = np.random.default_rng(1).integers(1, 1000, (20, 2, 3))
    choices = [
        [Choice(FORMAT, int(a), float(3000 - a - b - c), float(b), float(c)) for a, b, c in some] for some in used
    ]
    limits = Limits(**{name: between(choices, name, 0.5) for name in NAMES})
    best = allocate(choices, limits)
    assert best is not None
    costs = {}
    for most_nodes in (0, 10):
        monkeypatch.setattr("exporter.compress.allocate.MOST_NODES", most_nodes)
        found = allocate(choices, limits)
        assert found is not None and within(found, limits) and found == allocate(choices, limits)
        costs[most_nodes] = total(found, "kl")
    assert total(best, "kl") < costs[10] <= 1.05 * total(best, "kl")
    # Nothing was found by then, so that the search went on.
    assert costs[0] == total(best, "kl")


def test_the_smallest_budget_is_met_and_nothing_fits_a_smaller_one() -> None:
    choices = problem(1, 3, 3)
    smallest = sum(min(choice.bytes for choice in some) for some in choices)
    assert allocate(choices, Limits(bytes=smallest - 1)) is None
    found = allocate(choices, Limits(bytes=smallest))
    assert found is not None and total(found, "bytes") == smallest


def budget(limits: Limits, prefer: str, no_slower_than_stock: Limits) -> Budget:
    made = Budget(limits, 0, [], prefer, load_target("gguf"), Cpu(1e9, 1e9), [])
    vars(made)["no_slower_than_stock"] = no_slower_than_stock
    return made


@given(seed=st.integers(0, 1000), share=st.floats(0.0, 1.0))
def test_speed_costs_no_more_kl_than_it_may_and_none_is_slower_than_stock(seed: int, share: float) -> None:
    choices = problem(seed, 12, 5)
    limits = Limits(bytes=between(choices, "bytes", 0.5))
    no_slower_than_stock = replace(limits, decode_s=between(choices, "decode_s", share))
    balanced, accurate, quick = (
        chosen(budget(limits, prefer, no_slower_than_stock), choices) for prefer in PREFERENCES
    )
    assert all(within(some, limits) for some in (balanced, accurate, quick))
    assert accurate == allocate(choices, limits)
    assert total(quick, "kl") <= SPEED_KL * total(balanced, "kl")
    assert within(balanced, no_slower_than_stock) or allocate(choices, no_slower_than_stock) is None
    seconds = [512 * total(some, "prefill_s") + 128 * total(some, "decode_s") for some in (balanced, quick)]
    assert seconds[1] <= seconds[0] * (1 + GAP)
