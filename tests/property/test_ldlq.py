"""LDLQ against a naive float64 reference that inverts what remains of H after every step."""

import numpy as np
import pytest

from exporter.compress.ldlq import METHOD, Ldlq, feedback_factor
from exporter.compress.rtn import METHOD as RTN
from exporter.weights.format import WeightFormat
from exporter.weights.ggml import ggml_format
from exporter.weights.matmulnbits import matmulnbits_format


def problem(seed: int, rows: int = 24, columns: int = 64) -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(seed)
    mixing = chance.standard_normal((columns, columns)) / np.sqrt(columns)
    inputs = chance.standard_normal((4 * columns, columns)) @ mixing
    return chance.standard_normal((rows, columns)).astype(np.float32), (inputs.T @ inputs / len(inputs)).astype("f4")


def naive(weight: np.ndarray, format: WeightFormat, second_moment: np.ndarray, damping: float) -> np.ndarray:
    """Round in order; after each step spread the error over the rest: -D H_br H_rr^-1, all in float64."""
    h = second_moment.astype(np.float64)
    h += np.eye(len(h)) * damping * h.trace() / len(h)
    left, out = weight.astype(np.float64), np.zeros_like(weight)
    size = format.block_columns
    for start in range(0, len(h), size):
        importance = np.ascontiguousarray(second_moment.diagonal()[start : start + size])
        block = np.ascontiguousarray(left[:, start : start + size], np.float32)
        grid = format.grid(block, importance)
        steps = [(start, start + size)] if grid is None else [(c, c + 1) for c in range(start, start + size)]
        for first, last in steps:
            if grid is None:
                done = format.decode_rows(format.encode_rows(block, importance), size)
            else:
                done = grid.round(first - start, left[:, first].astype(np.float32))[1][:, None]
            out[:, first:last] = done
            error = left[:, first:last] - done
            if last < len(h):
                left[:, last:] += error @ h[first:last, last:] @ np.linalg.inv(h[last:, last:])
    return out


@pytest.mark.parametrize("name", ["int4-b32", "int2-b16-asymmetric", "Q4_0", "Q5_1", "IQ4_NL"])
def test_equals_the_naive_reference(name: str) -> None:
    format = matmulnbits_format(name) if name.startswith("int") else ggml_format(name)
    weight, moment = problem(1)
    ours, reference = METHOD.encode(weight, format, moment).planned, naive(weight, format, moment, 0.01)
    # A value on the edge between two codes may fall to either side in float32; such a row differs from there on.
    assert np.isclose(ours, reference, atol=1e-4).all(axis=1).mean() > 0.85
    error = [np.einsum("ij,jk,ik->", d, moment, d) for d in (ours - weight, reference - weight)]
    assert error[0] == pytest.approx(error[1], rel=0.02)


def test_block_feedback_equals_the_naive_reference() -> None:
    weight, moment = problem(2, rows=16, columns=768)
    format = ggml_format("Q4_K")
    ours, reference = METHOD.encode(weight, format, moment).planned, naive(weight, format, moment, 0.01)
    error = [np.einsum("ij,jk,ik->", d, moment, d) for d in (ours - weight, reference - weight)]
    assert error[0] == pytest.approx(error[1], rel=0.01)


def test_factor_is_the_cholesky_factor_of_the_damped_inverse() -> None:
    _, moment = problem(3)
    factor = feedback_factor(moment, 0.01).astype(np.float64)
    damped = moment + np.eye(64) * 0.01 * moment.trace() / 64
    np.testing.assert_allclose(factor.T @ factor, np.linalg.inv(damped), rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(np.tril(factor, -1), 0)


def test_feedback_beats_rounding_and_equals_it_where_inputs_are_independent() -> None:
    format = matmulnbits_format("int4-b32")
    for seed in range(5):
        weight, moment = problem(seed)
        errors = [
            METHOD.encode(weight, format, moment).planned - weight,
            RTN.encode(weight, format, moment).planned - weight,
        ]
        feedback, plain = (np.einsum("ij,jk,ik->", d, moment, d) for d in errors)
        assert feedback < plain
    independent = np.eye(64, dtype=np.float32)
    ours = METHOD.encode(weight, format, independent)
    np.testing.assert_array_equal(ours.planned, RTN.encode(weight, format, independent).planned)


def test_bytes_depend_neither_on_chance_nor_on_neighbouring_rows() -> None:
    weight, moment = problem(4, rows=1500)
    format = matmulnbits_format("int4-b32")
    whole = METHOD.encode(weight, format, moment).data
    np.testing.assert_array_equal(whole, Ldlq().encode(weight, format, moment).data)
