"""PruneNet's policy: its parts against naive ones, what it learns, and every quirk."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exporter.calibrate.statistics import collect
from exporter.calibrate.windows import Windows
from exporter.compress import prunenet
from exporter.compress.prune import Pruned, losses
from exporter.compress.prunenet import PUBLISHED, PruneNetOptions, kolmogorov_smirnov, learned, prune, singular_values
from exporter.formats.format import Float32
from exporter.foundation.errors import RequestError
from exporter.model.model import Model
from exporter.model.sources import open_model
from exporter.model.tensors import TensorSource
from tests.models import tiny_model


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    with open_model(str(tiny_model(tmp_path / "model"))) as opened:
        yield opened


@given(first=st.lists(st.integers(0, 9), min_size=1), second=st.lists(st.integers(0, 9), min_size=1))
def test_the_distance_of_two_samples(first: list[int], second: list[int]) -> None:
    def share(sample: list[int], most: int) -> float:
        return sum(value <= most for value in sample) / len(sample)

    expected = max(abs(share(first, most) - share(second, most)) for most in range(10))
    found = kolmogorov_smirnov(np.sort(np.array(first, float)), np.sort(np.array(second, float)))
    assert found == pytest.approx(expected)


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), seed=st.integers(0, 99))
def test_singular_values(rows: int, columns: int, seed: int) -> None:
    matrix = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    expected = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[::-1]
    np.testing.assert_allclose(singular_values(torch.from_numpy(matrix)), expected, rtol=1e-5, atol=1e-7)


def test_the_network_is_that_of_the_paper() -> None:
    network = prunenet._Network(6, 10)
    gate = torch.randn(8, 6)
    z = gate @ network.project.weight.T + network.project.bias
    torch.testing.assert_close(network(gate), z @ network.read)
    assert 0 <= float(network.read.detach().min()) <= float(network.read.detach().max()) < 1


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_probabilities_of_all_draws_sum_to_one(count: int) -> None:
    logits = torch.randn(5, generator=torch.Generator().manual_seed(0))
    draws = [torch.tensor(rows) for rows in permutations(range(5), count)]
    total = sum(float(prunenet._log_probability(logits, rows, True).exp()) for rows in draws)
    assert total == pytest.approx(1, rel=1e-5)
    # What is published is not a probability.
    assert sum(float(prunenet._log_probability(logits, rows, False).exp()) for rows in draws) != pytest.approx(
        1, rel=0.01
    )


def test_torch_draws_in_the_order_that_the_probability_is_of() -> None:
    """Of three rows, how often each pair comes in which order."""
    logits = torch.tensor([2.0, 0.0, -1.0])
    chance = torch.Generator().manual_seed(0)
    counts = dict.fromkeys(permutations(range(3), 2), 0)
    for _ in range(20_000):
        counts[tuple(prunenet._drawn(logits, 2, chance).tolist())] += 1
    for rows, count in counts.items():
        expected = math.exp(float(prunenet._log_probability(logits, torch.tensor(rows), True)))
        assert count / 20_000 == pytest.approx(expected, abs=0.015)


# What follows the reward, which is not the default.
FOLLOWING = PruneNetOptions(0.5, baseline=True, exact_probability=True, same_noise=True, clip=1.0)


def test_it_learns_which_rows_carry_the_spectrum() -> None:
    """Half of the rows are nearly nothing, and a direction tells which: without them the spectrum stays as it is."""
    chance = torch.Generator().manual_seed(0)
    gate = torch.randn(64, 16, generator=chance) * 1e-3
    gate[::2] = torch.randn(32, 16, generator=chance)
    gate[:, 0] = torch.arange(64).remainder(2) * -4.0 + 2.0
    rewards = learn(gate, replace(FOLLOWING, episodes=150, learning_rate=1e-2)).rewards
    assert rewards[-50:].mean() > 1.5 * rewards[:20].mean()


def learn(gate: torch.Tensor, options: PruneNetOptions) -> prunenet.Policy:
    return prunenet.follow_rewards([gate], options, lambda done, total: None)


def test_a_policy_serves_every_ratio(model: Model) -> None:
    policy = learned(model, PruneNetOptions(0.5, episodes=3))
    for ratio, width in ((2 / 3, 32), (1 / 3, 64)):
        assert prune(model, policy, ratio, 16).model.decoder.intermediate == (width, width)


def test_channels_are_taken_out_of_all_three_matrices(model: Model) -> None:
    policy = learned(model, PruneNetOptions(0.5, episodes=2))
    found = prune(model, policy, 1 / 3, 32)
    assert found.ratio == pytest.approx(1 / 3)
    assert found.predicted_kl is None
    for layer, kept in enumerate(policy.kept(model, (64, 64))):
        for role, axis in (("gate", 0), ("up", 0), ("down", 1)):
            name = f"model.layers.{layer}.mlp.{role}_proj.weight"
            np.testing.assert_array_equal(found.model.read(name), model.read(name).take(kept, axis))


@dataclass(frozen=True)
class Rescaled:
    """The same function with a normalisation's gains divided, and the columns behind them multiplied."""

    tensors: TensorSource
    by: Float32

    @property
    def files(self) -> list[Path]:
        return self.tensors.files

    def read(self, name: str) -> Float32:
        if name.endswith("post_attention_layernorm.weight"):
            return self.tensors.read(name) / self.by
        return self.tensors.read(name) * self.by if re.search(r"mlp\.(gate|up)_proj", name) else self.tensors.read(name)


def test_one_function_is_pruned_alike_however_it_is_stored(model: Model) -> None:
    # Powers of two, so that nothing is rounded.
    by = (2.0 ** np.random.default_rng(0).integers(-3, 4, model.decoder.hidden)).astype(np.float32)
    other = replace(model, tensors=Rescaled(model.tensors, by), changes="rescaled")
    for options, alike in (
        (PruneNetOptions(0.5, episodes=2), True),
        (replace(PruneNetOptions(0.5, episodes=2), folded=False), False),
    ):
        kept, also = (np.array(learned(one, options).kept(one, (64, 64))) for one in (model, other))
        assert np.array_equal(kept, also) is alike


@given(logits=st.lists(st.floats(-800, 800), min_size=1, max_size=40), data=st.data())
def test_rows_stay_in_proportion_to_their_chances(logits: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(logits)))
    logarithms = torch.nn.functional.logsigmoid(torch.tensor(logits, dtype=torch.float64)).numpy()
    rows = prunenet.spread(logarithms, count)
    assert len(rows) == count
    assert (np.diff(rows) > 0).all()
    assert 0 <= rows[0] <= rows[-1] < len(logits)
    # A row that stays for certain is one whose share of the rows that are left would be above one.
    certain: set[int] = set()
    weights = np.maximum(np.exp(logarithms - logarithms.max()), 1e-300)
    while True:
        rest = [row for row in range(len(logits)) if row not in certain]
        total = sum(weights[row] for row in rest)
        over = {row for row in rest if (count - len(certain)) * weights[row] >= total}
        if not over:
            break
        certain |= over
    assert certain <= set(rows.tolist())
    expected = 0.0
    for row in rest:
        expected += (count - len(certain)) * weights[row] / total
        stayed = sum(kept not in certain and kept <= row for kept in rows.tolist())
        assert abs(stayed - expected) <= 0.5 + 1e-6


def test_the_same_seed_learns_the_same_and_only_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    first = learned(model, PruneNetOptions(episodes=2))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = prunenet._learn(model, PruneNetOptions(episodes=2), lambda done, total: None)
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(first.direction, again.direction)
    other = learned(model, PruneNetOptions(episodes=2, seed=1))
    assert not np.array_equal(first.direction, other.direction)
    monkeypatch.setattr(prunenet, "_learn", lambda *_: pytest.fail("learned again"))
    np.testing.assert_array_equal(learned(model, PruneNetOptions(episodes=2)).direction, first.direction)
    with pytest.raises(pytest.fail.Exception, match="learned again"):
        learned(model, PruneNetOptions(episodes=3))


SWITCHES = {
    "keep_best": False, "baseline": False, "exact_probability": False, "same_noise": False, "clip": None,
    "regularisation": 0.1, "discount": 0.5, "learning_rate": 1e-2, "folded": False,
}  # fmt: skip


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_changes_what_is_learned(model: Model, switch: str) -> None:
    options = replace(FOLLOWING, episodes=6, clip=1e-3)
    plain = learned(model, options)
    other = learned(model, replace(options, **{switch: SWITCHES[switch]}))
    assert not np.array_equal(plain.direction, other.direction)


def test_the_best_policy_is_the_one_that_earned_most(model: Model) -> None:
    best = learned(model, PruneNetOptions(0.5, episodes=6))
    number = int(best.rewards.argmax())
    # The policy of an episode is what all episodes before it made.
    before = PruneNetOptions(0.5, episodes=number, keep_best=False) if number else None
    if before is not None:
        np.testing.assert_array_equal(best.direction, learned(model, before).direction)
    last = learned(model, PruneNetOptions(0.5, episodes=6, keep_best=False))
    np.testing.assert_array_equal(best.rewards, last.rewards)


def test_as_published_the_mask_is_drawn_by_the_seed(model: Model) -> None:
    policy = learned(model, replace(PUBLISHED, episodes=2))
    first, again = (policy.kept(model, (64, 64)) for _ in range(2))
    np.testing.assert_array_equal(np.array(first), np.array(again))
    reseeded = replace(policy, options=replace(policy.options, seed=1)).kept(model, (64, 64))
    assert not np.array_equal(np.array(first), np.array(reseeded))
    assert all((np.diff(kept) > 0).all() for kept in first)


@pytest.mark.parametrize("options", [PruneNetOptions(episodes=2), replace(PUBLISHED, episodes=2)])
def test_statistics_choose_among_masks_of_the_policy(model: Model, options: PruneNetOptions) -> None:
    windows = Windows.of(np.random.default_rng(0).integers(2, 200, (8, 48)), "file", 0)
    statistics = collect(model, windows, 0, lambda done, total: None)
    policy = learned(model, options)
    own = policy.kept(model, (64, 64))
    np.testing.assert_array_equal(policy.kept(model, (64, 64), statistics, 0), own)
    chosen = [policy.kept(model, (64, 64), statistics, draws) for draws in (8, 64)]
    for layer in range(2):
        costs = losses(model, statistics, layer, [own[layer], *(kept[layer] for kept in chosen)])
        assert costs[0] > costs[1] >= costs[2]
    again = prune(model, policy, 1 / 3, 32, statistics, 64).model
    assert again.digest == prune(model, policy, 1 / 3, 32, statistics).model.digest
    assert again.digest == Pruned.of(model, chosen[1], {}).model.digest


def test_a_spectrum_that_stays_earns_most() -> None:
    gate = torch.zeros(6, 3)
    policy = learn(gate, PruneNetOptions(0.5, episodes=1))
    assert policy.rewards.tolist() == [prunenet.MOST_REWARD]


def test_layers_of_different_widths(model: Model) -> None:
    uneven = prune(model, learned(model, PruneNetOptions(episodes=1)), 1 / 3, 32).model
    policy = learned(uneven, PruneNetOptions(episodes=1))
    assert [len(kept) for kept in policy.kept(uneven, (32, 16))] == [32, 16]


def test_no_episodes_are_refused(model: Model) -> None:
    with pytest.raises(RequestError, match="PruneNet cannot learn; got 0 episodes, expected 1 or more"):
        learned(model, PruneNetOptions(episodes=0))


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_an_impossible_ratio_is_refused(model: Model, ratio: float) -> None:
    with pytest.raises(RequestError, match="the share to prune is impossible"):
        learned(model, PruneNetOptions(ratio))
    with pytest.raises(RequestError, match="the share to prune is impossible"):
        prune(model, learned(model, PruneNetOptions(episodes=1)), ratio, 32)


def test_a_family_without_a_gate_is_refused(model: Model) -> None:
    family = replace(model.decoder.family, gated=False)
    plain = replace(model, decoder=replace(model.decoder, family=family))
    with pytest.raises(RequestError, match="is not gated"):
        learned(plain, PruneNetOptions())
