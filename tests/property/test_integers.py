"""Weights that are whole multiples of a step: found by a reference in fractions, and refused one unit off the grid."""

from fractions import Fraction
from functools import reduce
from math import gcd, lcm

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.formats.integers import HoldsIntegers, Integers, whole_multiples
from exporter.targets.gguf.formats.ggml import ggml_formats
from exporter.targets.onnx.matmulnbits import matmulnbits_formats

COLUMNS = 32
FORMATS = {
    name: format
    for name, format in {**ggml_formats(), **matmulnbits_formats()}.items()
    if format.holds(Integers(2, 256))
}


def on_a_grid(multiples: "np.ndarray", seed: int, columns: int) -> "np.ndarray":
    """Return multiples, [rows, columns], times random steps in float16, one for each block."""
    shape = len(multiples), multiples.shape[1] // columns, 1
    steps = np.random.default_rng(seed).normal(0, 0.01, shape).astype(np.float16).astype(np.float32)
    blocks: np.ndarray = multiples.astype(np.float32).reshape(*shape[:2], columns) * steps
    return blocks.reshape(multiples.shape)


def has_a_step(block: "np.ndarray", bits: int) -> bool:
    """Say whether some step in float16 makes a block whole multiples in the range of so many bits, in fractions."""
    values = [Fraction(float(value)) for value in block]
    if not any(values):
        return True
    whole = lcm(*(value.denominator for value in values))
    divisor = Fraction(reduce(gcd, (int(value * whole) for value in values)), whole)
    largest = max(map(abs, values))
    for parts in range(1, 2 ** (bits - 1) + 1):
        step = divisor / parts
        if Fraction(float(np.float16(float(step)))) != step:
            continue
        multiples = [value / step for value in values]
        limits = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        if any(all(limits[0] <= sign * one <= limits[1] for one in multiples) for sign in (1, -1)):
            return True
    assert largest > 0
    return False


@given(st.integers(2, 8), st.integers(0, 1 << 30), st.integers(1, 130), st.booleans())
def test_as_a_reference_in_fractions(bits: int, seed: int, most: int, moved: bool) -> None:
    random = np.random.default_rng(seed)
    weight = on_a_grid(random.integers(-most, most + 1, (3, COLUMNS)), seed, COLUMNS)
    if moved:
        weight[1, 7] = np.nextafter(weight[1, 7], np.float32(np.inf))
    found = whole_multiples(weight, COLUMNS, bits)
    assert (found is not None) == all(has_a_step(block, bits) for block in weight)
    if found is not None:
        multiples, steps = found
        assert multiples.min() >= -(2 ** (bits - 1)) and multiples.max() < 2 ** (bits - 1)
        np.testing.assert_array_equal((multiples * steps[:, :, None]).reshape(weight.shape), weight)
        np.testing.assert_array_equal(steps.astype(np.float16).astype(np.float32), steps)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_format_holds_what_it_says(name: str) -> None:
    format, random = FORMATS[name], np.random.default_rng(0)
    assert isinstance(format, HoldsIntegers)
    bits = max(bits for bits in range(2, 9) if format.holds(Integers(bits, 256)))
    multiples = random.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (40, 512))
    multiples[3], multiples[5] = 0, -(2 ** (bits - 1))
    weight = on_a_grid(multiples, 1, 256)
    data = format.exact_rows(weight)
    assert data is not None and data.shape == (40, format.stored_bytes(1, 512))
    np.testing.assert_array_equal(format.decode_rows(data, 512), weight)
    # More rows than are looked at first.
    weight[30, np.flatnonzero(weight[30])[0]] *= np.float32(1.0001)
    assert format.exact_rows(weight) is None


def test_no_format_holds_integers_of_smaller_blocks_or_more_bits() -> None:
    for name, format in FORMATS.items():
        bits = max(bits for bits in range(2, 9) if format.holds(Integers(bits, 256)))
        assert not format.holds(Integers(bits + 1, 256)), name
        assert not format.holds(Integers(bits, format.block_columns // 2)), name
