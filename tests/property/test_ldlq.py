"""LDLQ and descent against naive float64 references."""

from dataclasses import replace

import numpy as np
import pytest

from exporter.calibrate.second_moments import Site
from exporter.compress.methods.ldlq import DAMPING, LEAST_DAMPING, Ldlq, damped, feedback_factor
from exporter.compress.methods.rtn import RoundToNearest
from exporter.formats.format import PartedGrid, WeightFormat
from exporter.targets.gguf.formats.ggml import ggml_format
from exporter.targets.gguf.formats.k_quants import NestedGrid
from exporter.targets.onnx.matmulnbits import matmulnbits_format

pytestmark = pytest.mark.slow

FEEDBACK, DESCENT, RTN = Ldlq(sweeps=0), Ldlq(sweeps=2), RoundToNearest()
EVERY = np.ones(256, np.float32)
SCALED = ["int4-b32", "int2-b16-asymmetric", "Q4_0", "Q5_1", "IQ4_NL"]
NESTED = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"]


def named(name: str) -> WeightFormat:
    return matmulnbits_format(name) if name.startswith("int") else ggml_format(name)


def seen(moment: np.ndarray) -> Site:
    return Site(moment, moment, 0.0, np.ascontiguousarray(moment.diagonal()), {})


def problem(seed: int, rows: int = 24, columns: int = 64) -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(seed)
    mixing = chance.standard_normal((columns, columns)) / np.sqrt(columns)
    inputs = chance.standard_normal((4 * columns, columns)) @ mixing
    return chance.standard_normal((rows, columns)).astype(np.float32), (inputs.T @ inputs / len(inputs)).astype("f4")


def error(change: np.ndarray, moment: np.ndarray) -> np.ndarray:
    return np.einsum("ij,jk,ik->i", change, moment, change)


def naive(weight: np.ndarray, format: WeightFormat, second_moment: np.ndarray) -> np.ndarray:
    """Round in order; after each step spread the error over the rest: -D H_br H_rr^-1, all in float64."""
    h = second_moment.astype(np.float64)
    h += np.eye(len(h)) * DAMPING * np.median(h.diagonal())
    left, out = weight.astype(np.float64), np.zeros_like(weight)
    size = format.block_columns
    # What is left of a column's variance when all later ones are known.
    rest = np.linalg.cholesky(h[::-1, ::-1]).diagonal()[::-1] ** 2
    for start in range(0, len(h), size):
        importance = np.ascontiguousarray(h.diagonal()[start : start + size], np.float32)
        block = np.ascontiguousarray(left[:, start : start + size], np.float32)
        grid = format.grid(block, importance)
        steps = [(start, start + size)] if grid is None else [(c, c + 1) for c in range(start, start + size)]
        for first, last in steps:
            if isinstance(grid, PartedGrid) and (first - start) % grid.part_columns == 0:
                part = slice(first, first + grid.part_columns)
                grid = grid.reached(first - start, left[:, part].T.astype("f4"), rest[part].astype("f4"))
            if grid is None:
                done = format.decode_rows(format.encode_rows(block, importance), size)
            else:
                done = grid.round(first - start, left[:, first].astype(np.float32))[1][:, None]
            out[:, first:last] = done
            miss = left[:, first:last] - done
            if last < len(h):
                left[:, last:] += miss @ h[first:last, last:] @ np.linalg.inv(h[last:, last:])
    return out


@pytest.mark.parametrize("name", [*SCALED, *NESTED])
def test_feedback_equals_the_naive_reference(name: str) -> None:
    format = named(name)
    weight, moment = problem(1, columns=512 if name in NESTED else 64)
    ours, reference = FEEDBACK.encode(weight, format, seen(moment)).planned, naive(weight, format, moment)
    # A value on the edge between two codes may fall to either side in float32; such a row differs from there on.
    if name not in NESTED:
        assert np.isclose(ours, reference, atol=1e-4).all(axis=1).mean() > 0.85
    errors = [error(one - weight, moment).sum() for one in (ours, reference)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_block_feedback_equals_the_naive_reference() -> None:
    weight, moment = problem(2, rows=16, columns=768)
    format = ggml_format("IQ3_XXS")
    ours, reference = FEEDBACK.encode(weight, format, seen(moment)).planned, naive(weight, format, moment)
    errors = [error(one - weight, moment).sum() for one in (ours, reference)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


def test_feedback_from_panel_to_panel_equals_the_naive_reference() -> None:
    weight, moment = problem(8, columns=320)
    format = named("int4-b32")
    ours, reference = FEEDBACK.encode(weight, format, seen(moment)).planned, naive(weight, format, moment)
    errors = [error(one - weight, moment).sum() for one in (ours, reference)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


@pytest.mark.parametrize("name", ["Q4_0", "IQ3_XXS"])
def test_what_errors_cost_equals_the_whole_product(name: str) -> None:
    weight, moment = problem(9, rows=8, columns=1280)
    format = named(name)
    _, held = problem(10, columns=1280)
    sensitivities = np.random.default_rng(0).random(1280, np.float32)
    site = replace(seen(moment), held=held, share=0.25)
    found = FEEDBACK.expected_error(weight, format, site, sensitivities)
    assert 0 < site.shrinkage < site.fitted_shrinkage <= 1
    factor = feedback_factor(damped(moment, DAMPING, site.fitted_shrinkage)).astype(np.float64)
    size = 256 if name == "IQ3_XXS" else 1
    inverses = np.zeros_like(factor)
    for start in range(0, 1280, size):
        block = slice(start, start + size)
        inverses[block, block] = np.linalg.inv(factor[block, block])
    spread = inverses @ factor
    rounded = format.decode_rows(format.encode_rows(weight, np.ascontiguousarray(moment.diagonal())), 1280)
    squares = (rounded.astype(np.float64) - weight) ** 2
    np.testing.assert_allclose(found.outputs, squares @ (spread @ held @ spread.T).diagonal(), rtol=1e-3)
    np.testing.assert_allclose(found.lookups, squares @ (spread**2 @ sensitivities), rtol=1e-3)


@pytest.mark.parametrize("name", [*SCALED, *NESTED, "int8-b64"])
def test_descent_never_loses_and_ends_where_no_single_code_can_be_bettered(name: str) -> None:
    format = named(name)
    weight, moment = problem(3, rows=8, columns=256 if name in NESTED else 128)
    fine = damped(moment, DAMPING)
    rows = np.arange(len(weight))
    before, after, end = (Ldlq(sweeps=sweeps).encode(weight, format, seen(moment)).planned for sweeps in (0, 2, 40))
    losses = [error(planned - weight, fine) for planned in (before, after, end)]
    assert (losses[1] <= losses[0] * 1.001).all() and losses[1].sum() < losses[0].sum()
    assert (losses[2] <= losses[1] * 1.001).all()
    # In float64, one code at a time: nothing that the row's own values allow is better by more than rounding.
    block = format.block_columns
    for column in range(0, weight.shape[1], 37):
        start = column // block * block
        for row in rows:
            for value in np.unique(end[row, start : start + block]):
                other = end[row].astype(np.float64)
                other[column] = value
                if name in NESTED and not np.isclose(value, end[row, column]):
                    continue  # parts of a nested block have scales of their own
                assert error((other - weight[row])[None], fine.astype(np.float64))[0] >= losses[2][row] * 0.999


@pytest.mark.parametrize("name", NESTED)
def test_no_single_scale_of_a_part_betters_refitted_ones(name: str) -> None:
    format = ggml_format(name)
    weight, moment = problem(9, rows=6, columns=256)
    grid = format.grid(weight, None)
    assert isinstance(grid, NestedGrid)
    codes = np.stack([grid.round(column, weight[:, column].copy())[0] for column in range(256)])
    aim = moment @ weight.T
    losses = [error(grid.decode(codes).T - weight, moment)]
    for _ in range(12):
        grid = grid.refit(codes, moment, aim)
        losses.append(error(grid.decode(codes).T - weight, moment))
        assert (losses[-1] <= losses[-2] * 1.001).all()
    assert losses[-1].sum() < 0.99 * losses[0].sum()
    size = grid.part_columns
    for row in range(len(weight)):
        decoded = grid.decode(codes)[:, row].astype(np.float64)
        for part in range(0, 256, size):
            for step in (-1, 1):
                other = decoded.copy()
                other[part : part + size] += (
                    step * float(grid._scales.d[row]) * grid._layout.levels[codes][part : part + size, row]
                )
                assert error((other - weight[row])[None], moment)[0] >= losses[-1][row] * 0.98


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "int4-b32", "int4-b16-asymmetric"])
def test_refitted_scales_are_those_of_least_squares(name: str) -> None:
    format = named(name)
    block = format.block_columns
    weight, moment = problem(4, rows=6, columns=block)
    grid = format.grid(weight, None)
    assert grid is not None
    codes = np.stack([grid.round(column, weight[:, column].copy())[0] for column in range(block)])
    aim = moment @ weight.T
    refitted = grid.refit(codes, moment, aim).decode(codes).T
    offset = "1" in name[2:] or "asymmetric" in name
    for row in range(len(weight)):
        basis = np.stack([codes[:, row].astype(np.float64) - (0 if offset else 8), np.ones(block)])[: 1 + offset]
        normal = basis @ moment @ basis.T
        best = np.linalg.solve(normal, basis @ aim[:, row]) @ basis
        least, got = (error((one - weight[row])[None], moment)[0] for one in (best, refitted[row]))
        # Stored scales are rounded, and zero points are whole numbers.
        assert least * 0.999 <= got <= least * (1.15 if "asymmetric" in name else 1.01)


def test_scales_of_an_empty_block_stay_usable() -> None:
    weight = np.zeros((3, 64), np.float32)
    _, moment = problem(5)
    for name in SCALED:
        np.testing.assert_array_equal(DESCENT.encode(weight, named(name), seen(moment)).planned, 0)


@pytest.mark.parametrize("columns", [1, 64, 201, 512])
def test_factor_is_the_cholesky_factor_of_the_damped_inverse(columns: int) -> None:
    _, moment = problem(3, columns=columns)
    factor = feedback_factor(damped(moment, 0.01)).astype(np.float64)
    added = 0.01 * max(np.median(moment.diagonal()), moment.trace() / columns)
    expected = np.linalg.inv(moment + np.eye(columns) * added)
    np.testing.assert_allclose(factor.T @ factor, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(np.tril(factor, -1), 0)


def test_damping_is_a_share_of_the_median_and_no_less_than_some_of_the_mean() -> None:
    one_large = np.diag(np.array([1.0, 2, 3, 1000], np.float32))
    mostly_zero = np.diag(np.array([0.0, 0, 0, 8], np.float32))
    for moment, added in (
        (one_large, max(DAMPING * 2.5, LEAST_DAMPING * 251.5)),
        (mostly_zero, LEAST_DAMPING * 2),
        (np.zeros((4, 4), np.float32), 1),
    ):
        np.testing.assert_allclose(damped(moment, DAMPING), moment + added * np.eye(4), rtol=1e-6)


def test_feedback_beats_rounding_and_equals_it_where_inputs_are_independent() -> None:
    format = matmulnbits_format("int4-b32")
    for seed in range(5):
        weight, moment = problem(seed)
        encoded = [method.encode(weight, format, seen(moment)).planned for method in (DESCENT, FEEDBACK, RTN)]
        losses = [error(planned - weight, moment).sum() for planned in encoded]
        assert losses == sorted(losses)
    independent = seen(np.eye(64, dtype=np.float32))
    ours = FEEDBACK.encode(weight, format, independent)
    np.testing.assert_array_equal(ours.planned, RTN.encode(weight, format, independent).planned)


def test_bytes_depend_neither_on_chance_nor_on_neighbouring_rows() -> None:
    weight, moment = problem(4, rows=1500)
    format = matmulnbits_format("int4-b32")
    whole = DESCENT.encode(weight, format, seen(moment)).data
    np.testing.assert_array_equal(whole, Ldlq(sweeps=2).encode(weight, format, seen(moment)).data)


# Where one scale serves 256 columns, feedback drives some weights beyond it; descent then wins most of that back.
@pytest.mark.parametrize("name", ["Q4_0", "IQ4_NL", "Q5_1", "int4-b64", "IQ3_XXS"])
def test_the_expected_error_is_what_feedback_then_makes(name: str) -> None:
    weight, moment = problem(6, rows=256, columns=256)
    format = named(name)
    expected = FEEDBACK.expected_error(weight, format, seen(moment), EVERY)
    change = FEEDBACK.encode(weight, format, seen(moment)).planned - weight
    assert expected.outputs.sum() == pytest.approx(error(change, moment).sum(), rel=0.15)
    assert expected.lookups.sum() == pytest.approx((change**2).sum(), rel=0.15)
    # Text that was held back, on which errors cost more, makes the same rows' expectation larger.
    other = replace(seen(moment), held=moment * 2, share=0.25)
    dearer = FEEDBACK.expected_error(weight, format, other, EVERY).outputs.sum()
    assert dearer >= 1.99 * expected.outputs.sum()


def test_shrinkage_is_the_share_of_the_correlations_that_is_chance() -> None:
    chance = np.random.default_rng(0)
    mixing = np.eye(48) + chance.standard_normal((48, 48)) / 8
    windows = (chance.standard_normal((32, 24, 48)) @ mixing).astype(np.float32)
    held = np.arange(32) % 4 == 3

    def mean(chosen: np.ndarray) -> np.ndarray:
        rows = windows[chosen].reshape(-1, 48)
        return rows.T @ rows / len(rows)

    site = Site(mean(~held), mean(held), 0.25, EVERY[:48], {})
    scale = np.sqrt(np.outer(mean(held | ~held).diagonal(), mean(held | ~held).diagonal()))
    apart = ~np.eye(48, dtype=bool)
    # Each window's own correlations, whose mean's variance is known without the two halves.
    each = np.stack([window.T @ window / 24 / scale for window in windows])
    variance = each.var(0, ddof=1) / 32
    expected = variance[apart].sum() / ((each.mean(0) ** 2)[apart]).sum()
    assert site.shrinkage == pytest.approx(expected, rel=0.25)
    assert seen(mean(held)).shrinkage == 0


def test_without_statistics_it_rounds_to_nearest() -> None:
    weight, _ = problem(7)
    format = ggml_format("Q4_0")
    np.testing.assert_array_equal(DESCENT.encode(weight, format, None).data, RTN.encode(weight, format, None).data)
    expected = DESCENT.expected_error(weight, format, None, np.ones(64, np.float32))
    change = RTN.encode(weight, format, None).planned - weight
    np.testing.assert_allclose(expected.lookups, (change**2).sum(axis=1), rtol=1e-5)
    assert not expected.outputs.any()
