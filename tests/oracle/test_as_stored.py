"""Code for code: a GGUF source in the types that it has, or in one of them, keeps its very bytes."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from exporter.calibrate.layer_stream import silent
from exporter.calibrate.statistics import Statistics, collect
from exporter.calibrate.windows import Windows
from exporter.compress.awq_scaling import Rewritten
from exporter.compress.checks import check_methods
from exporter.compress.compression import Compression, propagates_errors
from exporter.compress.effort import EFFORTS
from exporter.foundation.errors import RequestError
from exporter.model.sources import open_model
from exporter.pipeline import plan
from exporter.planning.job import Job
from exporter.planning.resolve import resolve
from exporter.prove.source_check import check_source
from exporter.stages.predicted_times import VOCABULARY_SECONDS
from exporter.targets.contract import load_target, lower
from tests.gguf_files import edited_gguf, lowered
from tests.models import tensor_digests, tiny_model

TOKENS = np.random.default_rng(0).integers(2, 300, (8, 64))
# Rows of the first are in another order in files.
SOURCES = {"llama": "Q4_K", "qwen2": "Q8_0"}


@pytest.fixture(scope="module", params=sorted(SOURCES))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("source")
    folder = tiny_model(place / "model", request.param, hidden=256, intermediate=512, tied=False)
    return lowered(folder, place / "made", "gguf", SOURCES[request.param]).weights[0]


def test_its_own_types_keep_every_byte(source: Path, tmp_path: Path) -> None:
    target = load_target("gguf")
    with open_model(str(source)) as model:
        decisions = target.decide(model, "as-stored", "ldlq")
        check_methods(decisions, model)
        assert {one.method for one in decisions} == {"as-stored"}
        assert not propagates_errors(EFFORTS["balanced"], decisions)
        made = lower(target, Compression(model, decisions), "as-stored", tmp_path)
        assert {outcome.output_error for outcome in made.outcomes.values()} == {0.0}
        read = target.read_back(made.artifact, model)
        for group in model.groups():
            np.testing.assert_array_equal(read(group), model.read(group.name))
    assert tensor_digests(made.artifact.weights[0]) == tensor_digests(source)


# Several matrices are rows of one tensor, or a stack in one.
@pytest.mark.parametrize("family", ["lfm2", "phi3", "qwen3_moe"])
def test_matrices_that_share_a_tensor_keep_every_byte(tmp_path: Path, family: str) -> None:
    folder = tiny_model(tmp_path / "model", family, hidden=256, intermediate=512, layers=3)
    source = lowered(folder, tmp_path / "made", "gguf", "Q4_K_M").weights[0]
    target = load_target("gguf")
    with open_model(str(source)) as model:
        made = lower(target, Compression(model, target.decide(model, "as-stored", "ldlq")), "as-stored", tmp_path)
        read = target.read_back(made.artifact, model)
        for group in model.groups():
            np.testing.assert_array_equal(read(group), model.read(group.name))
            some = np.arange(group.rows)[::-3]
            np.testing.assert_array_equal(model.read_rows(group.name, some), model.read(group.name)[some])
        (check,) = check_source(model, TOKENS, 1, tmp_path)
        assert float(check.value or 0) < 1e-7
    digests = tensor_digests(source)
    assert tensor_digests(made.artifact.weights[0]) == digests
    assert len({type for type, _ in digests.values()} - {"F32"}) > 1


def test_one_of_its_types_keeps_the_bytes_of_these_and_scales_around_them(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    target, windows = load_target("gguf"), Windows.of(TOKENS, "file", 0)
    # One matrix of another type, whose site is scaled; all others of its layer stay.
    other = with_a_float(source, tmp_path / "mixed.gguf", "blk.1.ffn_down.weight")
    with open_model(str(other)) as model:
        types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(source).tensors}
        asked = types["blk.1.ffn_down.weight"]
        decisions = target.decide(model, asked, "ldlq")
        taken = {one.group.name for one in decisions if one.method == "as-stored"}
        assert "model.layers.1.mlp.down_proj.weight" not in taken
        assert "model.layers.0.mlp.down_proj.weight" in taken
        assert propagates_errors(EFFORTS["balanced"], decisions)
        given = target.rewritten(model, collect(model, windows, 0, silent), decisions)
        compression = Compression(
            given.model, decisions, given.statistics, propagation_text=windows.tokens, source=model
        )
        (tmp_path / "made").mkdir()
        made = lower(target, compression, asked, tmp_path / "made").artifact.weights[0]
        ours, theirs = tensor_digests(made), tensor_digests(source)
        names = [one.group.name for one in decisions]
    assert len(taken) < len(names)
    kept = {name for name in theirs if types[name] == asked and name != "blk.1.ffn_down.weight"}
    assert kept and {name: ours[name] for name in kept} == {name: theirs[name] for name in kept}
    assert ours["blk.1.ffn_down.weight"][0] == asked


def with_a_float(source: Path, path: Path, name: str) -> Path:
    """Write a GGUF file anew with one tensor decoded, and its values moved off their grid."""
    tensor = next(one for one in gguf.GGUFReader(source).tensors if one.name == name)
    values = gguf.dequantize(tensor.data, tensor.tensor_type)
    noise = np.random.default_rng(0).normal(0, 0.01, values.shape)
    return edited_gguf(source, path, tensors={name: (values + noise).astype(np.float32)})


def test_a_source_of_floats_has_no_codes(tmp_path: Path) -> None:
    target = load_target("gguf")
    with open_model(str(tiny_model(tmp_path / "model"))) as model:
        with pytest.raises(RequestError, match=r"the source holds no codes; .*expected a GGUF file"):
            target.decide(model, "as-stored", "ldlq")
        with pytest.raises(RequestError, match="the source holds no codes of the type Q8_0; got floats"):
            check_methods(target.decide(model, "Q8_0", "as-stored"), model)
        with pytest.raises(RequestError, match="the source holds no codes of the type int8"):
            check_methods(load_target("onnx").decide(model, "int8", "as-stored"), model)


def test_a_report_counts_them(source: Path, tmp_path: Path) -> None:
    with open_model(str(source)) as model:
        draft = resolve(Job(str(source), "raspberry-pi-5", "gguf", type="as-stored", context=64), model).draft()
        _, notes = draft.decided(Rewritten(model, Statistics(tmp_path)), silent)
        count = len(model.groups())
    assert notes == (f"{count} of {count} matrices keep the codes that the source holds in the same type",)


def test_a_plan_counts_no_time_for_them(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    made = plan(Job(str(source), "raspberry-pi-5", "gguf", type="as-stored", context=64))
    assert {one.method for one in made.decisions} == {"as-stored"}
    assert made.stage_seconds["compress and lower"].value == VOCABULARY_SECONDS
