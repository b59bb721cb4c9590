"""Steps of our choice in 8-bit formats: rates that are kept, and what the rate buys."""

import numpy as np
import pytest

from exporter.calibrate.second_moments import Site
from exporter.coding.streams import coded_bits
from exporter.compress.methods.coarse_int8 import CoarseInt8
from exporter.compress.methods.entropy_constrained_int8 import EntropyConstrainedInt8, damped
from exporter.compress.methods.rtn import RoundToNearest
from exporter.formats.format import Float32, WeightFormat
from exporter.formats.row_scaled import encode_steps, scale_type, stored_steps
from exporter.foundation.errors import RequestError
from exporter.targets.gguf.formats.ggml import ggml_format
from exporter.targets.onnx.matmulnbits import matmulnbits_format
from exporter.targets.onnx_qdq.per_channel import ChannelFormat

ROWS, COLUMNS = 384, 128
FORMATS: list[WeightFormat] = [
    ggml_format("Q8_0"), matmulnbits_format("int8-b32"), matmulnbits_format("int8-b128-f32"), ChannelFormat(COLUMNS)
]  # fmt: skip


def weight(rows: int = ROWS) -> Float32:
    chance = np.random.default_rng(0)
    return (chance.normal(0, 0.02, (rows, COLUMNS)) * np.exp(chance.normal(0, 0.3, (rows, 1)))).astype(np.float32)


def site() -> Site:
    chance = np.random.default_rng(1)
    mixed = chance.normal(size=(COLUMNS, COLUMNS)) * np.exp(chance.normal(0, 0.5, COLUMNS))
    moments = [
        (x.T @ x / len(x)).astype(np.float32) for x in (chance.normal(size=(n, COLUMNS)) @ mixed for n in (3000, 999))
    ]
    return Site(moments[0], moments[1], 0.25, moments[0].diagonal().copy(), {})


def codes_of(format: WeightFormat, data: np.ndarray) -> np.ndarray:
    """Return the codes, uint8 [rows, columns], as the formats' own decoders tell them: values over the row's step."""
    values = format.decode_rows(data, COLUMNS)
    nonzero = np.where(values == 0, np.inf, np.abs(values))
    steps = nonzero.min(axis=1, keepdims=True)
    # The least value of a row is a whole number of steps; of the rows here, one.
    return np.rint(values / steps).astype(np.int8).view(np.uint8)


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_rows_with_a_step_decode_to_code_times_step(format: WeightFormat) -> None:
    chance = np.random.default_rng(2)
    codes = chance.integers(-127, 128, (ROWS, COLUMNS)).astype(np.int8)
    steps = stored_steps(format, chance.uniform(1e-4, 1e-2, ROWS).astype(np.float32))
    decoded = format.decode_rows(encode_steps(format, codes, steps), COLUMNS)
    assert (decoded == codes.astype(np.float32) * steps[:, None]).all()
    codes[3, 5] ^= 1
    assert (format.decode_rows(encode_steps(format, codes, steps), COLUMNS) != decoded).sum() == 1


@pytest.mark.parametrize("bits", [1.5, 2.5, 4.0])
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_the_rate_is_kept(format: WeightFormat, bits: float) -> None:
    for method in (EntropyConstrainedInt8(bits), CoarseInt8(bits)):
        data = method.encode(weight(), format, site()).data
        assert coded_bits(codes_of(format, data)) / (ROWS * COLUMNS) + 16 / COLUMNS == pytest.approx(bits, rel=0.04)


def error(planned: Float32) -> float:
    change = planned - weight()
    return float(np.einsum("ij,jk,ik->", change, site().second_moment, change))


def test_more_bits_lose_less_and_feedback_less_than_rounding() -> None:
    format = ggml_format("Q8_0")
    errors = [error(EntropyConstrainedInt8(bits).encode(weight(), format, site()).planned) for bits in (2.0, 3.0, 4.0)]
    # A bit is worth a factor of four where steps are fine.
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    rounded = error(EntropyConstrainedInt8(3.0).encode(weight(), format, None).planned)
    assert errors[1] < 0.8 * rounded


def test_sensitive_rows_get_finer_steps() -> None:
    roots = np.ones(ROWS, np.float32)
    roots[: ROWS // 2] = 4
    planned = EntropyConstrainedInt8(3.0, roots).encode(weight(), ggml_format("Q8_0"), site()).planned
    change = ((planned - weight()) ** 2).mean(axis=1)
    assert change[: ROWS // 2].mean() < change[ROWS // 2 :].mean() / 6


def test_feedback_is_that_of_a_naive_loop() -> None:
    given, step = weight(24), 0.01
    moment = damped(site().second_moment, site().shrinkage).astype(np.float64)
    upper = np.linalg.cholesky(np.linalg.inv(moment)).T
    encoded = EntropyConstrainedInt8(step=step).encode(given, ggml_format("Q8_0"), site())
    squares = (given / step) ** 2
    variance = np.outer(squares.mean(axis=1), squares.mean(axis=0)) / squares.mean()
    left, codes = given.astype(np.float64), np.zeros(given.shape)
    stored = float(np.float16(step))
    for j in range(COLUMNS):
        codes[:, j] = np.rint(left[:, j] / stored * (variance[:, j] / (variance[:, j] + 1 / 12)))
        wrong = (left[:, j] - codes[:, j] * stored) / upper[j, j]
        left[:, j + 1 :] -= wrong[:, None] * upper[j, j + 1 :]
    got = encoded.data.reshape(24, -1, 34)[:, :, 2:].reshape(24, -1).view(np.int8)
    # float32 against float64: a value at a step's bound may fall to the other side.
    assert (got == codes).mean() > 0.97


def test_zeroed_weights_are_those_that_move_outputs_least() -> None:
    largest = np.ones(COLUMNS, np.float32)
    largest[: COLUMNS // 2] = 1e-3
    kept, zeroed = (
        CoarseInt8(4.0, largest, share).encode(weight(), ggml_format("Q8_0"), None).planned for share in (0.0, 0.2)
    )
    gone = (zeroed == 0).mean(axis=0) - (kept == 0).mean(axis=0)
    assert gone[: COLUMNS // 2].mean() > gone[COLUMNS // 2 :].mean() + 0.1


@pytest.mark.parametrize("method", [EntropyConstrainedInt8(3.0), CoarseInt8(3.0)], ids=["rate", "double"])
def test_expected_error_is_about_the_error(method: EntropyConstrainedInt8 | CoarseInt8) -> None:
    format, columns = ggml_format("Q8_0"), np.ones(COLUMNS, np.float32)
    predicted = method.expected_error(weight(), format, site(), columns)
    assert predicted.outputs.sum() == pytest.approx(error(method.encode(weight(), format, site()).planned), rel=0.35)
    blind = method.expected_error(weight(), format, None, columns)
    assert not blind.outputs.any() and blind.lookups.sum() > 0


@pytest.mark.parametrize("name", ["Q4_0", "F16"])
def test_other_formats_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match=f"symmetric formats of 8 bits only; got {name}"):
        EntropyConstrainedInt8().encode(weight(), ggml_format(name), None)
    with pytest.raises(RequestError, match="int8-b32-asymmetric"):
        scale_type(matmulnbits_format("int8-b32-asymmetric"))


@pytest.mark.parametrize("method", [EntropyConstrainedInt8(9.5), CoarseInt8(9.5), EntropyConstrainedInt8(0.01)])
def test_rates_that_no_step_gives_are_refused(method: EntropyConstrainedInt8 | CoarseInt8) -> None:
    with pytest.raises(RequestError, match="no step gives this rate"):
        method.encode(weight(), ggml_format("Q8_0"), site())


def test_steps_beyond_float16_are_refused() -> None:
    with pytest.raises(RequestError, match="a step is beyond the scales of the format"):
        stored_steps(ggml_format("Q8_0"), np.array([1e6], np.float32))


def test_zeros_stay_zero() -> None:
    nothing = np.zeros((8, COLUMNS), np.float32)
    assert not EntropyConstrainedInt8(step=0.01).encode(nothing, ggml_format("Q8_0"), site()).planned.any()
    assert RoundToNearest().encode(nothing, ggml_format("Q8_0"), None).planned.shape == nothing.shape
