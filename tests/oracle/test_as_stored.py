"""Code for code: a GGUF source in the types that it has, or in one of them, keeps its very bytes.

Formats of other names that hold its integers keep every weight, and so do floats that are integers.
"""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from exporter.calibrate.layer_stream import silent
from exporter.calibrate.statistics import Statistics, collect
from exporter.calibrate.windows import Windows
from exporter.compress.awq_scaling import Rewritten
from exporter.compress.checks import check_methods
from exporter.compress.compression import Compression, propagates_errors
from exporter.compress.effort import EFFORTS
from exporter.formats.group import Decision
from exporter.foundation.errors import RequestError
from exporter.model.model import Model
from exporter.model.sources import open_model
from exporter.pipeline import build, plan
from exporter.planning.job import Job
from exporter.planning.resolve import resolve
from exporter.prove.source_check import check_source
from exporter.stages.predicted_times import VOCABULARY_SECONDS
from exporter.targets.artifact import Artifact
from exporter.targets.contract import Target, load_target, lower
from exporter.targets.gguf.formats.ggml import ggml_format
from exporter.targets.onnx.matmulnbits import matmulnbits_format
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
        with pytest.raises(RequestError, match=r"no format of the target holds the codes .*; got floats"):
            load_target("onnx").decide(model, "as-stored", "ldlq")


def require_all_kept(target: Target, model: Model, decisions: list[Decision], type: str, folder: Path) -> Artifact:
    """Check that a runtime decodes every matrix of an artifact to the very weights of the source."""
    folder.mkdir()
    check_methods(decisions, model)
    assert {one.method for one in decisions} == {"as-stored"}
    made = lower(target, Compression(model, decisions), type, folder)
    assert {outcome.output_error for outcome in made.outcomes.values()} == {0.0}
    read = target.read_back(made.artifact, model)
    for group in model.groups():
        np.testing.assert_array_equal(read(group), model.read(group.name))
    return made.artifact


# Query, key and value are one storage there: all three get the format that holds each.
WIDER = {"model.layers.0.self_attn.k_proj.weight": "Q8_0", "model.layers.1.mlp.down_proj.weight": "Q5_0"}


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def integers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a GGUF file of types that hold integers."""
    place, target = tmp_path_factory.mktemp("integers"), load_target("gguf")
    with open_model(str(tiny_model(place / "model", request.param))) as model:
        decisions = [
            replace(one, format=ggml_format(WIDER.get(one.group.name, "Q4_0")))
            for one in target.decide(model, "Q4_0", "rtn")
        ]
        return lower(target, Compression(model, decisions), "Q4_0", place).artifact.weights[0]


def test_onnx_keeps_every_integer(integers: Path, tmp_path: Path) -> None:
    target = load_target("onnx")
    with open_model(str(integers)) as model:
        decisions = target.decide(model, "as-stored", "ldlq")
        eight_bits = {one.group.name for one in decisions if one.format.name == "int8-b32"}
        assert eight_bits == {*WIDER, *(f"model.layers.0.self_attn.{role}_proj.weight" for role in "qv")}
        assert {one.format.name for one in decisions if one.group.name not in eight_bits} == {"int4-b32"}
        made = require_all_kept(target, model, decisions, "as-stored", tmp_path / "made")
        gate = next(group for group in model.groups() if group.role == "gate")
        format = matmulnbits_format("int4-b32")
        codes, _, _ = format.split(format.encode_rows(model.read(gate.name), None), gate.columns)
        # The check sees one wrong nibble.
        data = bytearray(made.weights[1].read_bytes())
        data[data.index(codes.tobytes())] ^= 0x10
        made.weights[1].write_bytes(data)
        assert (target.read_back(made, model)(gate) != model.read(gate.name)).sum() == 1


@pytest.mark.parametrize(("name", "type"), [("onnx", "int8"), ("onnx", "int8-b16-asymmetric"), ("gguf", "Q8_0")])
def test_a_type_of_more_bits_keeps_every_integer(integers: Path, name: str, type: str, tmp_path: Path) -> None:
    target = load_target(name)
    with open_model(str(integers)) as model:
        require_all_kept(target, model, target.decide(model, type, "ldlq"), type, tmp_path / "made")


def test_onnx_refuses_offsets(tmp_path: Path) -> None:
    made = lowered(tiny_model(tmp_path / "model"), tmp_path / "made", "gguf", "Q4_1").weights[0]
    with (
        open_model(str(made)) as model,
        pytest.raises(RequestError, match=r"no format of the target holds .*; got Q4_1.*, or the target gguf"),
    ):
        load_target("onnx").decide(model, "as-stored", "ldlq")


@pytest.mark.parametrize(("name", "type"), [("onnx", "int4"), ("gguf", "Q4_0")])
def test_floats_on_the_grid_of_a_type_are_kept(name: str, type: str, tmp_path: Path) -> None:
    """A model that was trained for the grid of a type is a folder of floats."""
    target, folder, grid = load_target(name), tiny_model(tmp_path / "model"), ggml_format("Q4_0")
    with open_model(str(folder)) as model:
        off = model.groups()[-1].name
        rounded = {
            group.name: grid.decode_rows(grid.encode_rows(weight, None), group.columns)
            for group in model.groups()
            for weight in [model.read(group.name)]
        }
    save_file(load_file(folder / "model.safetensors") | rounded, folder / "model.safetensors")
    with open_model(str(folder)) as model:
        require_all_kept(target, model, target.decide(model, type, "as-stored"), type, tmp_path / "made")
    rounded[off][3, 5] += np.float32(1e-4)
    save_file(load_file(folder / "model.safetensors") | rounded, folder / "model.safetensors")
    with (
        open_model(str(folder)) as model,
        pytest.raises(RequestError, match=rf"{off}: the source holds no codes .* got floats"),
    ):
        check_methods(target.decide(model, type, "as-stored"), model)


def test_a_report_counts_them(source: Path, tmp_path: Path) -> None:
    with open_model(str(source)) as model:
        draft = resolve(Job(str(source), "raspberry-pi-5", "gguf", type="as-stored", context=64), model).draft()
        _, notes = draft.decided(Rewritten(model, Statistics(tmp_path)), silent)
        count = len(model.groups())
    assert notes == (f"{count} of {count} matrices keep the codes of the source",)


def test_a_plan_counts_no_time_for_them(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    made = plan(Job(str(source), "raspberry-pi-5", "gguf", type="as-stored", context=64))
    assert {one.method for one in made.decisions} == {"as-stored"}
    assert made.stage_seconds["compress and lower"].value == VOCABULARY_SECONDS


@pytest.mark.parametrize("share", [1.0, 0.85])
def test_a_budget_keeps_codes_where_that_pays(source: Path, share: float, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the capital of France is Paris, numbers 12 345 and hello world. " * 400)
    with open_model(str(source)) as model:
        fixed = load_target("gguf").fixed_bytes(model)
        held = sum(one.stored_bytes for one in load_target("gguf").decide(model, "as-stored", "ldlq"))
        count = len(model.groups())
    job = Job(
        str(source), "raspberry-pi-5", "gguf", max_file_bytes=fixed + int(share * held), prefer="accuracy",
        effort="fast", calibration=text, evaluation=text, window=64, context=64, evaluation_windows=4,
        output=tmp_path / "bundle",
    )  # fmt: skip
    bundle = build(job)
    kept = [row for row in bundle.report.tensors if row.method == "as-stored"]
    # Not all of them at their own size either: some pay for formats whose activations are rounded in smaller blocks.
    assert count / 2 < len(kept) if share == 1.0 else 0 < len(kept) < count
    assert {row.output_error for row in kept} == {0.0}
    assert f"{len(kept)} of {count} matrices keep the codes of the source" in bundle.report.recipe.remarks
    with open_model(str(source)) as model:
        resolved = resolve(Job(str(source)).repeating(bundle.plan), model)
        again = bundle.plan.decisions(resolved.draft(), resolved.target.alternatives)
    assert {one.group.name: one.method for one in again} == {row.name: row.method for row in bundle.report.tensors}


@pytest.mark.parametrize(("recipe", "method"), [("rate", "entropy-constrained-int8"), ("double", "coarse-int8")])
def test_a_recipe_of_coarse_steps_chooses_its_own_codes(integers: Path, recipe: str, method: str) -> None:
    with open_model(str(integers)) as model:
        draft = resolve(Job(str(integers), "raspberry-pi-5", "gguf", recipe=recipe, context=64), model).draft()
    assert {one.method for one in draft.decisions} == {method}
