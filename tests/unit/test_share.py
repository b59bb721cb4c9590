"""As many parts are kept plain as a floor of tokens/s takes, and no more."""

import pytest

from exporter.targets.onnx.plain_weight_budget import PlainWeightBudget

SIZES = {f"layers.{number}": 100 for number in range(10)} | {"head": 400}
COSTS = dict.fromkeys(SIZES, 0.02) | {"head": 0.04}


def token(share: PlainWeightBudget, rest: float) -> float:
    """One token: every part that is not kept says its cost, and all of it takes its time."""
    spent = [name for name in SIZES if name not in share.kept]
    for name in spent:
        share.spent(name, COSTS[name])
    took = rest + sum(COSTS[name] for name in spent)
    share.adapt(took)
    return took


def settled(share: PlainWeightBudget, rest: float) -> float:
    for _ in range(40):
        took = token(share, rest)
    return took


def test_nothing_is_kept_without_a_floor() -> None:
    share = PlainWeightBudget(SIZES)
    settled(share, 1.0)
    assert not share.kept and share.settled


@pytest.mark.parametrize("tokens_per_s", [3.5, 4, 5, 8, 15])
def test_a_floor_is_held_by_the_fewest_bytes(tokens_per_s: float) -> None:
    share = PlainWeightBudget(SIZES, tokens_per_s)
    took = settled(share, 0.05)
    assert share.settled and not share.exhausted
    assert took <= 1 / tokens_per_s
    assert share.tokens_per_s == pytest.approx(1 / took)
    # One more coded, and there would be no more to spare.
    assert took + min(COSTS.values()) > 1 / tokens_per_s / 1.1
    # The head saves less for its bytes than a layer.
    if took > 0.05 + COSTS["head"]:
        assert "head" not in share.kept


def test_more_is_kept_under_load_and_stays() -> None:
    share = PlainWeightBudget(SIZES, 4)
    settled(share, 0.02)
    few = len(share.kept)
    assert settled(share, 0.1) <= 0.25
    many = set(share.kept)
    assert few < len(many)
    settled(share, 0.02)
    assert share.kept == many


def test_a_floor_that_cannot_be_held_is_told() -> None:
    share = PlainWeightBudget(SIZES, 50)
    assert settled(share, 0.05) == pytest.approx(0.05)
    assert share.exhausted and not share.settled
    assert share.kept == set(SIZES)
    assert share.tokens_per_s == pytest.approx(20)
