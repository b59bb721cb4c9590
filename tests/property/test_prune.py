"""Pruning in closed form against brute force, and what is refused."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from exporter.calibrate.statistics import Statistics, collect
from exporter.calibrate.windows import Windows
from exporter.compress import prune as pruning
from exporter.compress.awq_scaling import equalised
from exporter.compress.prune import (
    ClosedFormOptions,
    Elimination,
    eliminate,
    planned_widths,
    prune,
    repair,
    repaired,
    shared_out,
)
from exporter.foundation.errors import RequestError
from exporter.model.model import Model
from exporter.model.sources import open_model
from exporter.model.widths import selected
from exporter.prove.accuracy import Reference, distance
from tests.llama_names import LINEARS
from tests.models import FAMILIES, tiny_model

TOKENS = np.random.default_rng(0).integers(2, 200, (8, 48))
OTHER_TOKENS = np.random.default_rng(1).integers(2, 200, (4, 48))


def problem(seed: int, outputs: int, channels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return W, s, H and the inputs that H is of."""
    chance = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=chance, dtype=torch.float64)
    inputs = torch.randn(4 * channels, channels, generator=chance, dtype=torch.float64) @ mixing
    weight = torch.randn(outputs, channels, generator=chance, dtype=torch.float64)
    sensitivity = torch.rand(outputs, generator=chance, dtype=torch.float64)
    return weight, sensitivity, inputs.T @ inputs / len(inputs), inputs


def fitted(weight: torch.Tensor, inputs: torch.Tensor, kept: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the least-squares fit by the inputs themselves, and the mean squared error of every output."""
    wanted = inputs @ weight.T
    solution = torch.linalg.lstsq(inputs[:, kept], wanted).solution
    return solution.T, (inputs[:, kept] @ solution - wanted).square().mean(0)


@given(seed=st.integers(0, 1000))
def test_channels_go_as_by_brute_force(seed: int) -> None:
    weight, sensitivity, moment, inputs = problem(seed, 5, 9)
    found = eliminate(weight, sensitivity, moment, 3, at_once=1)
    left, before = list(range(9)), 0.0
    for channel, loss in zip(found.order, found.losses, strict=True):
        costs = {c: float(fitted(weight, inputs, [k for k in left if k != c])[1] @ sensitivity) for c in left}
        assert costs[int(channel)] == pytest.approx(min(costs.values()), rel=1e-9)
        assert loss == pytest.approx(costs[int(channel)] - before, rel=1e-6, abs=1e-9)
        before = costs[int(channel)]
        left.remove(int(channel))
    assert found.kept(3).tolist() == left


@given(seed=st.integers(0, 1000), at_once=st.integers(1, 5))
def test_the_predicted_loss_is_that_of_the_repaired_weights(seed: int, at_once: int) -> None:
    weight, sensitivity, moment, inputs = problem(seed, 6, 16)
    found = eliminate(weight, sensitivity, moment, 4, at_once)
    kept = found.kept(4)
    mended = repaired(weight, moment, kept)
    expected, errors = fitted(weight, inputs, kept.tolist())
    torch.testing.assert_close(mended, expected.float(), rtol=1e-3, atol=1e-4)
    assert found.loss(4) == pytest.approx(float(errors @ sensitivity), rel=1e-6)
    assert sorted({*found.order.tolist(), *kept.tolist()}) == list(range(16))
    assert found.loss(16) == 0


def test_a_channel_that_others_can_stand_for_goes_first_and_is_not_missed() -> None:
    weight, sensitivity, _, inputs = problem(0, 6, 8)
    inputs[:, 5] = inputs[:, 1] - 2 * inputs[:, 3]
    moment = inputs.T @ inputs / len(inputs) + 1e-9 * torch.eye(8)
    found = eliminate(weight, sensitivity, moment, 7, at_once=1)
    assert int(found.order[0]) in (1, 3, 5)
    kept = found.kept(7)
    mended = repaired(weight, moment, kept).double()
    torch.testing.assert_close(inputs[:, torch.from_numpy(kept)] @ mended.T, inputs @ weight.T, rtol=1e-3, atol=1e-3)


@given(seed=st.integers(0, 1000), total=st.integers(3, 12))
def test_widths_are_shared_out_as_by_brute_force(seed: int, total: int) -> None:
    chance = np.random.default_rng(seed)
    layers = [Elimination(8, np.arange(6), np.sort(chance.random(6))) for _ in range(3)]
    widths = shared_out(layers, 2 * total, 2)
    assert sum(widths) == 2 * total

    def cost(some: tuple[int, ...]) -> float:
        return sum(layer.loss(width) for layer, width in zip(layers, some, strict=True))

    choices = [some for some in product((2, 4, 6, 8), repeat=3) if sum(some) == 2 * total]
    assert cost(widths) == pytest.approx(min(map(cost, choices)))


def test_odd_widths_are_rounded_before_they_are_shared_out() -> None:
    layers = [Elimination(9, np.arange(7), np.full(7, cost)) for cost in (1.0, 2.0)]
    assert shared_out(layers, 12, 4) == (4, 8)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    with open_model(str(tiny_model(tmp_path / "model", layers=3))) as opened:
        yield opened


def statistics_of(model: Model) -> Statistics:
    return collect(model, Windows.of(TOKENS, "file", 0), 0, lambda done, total: None)


def kl(model: Model, other: Model) -> float:
    changed = Reference.of(other, OTHER_TOKENS)
    windows = {tuple(tokens): number for number, tokens in enumerate(OTHER_TOKENS.tolist())}
    return distance(
        Reference.of(model, OTHER_TOKENS),
        lambda tokens, first: changed.logits(windows[tuple(tokens)], slice(first, len(tokens))).numpy(),
    ).kl_mean


@pytest.mark.parametrize("even", [True, False])
def test_the_pruned_model_is_what_was_asked_for(model: Model, even: bool) -> None:
    found = prune(model, statistics_of(model), ClosedFormOptions(1 / 3, 16, even))
    widths = found.model.decoder.intermediate
    assert found.ratio == pytest.approx(1 / 3)
    assert sum(widths) == 3 * 64
    assert all(width % 16 == 0 for width in widths)
    assert found.model.decoder.even or not even
    assert found.predicted_kl is not None and found.predicted_kl > 0


def test_what_others_can_stand_for_is_not_missed(model: Model) -> None:
    """The second half of the channels is twice the first: half of all of them is enough, once `down` is repaired."""
    weights = model.folder / "model.safetensors"
    tensors = load_file(weights)
    for layer in range(3):
        for role, factor in (("gate", 1), ("up", 2)):
            whole = tensors[f"model.layers.{layer}.mlp.{role}_proj.weight"]
            whole[48:] = factor * whole[:48]
    save_file(tensors, weights, metadata={"format": "pt"})
    with open_model(str(model.folder)) as doubled:
        statistics = statistics_of(doubled)
        found = prune(doubled, statistics, ClosedFormOptions(0.5, 16, even=True, damping=1e-6))
        bare = selected(doubled, [np.arange(48, 96)] * 3, {})
        assert kl(doubled, found.model) < 1e-4
        assert kl(doubled, bare) > 0.01


def test_uneven_widths_predict_no_more_than_even_ones(model: Model) -> None:
    statistics = statistics_of(model)
    even, uneven = (prune(model, statistics, ClosedFormOptions(1 / 3, 16, even)) for even in (True, False))
    assert even.predicted_kl is not None and uneven.predicted_kl is not None
    assert uneven.predicted_kl <= even.predicted_kl * (1 + 1e-9)


def test_it_is_done_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = statistics_of(model)
    first = prune(model, statistics, ClosedFormOptions(1 / 3, 16))
    monkeypatch.setattr(pruning, "eliminate", lambda *_: pytest.fail("computed again"))
    monkeypatch.setattr(pruning, "repaired", lambda *_: pytest.fail("computed again"))
    again = prune(model, statistics, ClosedFormOptions(1 / 3, 16))
    assert again.model.digest == first.model.digest
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        prune(model, statistics, ClosedFormOptions(1 / 3, 32))


def test_any_choice_can_be_repaired(model: Model) -> None:
    statistics = statistics_of(model)
    best = prune(model, statistics, ClosedFormOptions(1 / 3, 16, even=True))
    drawn = [np.sort(np.random.default_rng(layer).choice(96, 64, replace=False)) for layer in range(3)]
    found = repair(model, statistics, drawn)
    assert found.model.decoder.intermediate == (64, 64, 64)
    assert found.predicted_kl is not None and best.predicted_kl is not None
    assert found.predicted_kl > best.predicted_kl
    bare = selected(model, drawn, {})
    for layer in range(3):
        gate, down = (f"model.layers.{layer}.mlp.{role}_proj.weight" for role in ("gate", "down"))
        np.testing.assert_array_equal(found.model.read(gate), bare.read(gate))
        assert not np.array_equal(found.model.read(down), bare.read(down))


def test_what_masks_are_predicted_to_cost(model: Model) -> None:
    """Of each the weighted error of what all channels put out, inputs weighed by their second moments."""
    statistics = statistics_of(model)
    chance = np.random.default_rng(0)
    masks = [np.sort(chance.choice(96, width, replace=False)) for width in (1, 64, 96)]
    site = statistics.site(f"layers.1.{LINEARS['down'][1]}")
    assert site is not None
    expected = []
    for kept in masks:
        change = model.read("model.layers.1.mlp.down_proj.weight").astype(np.float64)
        change[:, kept] = 0
        errors = [row @ site.second_moment @ row for row in change]
        expected.append(float(np.dot(errors, statistics.sensitivity(1, "down"))) / 2)
    np.testing.assert_allclose(pruning.losses(model, statistics, 1, masks), expected, rtol=1e-6)
    assert expected[0] > expected[1] > expected[2] == 0


def test_what_is_predicted_is_the_loss_of_the_steps(model: Model) -> None:
    """Two ways to the same: the weighted error of the repaired weights, and the sum of what each step added."""
    statistics = statistics_of(model)
    found = prune(model, statistics, ClosedFormOptions(1 / 3, 16, even=True))
    losses = [
        eliminate(
            pruning._down(model, layer),
            pruning._sensitivity(statistics, layer),
            pruning._moment(statistics, layer, 0.01),
            64,
        ).loss(64)
        for layer in range(3)
    ]
    assert found.predicted_kl == pytest.approx(sum(losses) / 2, rel=1e-4)


def test_statistics_of_the_pruned_model_are_its_own(model: Model) -> None:
    statistics = statistics_of(model)
    found = prune(model, statistics, ClosedFormOptions(1 / 3, 16))
    own = statistics_of(found.model)
    assert own.key != statistics.key
    for layer, width in enumerate(found.model.decoder.intermediate):
        site = own.site(f"layers.{layer}.mlp_out")
        assert site is not None and site.second_moment.shape == (width, width)


def test_pruned_models_are_pruned_again(model: Model) -> None:
    once = prune(model, statistics_of(model), ClosedFormOptions(1 / 3, 16)).model
    twice = prune(once, statistics_of(once), ClosedFormOptions(0.25, 16))
    assert sum(twice.model.decoder.intermediate) < sum(once.decoder.intermediate)
    even = prune(once, statistics_of(once), ClosedFormOptions(0.25, 16, even=True)).model.decoder.intermediate
    assert even == planned_widths(once.decoder, 0.25, 16)
    assert even != once.decoder.intermediate
    assert np.isfinite(kl(model, twice.model))


def test_statistics_in_other_coordinates_have_another_key(model: Model) -> None:
    statistics = statistics_of(model)
    scaled = equalised(model, statistics, 0.5, ["mlp_out"]).statistics
    assert len({statistics.key, scaled.key, equalised(model, statistics, 0.4, ["mlp_out"]).statistics.key}) == 3
    assert scaled.key == equalised(model, statistics, 0.5, ["mlp_out"]).statistics.key


@pytest.mark.parametrize(
    ("ratio", "multiple", "message"),
    [
        (0.0, 16, r"share to prune is impossible; got 0\.0, expected a number between 0 and 1"),
        (1.0, 16, r"share to prune is impossible; got 1\.0"),
        (-0.1, 16, r"share to prune is impossible"),
        (float("nan"), 16, r"share to prune is impossible"),
        (0.25, 0, r"widths cannot be rounded; got a multiple of 0, expected 1 or more"),
        (
            0.05,
            32,
            r"rounds to none of a layer's channels; got 0\.05 of 96 channels in steps of 32; choose another share",
        ),
        (0.9, 32, r"rounds to all of a layer's channels; got 0\.9 of 96 channels in steps of 32"),
        (0.2, 256, r"rounds to all of a layer's channels"),
    ],
)
def test_what_cannot_work_is_refused_before_a_weight_is_read(
    model: Model, ratio: float, multiple: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "read", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(RequestError, match=message):
        planned_widths(model.decoder, ratio, multiple)


def test_a_family_without_a_gate_is_refused(model: Model) -> None:
    plain = replace(model.decoder, family=replace(model.decoder.family, gated=False))
    with pytest.raises(RequestError, match=r"feed-forward part of a LlamaForCausalLM is not gated.*leave out the step"):
        planned_widths(plain, 0.25, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_families_of_today_are_pruned(tmp_path: Path, family: str) -> None:
    with open_model(str(tiny_model(tmp_path / "model", family))) as opened:
        assert planned_widths(opened.decoder, 0.25, 32) == (64, 64)
        assert planned_widths(opened.decoder, 0.25, 8) == (72, 72)


def test_inputs_must_have_been_observed(model: Model, tmp_path: Path) -> None:
    statistics = statistics_of(model)
    folder = tmp_path / "cache" / "statistics" / statistics.key
    (folder / "layers.1.mlp_out.npy").unlink()
    with pytest.raises(RequestError, match=r"layers\.1\.mlp_out: the inputs of down were not observed"):
        prune(model, statistics, ClosedFormOptions(1 / 3, 16))


def test_a_silent_layer_is_pruned_too(model: Model, tmp_path: Path) -> None:
    """Channels that are always zero make H zero."""
    weights = model.folder / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.weight"].zero_()
    save_file(tensors, weights, metadata={"format": "pt"})
    with open_model(str(model.folder)) as silent:
        found = prune(silent, statistics_of(silent), ClosedFormOptions(1 / 3, 16))
        assert found.model.decoder.intermediate[1] == min(found.model.decoder.intermediate)
        assert np.isfinite(kl(silent, found.model))
