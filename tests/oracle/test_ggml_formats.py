"""Outside oracles for GGUF types: gguf-py's decoder in numpy, and ggml's own decoder for what we pack."""

import gguf
import numpy as np
import pytest

from exporter.foundation.errors import InputError, RequestError
from exporter.targets.gguf.formats.ggml import ggml_format, ggml_formats
from exporter.targets.gguf.formats.k_quants import NESTINGS, NestedGrid

PACKED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")


def weights(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


@pytest.mark.parametrize("name", list(ggml_formats()))
def test_decodes_as_gguf_py_does(name: str) -> None:
    weight, format = weights(8, 512), ggml_format(name)
    data = format.encode_rows(weight, np.linspace(0.1, 2, 512, dtype=np.float32))
    assert data.nbytes == format.stored_bytes(8, 512)
    np.testing.assert_array_equal(format.decode_rows(data, 512), gguf.dequantize(data, format.type))


@pytest.mark.parametrize("name", PACKED)
def test_packed_grid_decodes_to_its_own_values_and_a_flipped_nibble_is_seen(name: str) -> None:
    block, format = weights(64, 32), ggml_format(name)
    grid = format.grid(block, None)
    assert grid is not None
    rounded = [grid.round(column, block[:, column]) for column in range(32)]
    data = grid.pack(np.stack([codes for codes, _ in rounded], axis=1))
    planned = np.stack([values for _, values in rounded], axis=1)
    np.testing.assert_array_equal(format.decode_rows(data, 32), planned)
    header = 4 if name in ("Q4_1", "Q5_1") else 2
    for position in range(header, data.shape[1]):
        damaged = data.copy()
        damaged[:, position] ^= 0x10
        assert not np.array_equal(format.decode_rows(damaged, 32), planned), position


@pytest.mark.parametrize("name", list(NESTINGS))
def test_nested_scales_decode_to_their_own_values_and_a_flipped_nibble_is_seen(name: str) -> None:
    block, format = weights(64, 256), ggml_format(name)
    gram = np.cov(weights(256, 1024, 1)).astype(np.float32)
    grid = format.grid(block, None)
    assert isinstance(grid, NestedGrid)
    # Other values than those that ggml chose the scales for, so that all of them move.
    aim = 0.7 * block.T + 0.2 * weights(256, 64, 2)
    codes = np.empty((256, 64), np.uint8)
    for first in range(0, 256, grid.part_columns):
        part = slice(first, first + grid.part_columns)
        grid = grid.reached(first, aim[part], np.linspace(1, 2, grid.part_columns, dtype=np.float32))
        codes[part] = grid.round(first, aim[part])[0]
    refitted = grid.refit(codes, gram, gram @ aim)
    for one in (grid, refitted):
        data = one.pack(np.ascontiguousarray(codes.T))
        np.testing.assert_array_equal(format.decode_rows(data, 256), one.decode(codes).T)
        for position in range(data.shape[1]):
            damaged = data.copy()
            damaged[:, position] ^= 0x10
            assert not np.array_equal(format.decode_rows(damaged, 256), one.decode(codes).T), position
    assert not np.array_equal(grid.decode(codes), refitted.decode(codes))


@pytest.mark.parametrize("name", list(NESTINGS))
def test_a_part_that_is_reached_gets_scales_for_its_values(name: str) -> None:
    block, format = weights(16, 256), ggml_format(name)
    grid = format.grid(block, None)
    assert isinstance(grid, NestedGrid)
    size = grid.part_columns
    values, importance = 0.6 * block.T[size : 2 * size], np.linspace(1, 3, size, dtype=np.float32)
    reached = grid.reached(size, values, importance)
    before, after = (importance @ (one.round(size, values)[1] - values) ** 2 for one in (grid, reached))
    assert (after <= before).all()
    assert after.sum() < 0.99 * before.sum()
    codes = np.zeros((256, 16), np.uint8)
    others = np.r_[:size, 2 * size : 256]
    np.testing.assert_array_equal(grid.decode(codes)[others], reached.decode(codes)[others])


def test_refuses_what_would_abort_or_encode_nan() -> None:
    weight = weights(2, 256)
    with pytest.raises(InputError, match="IQ2_XXS cannot be encoded without importance"):
        ggml_format("IQ2_XXS").encode_rows(weight, None)
    with pytest.raises(InputError, match="importance for Q4_K is not usable"):
        ggml_format("Q4_K").encode_rows(weight, np.full(256, -1, np.float32))
    with pytest.raises(InputError, match="hold NaN or infinity"):
        ggml_format("Q4_K").encode_rows(np.full((2, 256), np.nan, np.float32), None)
    with pytest.raises(RequestError, match="Q4_K cannot hold rows of 96 weights"):
        ggml_format("Q4_K").encode_rows(weights(2, 96), None)
    with pytest.raises(RequestError, match="did you mean 'Q4_K'"):
        ggml_format("Q4_k")
