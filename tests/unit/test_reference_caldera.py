"""The published form of CALDERA against naive float64 references of all its parts."""

import numpy as np
import pytest

from exporter.compress.hadamard import random_rotation
from exporter.compress.lowrank import weighted_error
from exporter.compress.reference import lattice
from exporter.compress.reference.caldera import FACTOR_ROUNDERS, CalderaOptions, decompose
from exporter.compress.reference.ldlq import BlockLdlq
from exporter.compress.reference.rounders import E8P, EntropyCoded, entropy, multiples
from exporter.foundation.errors import RequestError

pytestmark = pytest.mark.slow


def problem(seed: int, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(seed)
    mixing = chance.standard_normal((columns, columns), np.float32)
    mixing *= np.exp(-3 * np.arange(columns, dtype=np.float32) / columns)[:, None] / np.sqrt(np.float32(columns))
    inputs = chance.standard_normal((2 * columns, columns), np.float32) @ mixing
    return chance.standard_normal((rows, columns), np.float32), inputs.T @ inputs / np.float32(len(inputs))


def test_the_lattice_has_its_65536_points_and_its_mean_error() -> None:
    points = lattice.points()
    assert len(np.unique(points, axis=0)) == 1 << 16
    # Shifted back, all are half-integers of even sum.
    assert (np.minimum((points - 0.25).sum(axis=1) % 2, (points + 0.25).sum(axis=1) % 2) == 0).all()
    normal = np.random.default_rng(0).standard_normal((20_000, 8), np.float32)
    scaled = normal * np.float32(lattice.SCALE)
    assert np.square(lattice.nearest(scaled) / lattice.SCALE - normal).mean() == pytest.approx(0.0915, abs=0.0015)
    assert np.square(lattice.nearest_twice(scaled) / lattice.SCALE - normal).mean() < 0.0105


def test_rounding_to_the_lattice_is_exhaustive_search() -> None:
    points = lattice.points()
    vectors = np.random.default_rng(1).standard_normal((400, 8), np.float32)
    exact = points[(np.square(points).sum(axis=1) - 2 * vectors @ points.T).argmin(axis=1)]
    ours = lattice.nearest(vectors)
    assert (ours == exact).all(axis=1).mean() > 0.98
    assert np.square(ours - vectors).sum() <= 1.001 * np.square(exact - vectors).sum()
    np.testing.assert_array_equal(lattice.nearest(points[::97]), points[::97])


@pytest.mark.parametrize("size", [64, 96, 576, 25])
def test_rotations_are_orthogonal_and_even(size: int) -> None:
    turned = random_rotation(size, np.random.default_rng(2))
    np.testing.assert_allclose(turned @ turned.T, np.eye(size), atol=1e-5)
    assert np.abs(turned).max() <= 1.5 / np.sqrt(size) * (1 if size != 25 else 2)


@pytest.mark.parametrize("width", [1, 8])
def test_error_feedback_equals_explicit_elimination(width: int) -> None:
    weight, moment = problem(3, 12, 64)
    moment = moment + 0.05 * np.eye(64, dtype=np.float32)
    round = multiples(0.5)
    ours = BlockLdlq(moment, width, 0)(weight, round)
    # Minimise the columns before a block over real numbers: what is left to round is then plain.
    left, expected = weight.astype(np.float64), np.empty_like(weight)
    for start in range(64 - width, -1, -width):
        block = slice(start, start + width)
        expected[:, block] = round(left[:, block].astype(np.float32))
        miss = left[:, block] - expected[:, block]
        before = slice(0, start)
        if start:
            h = moment.astype(np.float64)
            left[:, before] += miss @ h[block, before] @ np.linalg.inv(h[before, before])
    assert np.isclose(ours, expected, atol=1e-4).all(axis=1).mean() > 0.8
    errors = [weighted_error(one - weight, moment) for one in (ours, expected, round(weight))]
    assert errors[0] == pytest.approx(errors[1], rel=0.03)
    assert errors[0] < errors[2]
    assert weighted_error(BlockLdlq(moment, width, 3)(weight, round) - weight, moment) <= errors[0]


@pytest.mark.parametrize("bits", [1.5, 2.0, 3.0])
def test_the_scalar_has_the_entropy_that_was_asked_for(bits: float) -> None:
    weight, moment = problem(4, 128, 96)
    feedback = BlockLdlq(moment + 0.01 * np.eye(96, dtype=np.float32), 1, 0)
    rounded, taken = EntropyCoded(bits).encode(weight, feedback)
    assert taken == pytest.approx(bits, abs=0.02)
    step = np.diff(np.unique(rounded)).min()
    assert entropy(rounded, step) == pytest.approx(taken, abs=1e-6)


def test_entropy_of_known_shares() -> None:
    assert entropy(np.array([[0, 0, 1, 2]], np.float32), 1.0) == pytest.approx(1.5)


@pytest.mark.parametrize(("bits", "most"), [(4, 0.013), (8, 3e-4), (16, 1e-6)])
def test_factors_are_rounded_component_by_component(bits: int, most: float) -> None:
    components = np.random.default_rng(5).standard_normal((6, 1024), np.float32) * np.logspace(-2, 2, 6)[:, None]
    components = components.astype(np.float32)
    missed = np.square(FACTOR_ROUNDERS[bits](components) - components).mean(axis=1)
    assert (missed < most * np.square(components).mean(axis=1)).all()


def naive(weight: np.ndarray, moment: np.ndarray, options: CalderaOptions, step: float) -> list[float]:
    """Return the relative error of every iterate; all in float64, by textbook linear algebra, 16-bit factors."""
    h = moment.astype(np.float64) / (moment.trace() / len(moment)) + options.damping * np.eye(len(moment))
    values, vectors = np.linalg.eigh(h)
    root, inverse = (vectors * values**0.5) @ vectors.T, (vectors * values**-0.5) @ vectors.T
    whole = np.square(weight @ root).sum()
    q, product, right, errors = np.zeros(weight.shape), np.zeros(weight.shape), None, []
    for _ in range(options.iterations):
        for part in options.order:
            if part == "LR":
                u, s, v = np.linalg.svd((weight - q) @ root, full_matrices=False)
                right = s[: options.rank, None] * v[: options.rank] @ inverse
                product = u[:, : options.rank] @ right
            else:
                q = naive_ldlq(weight - product, h, right, options.damping, step)
            if right is not None and q.any():
                errors.append(np.square((q + product - weight) @ root).sum() / whole)
    return errors


def naive_ldlq(
    residual: np.ndarray, h: np.ndarray, right: np.ndarray | None, damping: float, step: float
) -> np.ndarray:
    """Round from the last column to the first with D L D^T feedback in float64."""
    if right is not None:
        h = h - h @ right.T @ np.linalg.solve(right @ h @ right.T, right @ h)
        h = h + damping * (1 + h.trace() / len(h)) * np.eye(len(h))
    lower = np.linalg.cholesky(h)
    spread = lower / lower.diagonal()
    q = np.zeros(residual.shape)
    for k in range(len(h) - 1, -1, -1):
        wanted = residual[:, k] + (residual[:, k + 1 :] - q[:, k + 1 :]) @ spread[k + 1 :, k]
        q[:, k] = np.rint(wanted / step) * step
    return q


class FixedStep:
    """Multiples of a step that is given."""

    width = 1

    def __init__(self, step: float) -> None:
        self._step = step

    def encode(self, weight, feedback):  # type: ignore[no-untyped-def]
        return feedback(weight, multiples(self._step)), 2.0


@pytest.mark.parametrize("order", [("LR", "Q"), ("Q", "LR")])
def test_on_a_random_problem_the_best_iterate_falls_and_ends_where_the_naive_one_does(
    order: tuple[str, str],
) -> None:
    weight, moment = problem(6, 1024, 1024)
    options = CalderaOptions(
        rank=64, factor_bits=16, rounder=FixedStep(1.0), order=order, iterations=3, factor_iterations=2, polish=0,
        rotate=False,
    )  # type: ignore[arg-type]  # fmt: skip
    found = decompose(weight, moment, options)
    assert list(found.errors) == sorted(found.errors, reverse=True)
    assert found.errors[-1] < 0.9 * found.errors[0] or order == ("Q", "LR")
    assert found.errors[-1] == pytest.approx(min(naive(weight, moment, options, 1.0)), rel=0.02)


@pytest.mark.parametrize("rounder", [E8P(), EntropyCoded(2.0)])
def test_rank_lowers_the_error_at_equal_bits_of_the_base(rounder: E8P | EntropyCoded) -> None:
    weight, moment = problem(7, 128, 192)
    found = [
        decompose(weight, moment, CalderaOptions(rank=rank, rounder=rounder, iterations=4)) for rank in (0, 16, 32)
    ]
    regular = moment + np.float32(0.01 * moment.trace() / 192) * np.eye(192, dtype=np.float32)
    losses = [weighted_error(one.planned - weight, regular) / weighted_error(weight, regular) for one in found]
    assert losses == sorted(losses, reverse=True)
    for one, loss in zip(found, losses, strict=True):
        assert one.errors[-1] == pytest.approx(loss, rel=1e-3)
        assert list(one.errors) == sorted(one.errors, reverse=True)
    assert found[2].bits == pytest.approx(found[0].bits + 32 * (4 * 320 + 32) / (128 * 192), abs=0.02)


def test_factors_that_begin_on_outliers_go_on_carrying_them() -> None:
    weight, moment = problem(8, 128, 128)
    columns = [5, 40, 77]
    outliers = np.ones(128, np.float32)
    outliers[columns] = 30
    moment = moment * np.outer(outliers, outliers)
    carried = []
    for count in (0, 3):
        options = CalderaOptions(rank=8, order=("Q", "LR"), outliers=count, iterations=2, rotate=False)
        found = decompose(weight, moment, options)
        product = (found.left @ found.right)[:, columns]
        carried.append(np.square(product).sum() / np.square(weight[:, columns]).sum())
    # Most of these columns, or little of them: 0.11 to 0.23 without outliers, by the order of sums.
    assert carried[0] < 0.4
    assert carried[1] > 0.8


def test_options_that_do_not_fit_are_refused() -> None:
    weight, moment = problem(9, 16, 20)
    for options, message in (
        (CalderaOptions(rank=17), "rank is above the matrix's"),
        (CalderaOptions(rank=4, factor_bits=5), "no factors of so many bits"),
        (CalderaOptions(rank=4, order=("Q", "Q")), "unknown order of updates"),
        (CalderaOptions(rank=4, outliers=2), "forgets the factors that outliers gave"),
        (CalderaOptions(rank=4, outliers=5, order=("Q", "LR")), "more outliers than ranks"),
        (CalderaOptions(rank=4), "the lattice rounds eight weights at once"),
    ):
        with pytest.raises(RequestError, match=message):
            decompose(weight, moment, options)
