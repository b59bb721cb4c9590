"""The target `onnx-qdq` against ONNX Runtime: its quantisers, what it fuses, and the model before it was rewritten."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from safetensors.torch import load_file, save_file

from exporter.calibrate.ranges import ChannelRanges, output_place
from exporter.calibrate.second_moments import Site
from exporter.calibrate.statistics import Statistics, collect
from exporter.calibrate.windows import Windows
from exporter.compress.awq_scaling import EVERY_SITE, Rewritten, equalised, scaled_channels
from exporter.compress.compression import Compression
from exporter.compress.effort import EFFORTS
from exporter.compress.method import load_method
from exporter.foundation.errors import RequestError
from exporter.model.model import Model
from exporter.model.sources import open_model
from exporter.prove.accuracy import Distance, Reference, distance
from exporter.prove.accuracy import dequantised as with_weights
from exporter.prove.lowering import Decoded, check_rounding, check_stored_types, check_weights
from exporter.targets.artifact import Artifact
from exporter.targets.contract import Lowered, load_target, lower
from exporter.targets.onnx_qdq.graph import parameters
from exporter.targets.onnx_qdq.per_channel import ChannelFormat
from exporter.targets.onnx_qdq.readback import dequantised
from exporter.targets.onnx_qdq.target import TYPES
from exporter.targets.opened import OpenedArtifact
from tests.models import FAMILIES, tiny_model

TOKENS = np.random.default_rng(0).integers(2, 200, (2, 48))


@pytest.fixture
def model_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))

    def make(family: str = "llama", **options: bool) -> Model:
        return open_model(str(tiny_model(tmp_path / "model", family, **options)))

    return make


def observed(model: Model) -> Statistics:
    return collect(model, Windows.of(TOKENS, "file", 0), 0, lambda done, total: None)


def made_of(model: Model, folder: Path, type: str, method: str = "rtn") -> Lowered:
    folder.mkdir()
    target = load_target("onnx-qdq")
    changed = target.rewritten(model, observed(model), [])
    decisions = target.decide(model, type, method)
    compressed = Compression(changed.model, decisions, changed.statistics, source=model)
    return lower(target, compressed, type, folder)


def decoded(artifact: Artifact, model: Model) -> Decoded:
    found = Decoded(load_target("onnx-qdq").read_back(artifact, model))
    for group in model.groups():
        found(group)
    return found


def measured(reference: Reference, artifact: Artifact) -> Distance:
    with OpenedArtifact(artifact, 64, 1, exact=True) as child:
        return distance(reference, child.logits)


def test_int8_channel_decodes_as_the_runtime_does_and_a_flipped_bit_is_seen() -> None:
    weight = np.random.default_rng(0).standard_normal((24, 96)).astype(np.float32)
    weight[5] = 0
    format = ChannelFormat(96)
    data = format.encode_rows(weight, None)
    assert data.nbytes == format.stored_bytes(24, 96)
    planned = format.decode_rows(data, 96)
    codes, scales = format.split(data)
    assert codes.min() == -127 or codes.max() == 127
    np.testing.assert_array_equal(dequantised(codes, scales, 0), planned)
    np.testing.assert_array_equal(dequantised(np.ascontiguousarray(codes.T), scales, 1).T, planned)
    damaged = data.copy()
    damaged[3, 17] ^= 0x10
    assert not np.array_equal(dequantised(*format.split(damaged), 0), planned)


@given(seed=st.integers(0, 2**32 - 1), magnitude=st.sampled_from([0.0, 1e-38, 1e-6, 1.0, 1e30]))
def test_every_weight_is_within_half_a_step(seed: int, magnitude: float) -> None:
    format = ChannelFormat(32)
    weight = (np.random.default_rng(seed).standard_normal((5, 32)) * magnitude).astype(np.float32)
    found = format.decode_rows(format.encode_rows(weight, None), 32)
    half = np.abs(weight).max(axis=1, keepdims=True) / 127 / 2
    assert (np.abs(found - weight) <= np.maximum(half * (1 + 1e-4), 1e-30)).all()


def test_error_feedback_lowers_the_error_of_the_outputs() -> None:
    chance = np.random.default_rng(0)
    weight, inputs = (
        chance.standard_normal((16, 64)),
        chance.standard_normal((256, 8)) @ chance.standard_normal((8, 64)),
    )
    weight, moment = weight.astype(np.float32), (inputs.T @ inputs / 256).astype(np.float32)
    site = Site(moment, moment, 0.0, moment.diagonal(), {})

    def error(method: str, effort: str) -> float:
        change = load_method(method, EFFORTS[effort]).encode(weight, ChannelFormat(64), site).planned - weight
        return float(np.einsum("ij,jk,ik->", change, moment, change))

    assert error("ldlq", "fast") < 0.5 * error("rtn", "fast")
    assert error("ldlq", "max") < error("ldlq", "fast")


def test_int8_channel_refuses_another_width() -> None:
    with pytest.raises(RequestError, match="int8-channel cannot hold rows of 32 weights"):
        ChannelFormat(64).encode_rows(np.zeros((2, 32), np.float32), None)


@pytest.mark.parametrize("codes", [np.uint8, np.uint16])
@pytest.mark.parametrize(("low", "high"), [(-3.0, 1.0), (0.5, 2.0), (-2.0, -0.5), (0.0, 0.0), (-1e4, 1e-3)])
def test_static_ranges_hold_their_ends_and_zero(codes: type[np.unsignedinteger], low: float, high: float) -> None:
    ends = np.array([low, high, 0.0], np.float32)
    scale, zero_point = parameters(codes, ChannelRanges(ends[:1], ends[1:2]))
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(codes))
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "range",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])],
        [helper.make_tensor("s", TensorProto.FLOAT, [], [scale]), helper.make_tensor("z", kind, [], [int(zero_point)])],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": ends})[0]
    assert found[2] == 0
    assert np.abs(found - ends).max() <= 0.51 * scale
    beyond = session.run(None, {"x": 1.2 * ends})[0]
    assert (np.abs(beyond - 1.2 * ends).max() <= 0.51 * scale) == (codes is np.uint16 or low == high)


def adds_exactly() -> bool:
    """Whether the processor adds products of bytes exactly.

    Without VNNI, AVX2 and AVX-512 add two of them in 16 bits, which saturate (ONNX Runtime, "Quantize ONNX models").
    The session option against it, `session.x64quantprecision`, refuses weights with a scale for each channel.
    """
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    return "avx2" not in flags or not {"avx_vnni", "avx512_vnni"}.isdisjoint(flags)


@pytest.mark.parametrize("type", list(TYPES))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_artifact_holds_the_planned_weights_and_answers_as_they_do(
    tmp_path: Path, model_of, family: str, type: str
) -> None:  # fmt: skip
    with model_of(family, tied=family in ("llama", "qwen3")) as model:
        lowered = made_of(model, tmp_path / "artifact", type)
        artifact = lowered.artifact
        found = decoded(artifact, model)
        assert check_weights(found.digests, lowered).status == "passed"
        assert check_stored_types(load_target("onnx-qdq"), lowered).status == "passed"
        own = Reference.of(with_weights(lowered.compression.model, found), TOKENS)
        assert measured(own, artifact).kl_mean < (1e-5 if type == "a16w8" else 0.01 if adds_exactly() else 0.1)
        again = made_of(model, tmp_path / "again", type).artifact
        for one, other in zip(artifact.weights, again.weights, strict=True):
            assert one.read_bytes() == other.read_bytes()
        data = bytearray(artifact.weights[1].read_bytes())
        data[1000] ^= 0x10
        artifact.weights[1].write_bytes(data)
        assert check_weights(decoded(artifact, model).digests, lowered).status == "failed"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("type", list(TYPES))
def test_the_runtime_fuses_every_product(tmp_path: Path, model_of, type: str, tied: bool) -> None:
    with model_of(tied=tied) as model:
        artifact = made_of(model, tmp_path / "artifact", type).artifact
        shape = model.decoder
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(artifact.weights[0]), options, providers=["CPUExecutionProvider"])
    graph = onnx.load_model(tmp_path / "optimised.onnx", load_external_data=False).graph
    kinds = Counter(node.op_type for node in graph.node)
    wide = shape.layers + 1 if type == "a8w8" else 7 * shape.layers + 1
    assert kinds["MatMul"] == 0
    assert kinds["QLinearMatMul"] == 7 * shape.layers + 1 - wide
    assert kinds["MatMulNBits"] == wide


def test_a_vector_out_of_place_is_more_than_rounding(tmp_path: Path, model_of) -> None:
    with model_of() as model:
        lowered = made_of(model, tmp_path / "artifact", "a8w8")
        artifact = lowered.artifact
        own = Reference.of(with_weights(lowered.compression.model, decoded(artifact, model)), TOKENS)
        limit = load_target("onnx-qdq").most_rounding_kl
        assert check_rounding(measured(own, artifact), limit).status == "passed"
        graph = onnx.load_model(artifact.weights[0], load_external_data=False)
        (norm,) = (t for t in graph.graph.initializer if t.name == "model.layers.2.final_norm_layernorm.weight")
        where = {entry.key: entry.value for entry in norm.external_data}
        values = np.memmap(artifact.weights[1], np.float32, "r+", int(where["offset"]), tuple(norm.dims))
        values[:] = -values
        values.flush()
        assert check_rounding(measured(own, artifact), limit).status == "failed"


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", [partial(equalised, alpha=0.5, sites=EVERY_SITE), partial(scaled_channels, alpha=0.5)])
def test_equalised_channels_compute_the_same(model_of, family: str, rule: Callable[..., Rewritten]) -> None:
    with model_of(family, tied=family != "mistral") as model:
        statistics = observed(model)
        before = Reference.of(model, TOKENS)
        changed = rule(model, statistics)
        after = Reference.of(changed.model, TOKENS)
        torch.testing.assert_close(after.logits(0, slice(0, 48)), before.logits(0, slice(0, 48)), rtol=0, atol=5e-5)
        assert_statistics_are_those_of_the_model(changed, statistics)


def assert_statistics_are_those_of_the_model(changed: Rewritten, before: Statistics) -> None:
    """Collect them anew from the tensors, under a digest of their own."""
    model = changed.model
    model.__dict__["digest"] = "rewritten"
    again = observed(model)
    mixing, feed_forward = model.decoder.blocks[0].sublayers[0], model.decoder.blocks[1].sublayers[1]
    for place in (site.name for site in (*mixing.sites, *feed_forward.sites)):
        old, expected, got = (one.site(place) for one in (before, again, changed.statistics))
        assert old is not None and expected is not None and got is not None
        np.testing.assert_allclose(got.squares, expected.squares, rtol=1e-3)
        np.testing.assert_array_equal(changed.statistics.importance(place), got.squares)
        np.testing.assert_allclose(changed.statistics.power(place), got.second_moment.diagonal(), rtol=1e-5)
        assert not np.allclose(got.squares, old.squares, rtol=0.05)
        # Weights of the tokens follow from random draws: the moments are held against those before.
        factor = np.sqrt(old.squares / expected.squares)
        for block, peak in got.peaks.items():
            np.testing.assert_allclose(peak, expected.peaks[block], rtol=0.5)
        for moment, was in ((got.fitted, old.fitted), (got.held, old.held), (got.second_moment, old.second_moment)):
            np.testing.assert_allclose(moment * np.outer(factor, factor), was, rtol=1e-2, atol=1e-3 * was.max())
    np.testing.assert_allclose(
        changed.statistics.sensitivity(1, "up"), before.sensitivity(1, "up") * factor**2, rtol=1e-2
    )
    np.testing.assert_array_equal(changed.statistics.sensitivity(1, "q"), before.sensitivity(1, "q"))
    np.testing.assert_array_equal(changed.statistics.lookups()[1], before.lookups()[1])
    for place in ("layers.0.mlp_out", output_place(0, "up"), output_place(1, "v"), output_place(1, "down")):
        expected_range, got_range = again.ranges(place), changed.statistics.ranges(place)
        assert expected_range is not None and got_range is not None
        np.testing.assert_allclose(got_range.low, expected_range.low, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(got_range.high, expected_range.high, rtol=1e-3, atol=1e-4)


def test_evened_channels_are_as_loud_as_the_formula_says(model_of) -> None:
    with model_of() as model:
        statistics = observed(model)
        before, after = (
            one.site("layers.1.mlp_in") for one in (statistics, scaled_channels(model, statistics, 0.5).statistics)
        )
        assert before is not None and after is not None
        louder, left = (np.sqrt(one.second_moment.diagonal()) for one in (before, after))
        np.testing.assert_allclose(left, np.sqrt(louder) * np.exp(np.log(louder).mean() / 2), rtol=1e-3)


def test_channels_are_evened_for_fitted_codes_only(model_of) -> None:
    with model_of() as model:
        for name, types in {"gguf": ("Q4_0", "F32"), "onnx": ("int4", "F32")}.items():
            target, statistics = load_target(name), observed(model)
            for type, method, changes in (
                (types[0], "ldlq", True),
                (types[0], "rtn", False),
                (types[1], "ldlq", False),
            ):
                changed = target.rewritten(model, statistics, target.decide(model, type, method))
                assert (changed.model is not model) is changes


def test_equalising_narrows_an_outlying_channel(model_of) -> None:
    with model_of() as model:
        path = model.folder / "model.safetensors"
        tensors = load_file(path)
        tensors["model.layers.1.post_attention_layernorm.weight"][7] *= 30
        save_file(tensors, path, metadata={"format": "pt"})
    with open_model(str(model.folder)) as model:
        changed = equalised(model, observed(model), 0.5, EVERY_SITE)
        spread = []
        for statistics in (observed(model), changed.statistics):
            ranges = statistics.ranges("layers.1.mlp_in")
            assert ranges is not None
            spread.append(ranges.largest.max() / np.median(ranges.largest))
        assert spread[1] < 0.4 * spread[0]


def test_static_activations_need_observed_ranges(tmp_path: Path, model_of) -> None:
    with model_of() as model:
        target = load_target("onnx-qdq")
        compressed = Compression(model, target.decide(model, "a16w8", "rtn"))
        with pytest.raises(RequestError, match=r"head_out: the ranges of the activations were not observed"):
            lower(target, compressed, "a16w8", tmp_path)
        with pytest.raises(RequestError, match=r"layers\.0\.mlp_in: the ranges of the activations were not observed"):
            equalised(model, Statistics(tmp_path), 0.5, ("mlp_in",))
        with pytest.raises(RequestError, match=r"layers\.0\.attention_in: the activations were not observed"):
            scaled_channels(model, Statistics(tmp_path))
        with pytest.raises(RequestError, match="unknown QDQ type 'a8w4'"):
            target.decide(model, "a8w4", "rtn")


def test_a_product_whose_activations_no_codes_hold_stays_in_floats(
    tmp_path: Path, model_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if one token had driven a channel to 20,000: the step of its codes is what other tokens have there."""
    name, place, seen = "model.layers.1.mlp.down_proj.weight", output_place(1, "down"), Statistics.ranges

    def driven_to(largest: float) -> None:
        def ranges(statistics: Statistics, asked: str) -> ChannelRanges | None:
            found = seen(statistics, asked)
            if found is None or asked != place:
                return found
            return ChannelRanges(found.low, np.concatenate([np.float32([largest]), found.high[1:]]))

        monkeypatch.setattr(Statistics, "ranges", ranges)

    with model_of() as model:
        target, reference, found = load_target("onnx-qdq"), Reference.of(model, TOKENS), {}
        driven_to(20_000)
        changed = target.rewritten(model, observed(model), [])
        decided = {"codes": target.decide(model, "a16w8", "rtn")}
        decided["floats"] = target.reconsidered(changed, decided["codes"])
        assert [one.group.name for one in decided["floats"] if one.format.name == "F16"] == [name]
        for way, decisions in decided.items():
            (tmp_path / way).mkdir()
            compression = Compression(changed.model, decisions, changed.statistics, source=model)
            made = lower(target, compression, "a16w8", tmp_path / way)
            assert check_weights(decoded(made.artifact, changed.model).digests, made).status == "passed"
            assert target.stored_types(made.artifact, model)[name] == {"codes": "int8-channel", "floats": "F16"}[way]
            found[way] = measured(reference, made.artifact).kl_mean
        assert found["floats"] < found["codes"] / 3
        # Float16 does not reach so far.
        driven_to(70_000)
        assert target.reconsidered(changed, decided["codes"]) == decided["codes"]
