"""Allocation against an exhaustive search."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.compress.allocate import Choice, allocate
from exporter.errors import RequestError
from exporter.weights.ggml import ggml_format

FORMAT = ggml_format("Q8_0")


def problem(seed: int, storages: int, formats: int) -> list[list[Choice]]:
    """Choices whose KL falls about fourfold for each bit, as rounding errors do."""
    chance = np.random.default_rng(seed)
    found = []
    for _ in range(storages):
        size, scale = int(chance.integers(10, 1000)), float(chance.lognormal(0, 2))
        bits = np.sort(chance.choice(np.arange(2, 9), formats, replace=False))
        found.append([Choice(FORMAT, size * int(b), scale * 4.0**-b * float(chance.uniform(0.7, 1.4))) for b in bits])
    return found


@given(seed=st.integers(0, 10_000), share=st.floats(0.0, 1.0))
def test_it_is_near_the_best_of_all_and_never_over_the_budget(seed: int, share: float) -> None:
    choices = problem(seed, 6, 4)
    least, most = (sum(pick(c.bytes for c in some) for some in choices) for pick in (min, max))
    budget = int(least + share * (most - least))
    chosen = allocate(choices, budget)
    assert sum(choice.bytes for choice in chosen) <= budget
    assert all(choice in some for choice, some in zip(chosen, choices, strict=True))
    every = itertools.product(*choices)
    best = min(sum(c.kl for c in one) for one in every if sum(c.bytes for c in one) <= budget)
    # A single multiplier reaches the convex hull; between its corners the greedy filling is close. More storages,
    # as real models have them, come closer still.
    dearest = max(max(c.kl for c in some) - min(c.kl for c in some) for some in choices)
    assert sum(choice.kl for choice in chosen) <= best + dearest


def test_with_many_storages_it_is_within_a_percent_of_the_bound() -> None:
    choices = problem(0, 200, 5)
    budget = sum(some[2].bytes for some in choices)
    chosen = allocate(choices, budget)
    prices = np.geomspace(1e-12, 1, 20_000)
    bytes_of = np.array([[c.bytes for c in some] for some in choices])
    kl_of = np.array([[c.kl for c in some] for some in choices])
    # Lagrange's bound: no allocation within the budget is better than min(kl + price * bytes) - price * budget.
    bound = max(float((kl_of + price * bytes_of).min(axis=1).sum() - price * budget) for price in prices)
    assert bound <= sum(choice.kl for choice in chosen) <= 1.01 * bound


def test_a_budget_below_the_smallest_is_refused_with_what_is_needed() -> None:
    choices = problem(1, 3, 3)
    smallest = sum(min(choice.bytes for choice in some) for some in choices)
    with pytest.raises(RequestError, match=f"no choice of formats is so small; .* expected at least {smallest:,}"):
        allocate(choices, smallest - 1)
    assert sum(choice.bytes for choice in allocate(choices, smallest)) == smallest
