"""Rank-constrained regression against plain float64 algebra, and CALDERA in a target's formats."""

import numpy as np
import pytest

from exporter.calibrate.second_moments import Site
from exporter.compress.caldera import Alternation, encode_with_factors, residual
from exporter.compress.lowrank import (
    balanced_components,
    downdated,
    fitted_left,
    fitted_right,
    largest_channels,
    regression,
    weighted_error,
)
from exporter.compress.methods.ldlq import Ldlq
from exporter.formats.format import LowRank, WeightFormat
from exporter.targets.gguf.formats.ggml import ggml_format
from exporter.targets.onnx.matmulnbits import matmulnbits_format

LDLQ = Ldlq(sweeps=2)


def problem(seed: int, rows: int = 96, columns: int = 64) -> tuple[np.ndarray, Site, np.ndarray]:
    """Return a matrix, its inputs, and the sensitivities of its rows."""
    chance = np.random.default_rng(seed)
    mixing = chance.standard_normal((columns, columns)) * np.exp(-np.arange(columns) / columns * 3)[:, None]
    inputs = chance.standard_normal((4 * columns, columns)) @ mixing
    moment = (inputs.T @ inputs / len(inputs)).astype(np.float32)
    site = Site(moment, moment, 0.0, np.ascontiguousarray(moment.diagonal()), {})
    weight = chance.standard_normal((rows, columns)).astype(np.float32)
    return weight, site, chance.exponential(1.0, rows).astype(np.float32)


def squared(change: np.ndarray, site: Site, outputs: np.ndarray) -> float:
    moment = site.second_moment.astype(np.float64)
    return float(outputs @ np.einsum("ij,jk,ik->i", change.astype(np.float64), moment, change))


@pytest.mark.parametrize(("rows", "columns"), [(40, 64), (64, 40)])
@pytest.mark.parametrize("rank", [1, 8, 40])
def test_regression_is_the_truncated_svd_of_the_whitened_matrix(rows: int, columns: int, rank: int) -> None:
    weight, site, _ = problem(1, rows, columns)
    left, right = regression(weight, site.second_moment, rank)
    root = np.linalg.cholesky(site.second_moment.astype(np.float64))
    rest = np.linalg.svd(weight @ root, compute_uv=False)[rank:]
    found = weighted_error(weight - left @ right, site.second_moment)
    assert found == pytest.approx((rest**2).sum(), rel=1e-3, abs=1e-3)
    np.testing.assert_allclose(left.T @ left, np.eye(rank), atol=1e-4)


def test_each_factor_fits_the_other_as_least_squares_does() -> None:
    weight, site, _ = problem(2)
    chance = np.random.default_rng(3)
    right = chance.standard_normal((8, 64)).astype(np.float32)
    root = np.linalg.cholesky(site.second_moment.astype(np.float64))
    expected = np.linalg.lstsq((right @ root).T, (weight @ root).T, rcond=None)[0].T
    np.testing.assert_allclose(fitted_left(weight, site.second_moment, right), expected, rtol=1e-2, atol=1e-3)
    left = chance.standard_normal((96, 8)).astype(np.float32)
    expected = np.linalg.lstsq(left, weight, rcond=None)[0]
    np.testing.assert_allclose(fitted_right(weight, left), expected, rtol=1e-2, atol=1e-3)
    assert np.isfinite(fitted_right(weight, np.zeros_like(left))).all()


def test_a_downdated_moment_sees_only_what_the_left_factor_cannot_mend() -> None:
    weight, site, _ = problem(4)
    right = np.random.default_rng(5).standard_normal((8, 64)).astype(np.float32)
    left = fitted_left(weight, site.second_moment, right)
    mended = weighted_error(weight - left @ right, site.second_moment)
    assert weighted_error(weight, downdated(site.second_moment, right)) == pytest.approx(mended, rel=1e-3)


@pytest.mark.parametrize("rank", [1, 24, 64])
def test_evened_components_span_the_same_and_round_finely(rank: int) -> None:
    weight, site, _ = problem(5)
    left, right = regression(weight, site.second_moment, rank)
    even = balanced_components(right, site.second_moment)
    again = fitted_left(weight, site.second_moment, even)
    whole = weighted_error(weight, site.second_moment)
    assert weighted_error(again @ even - left @ right, site.second_moment) < 1e-5 * whole
    magnitude = [np.sqrt(np.einsum("ij,jk,ik->i", one, site.second_moment, one)) for one in (right, even)]
    assert rank == 1 or magnitude[1].max() / np.median(magnitude[1]) < magnitude[0].max() / np.median(magnitude[0])
    assert not balanced_components(np.zeros_like(right), site.second_moment).any()


def test_the_largest_channels_are_those_of_the_largest_inputs() -> None:
    moment = np.diag(np.array([1, 9, 2, 8, 3], np.float32))
    np.testing.assert_array_equal(largest_channels(moment, 2), [1, 3])


@pytest.mark.parametrize(
    "turns",
    [
        Alternation(iterations=1),
        Alternation(),
        Alternation(("LR", "Q")),
        Alternation(("Q", "LR"), outliers=8),
        Alternation(("Q", "LR"), downdate=True),
    ],
)
@pytest.mark.parametrize("name", ["Q4_0", "int2-b32"])
def test_factors_beat_the_matrix_alone_and_more_of_them_beat_fewer(name: str, turns: Alternation) -> None:
    weight, site, outputs = problem(6, 128, 96)
    format: WeightFormat = matmulnbits_format(name) if name.startswith("int") else ggml_format(name)
    losses = [squared(LDLQ.encode(weight, format, site).planned - weight, site, outputs)]
    for rank in (32, 64):
        made = encode_with_factors(weight, format, LowRank(rank, ggml_format("Q8_0")), site, outputs, LDLQ, turns)
        assert made.factors is not None
        base = format.decode_rows(made.data, 96)
        np.testing.assert_array_equal(made.planned, made.factors.added_to(base))
        losses.append(squared(made.planned - weight, site, outputs))
    assert losses[0] > losses[1] > losses[2]


def test_more_turns_never_lose() -> None:
    weight, site, outputs = problem(7)
    low_rank = LowRank(32, ggml_format("Q4_0"))
    format = matmulnbits_format("int2-b32")
    losses = []
    for count in (1, 2, 4):
        made = encode_with_factors(weight, format, low_rank, site, outputs, LDLQ, Alternation(iterations=count))
        losses.append(squared(made.planned - weight, site, outputs))
    assert losses[2] <= losses[1] * 1.001 <= losses[0] * 1.002


def test_rows_count_by_their_sensitivities() -> None:
    weight, site, _ = problem(8)
    outputs = np.where(np.arange(96) < 8, 100.0, 0.01).astype(np.float32)
    format, low_rank = matmulnbits_format("int2-b32"), LowRank(32, ggml_format("F16"))
    losses = []
    for counted in (outputs, np.ones_like(outputs)):
        made = encode_with_factors(weight, format, low_rank, site, counted, LDLQ)
        losses.append(squared(made.planned - weight, site, outputs))
    assert losses[0] < 0.5 * losses[1]


def test_a_matrix_of_zeros_stays_zero() -> None:
    _, site, outputs = problem(9)
    low_rank = LowRank(32, ggml_format("Q8_0"))
    made = encode_with_factors(np.zeros((96, 64), np.float32), ggml_format("Q4_0"), low_rank, site, outputs, LDLQ)
    assert not made.planned.any()


@pytest.mark.parametrize("rank", [32, 64])
def test_the_expected_error_is_about_what_encoding_makes(rank: int) -> None:
    weight, site, outputs = problem(10, 256, 128)
    format, low_rank = matmulnbits_format("int4-b32"), LowRank(rank, ggml_format("Q8_0"))
    rows = np.arange(0, 256, 4)
    left = residual(weight, rank, site, outputs)[rows]
    expected = LDLQ.expected_error(left, format, site, np.zeros(128, np.float32))
    made = encode_with_factors(weight, format, low_rank, site, outputs, Ldlq(sweeps=0), Alternation(("LR", "Q"), 1))
    change = (made.planned - weight)[rows]
    moment = site.second_moment
    assert expected.outputs.sum() == pytest.approx(np.einsum("ij,jk,ik->", change, moment, change), rel=0.25)
    assert not expected.lookups.any()
