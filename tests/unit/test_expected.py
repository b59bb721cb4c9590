"""What a bundle's report expects on the device is what `predict` says, with the memory of this very model."""

from pathlib import Path

import pytest

from exporter.compress.method import AS_STORED
from exporter.device.profile import load_device
from exporter.model.sources import open_model
from exporter.planning.expected import expected, format_of
from exporter.planning.job import Job
from exporter.planning.resolve import resolve
from exporter.predict.prediction import predict
from exporter.predict.request import Request
from exporter.predict.workload import is_known_format
from exporter.targets.artifact import target_names
from exporter.targets.contract import load_target, shape_of
from tests.models import tiny_model

FILE_BYTES = 3_000_000
WIDE = {"hidden": 256, "intermediate": 1024}


@pytest.mark.parametrize(
    ("target", "type", "runtime"), [("gguf", "Q4_0", "llama.cpp"), ("onnx", "int4", "ONNX Runtime")]
)
def test_it_is_the_prediction_for_this_model(tmp_path: Path, target: str, type: str, runtime: str) -> None:
    folder = str(tiny_model(tmp_path / "model", **WIDE))
    with open_model(folder) as model:
        resolved = resolve(Job(folder, "pixel-9", target, type, context=256), model)
        decisions = resolved.draft().decisions
        made = expected(resolved, type, decisions, FILE_BYTES)
        peak = resolved.target.estimated_peak(model, decisions, 256)
        keys_and_values = shape_of(model.decoder).cache_bytes(1, 2)
        request = Request(
            FILE_BYTES, model.decoder.parameters, type, "cpu", 256, 256, runtime, kv_bytes_per_token=keys_and_values
        )
    assert made == predict(load_device("pixel-9"), request, peak)
    assert made is not None and made.peak_bytes.value == peak.bytes
    assert made.peak_bytes.low < peak.bytes < made.peak_bytes.high
    assert (made.context, made.prompt) == (256, 256)
    assert made.residence.status == "fits" and made.residence.sentence.startswith("It fits: it holds ")


def test_experts_that_a_token_does_not_reach_are_not_read(tmp_path: Path) -> None:
    found = []
    for family, changes in (("qwen3", {}), ("qwen3_moe", {"moe_intermediate_size": 256})):
        folder = str(tiny_model(tmp_path / family, family, **WIDE, changes=changes))
        with open_model(folder) as model:
            resolved = resolve(Job(folder, "pixel-9", "gguf", "Q8_0", context=64), model)
            made = expected(resolved, "Q8_0", resolved.draft().decisions, 2 * model.decoder.parameters)
        assert made is not None
        found.append((model.decoder.active_parameters / model.decoder.parameters, made.decode_tokens_per_s.value))
    (dense, slow), (active, quick) = found
    assert active < dense == 1 and quick > slow


def test_a_tiny_model_has_no_prediction(tmp_path: Path) -> None:
    for name, sizes, file_bytes in (("few weights", {}, FILE_BYTES), ("little in them", WIDE, 100_000_000)):
        folder = str(tiny_model(tmp_path / name, **sizes))
        with open_model(folder) as model:
            resolved = resolve(Job(folder, "pixel-9", "gguf", "Q8_0", context=64), model)
            assert expected(resolved, "Q8_0", resolved.draft().decisions, file_bytes) is None


@pytest.mark.parametrize("target", target_names())
def test_every_format_of_a_target_has_a_speed(target: str) -> None:
    names = load_target(target).types()
    # Mixes and code for code have a name of their own, or that of most of their bytes.
    assert names and all(is_known_format(name) or name == AS_STORED for name in names)


def test_a_mix_without_a_name_is_as_fast_as_most_of_its_bytes() -> None:
    rows = [("Q8_0", 10), ("Q4_K+r32-Q8_0", 8), ("Q4_K", 7)]
    assert format_of("Q4_K_M", rows) == "Q4_K_M"
    assert format_of("at most 5,000 bytes", rows) == "Q4_K"
    assert format_of("as it was", []) == "as it was"
