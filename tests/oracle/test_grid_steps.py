"""The steps that reference models are blurred by, against the values that gguf-py decodes."""

import gguf
import numpy as np
import pytest

from exporter.targets.gguf.formats.ggml import ggml_format
from tests.grid_steps import STEPS, grid_steps

ROWS, COLUMNS, PART = 16, 512, 16


@pytest.mark.parametrize("kind", sorted(STEPS))
def test_decoded_values_are_whole_steps_apart_and_often_one(kind: gguf.GGMLQuantizationType) -> None:
    weight = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    codes = ggml_format(kind.name).encode_rows(weight, np.ones(COLUMNS, np.float32))
    steps = grid_steps(codes, kind).reshape(-1, PART)
    assert (steps == steps[:, :1]).all()
    values = np.sort(gguf.dequantize(codes, kind).reshape(-1, PART), axis=1)
    apart = np.diff(values, axis=1) / np.abs(steps[:, :1])
    np.testing.assert_allclose(apart, np.round(apart), atol=1e-3)
    # A step that is a part of the right one, or that of another part, would show here.
    nearest = np.where(apart > 0.5, apart, np.inf).min(axis=1)
    assert np.median(nearest) == pytest.approx(1, abs=1e-3)
