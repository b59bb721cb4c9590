"""plan.json: what a build decided, repeated from it, and refused where it does not fit."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter import pipeline
from exporter.foundation.errors import InputError, RequestError
from exporter.planning.job import Job
from exporter.planning.plan import Plan, read_plan
from exporter.planning.recipe import Recipe
from exporter.planning.resolve import recipe_for
from exporter.report.data import to_json
from exporter.targets.contract import load_target
from tests.models import tiny_model

pytestmark = pytest.mark.slow

WORDS = "the capital of France is Paris, numbers 12 345 and hello world. " * 400
DEVICE = "raspberry-pi-5"
Given = Callable[..., Job]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plans")
    tiny_model(folder / "model", hidden=256, intermediate=512, tied=False)
    tiny_model(folder / "other", hidden=256, intermediate=512, tied=False, seed=1)
    (folder / "text.txt").write_text(WORDS)
    (folder / "other.txt").write_text(WORDS[7:])
    return folder


@pytest.fixture
def given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Given:
    """Return a function that gives a job on the model, with changes."""
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(folder / "cache"))

    def make(**changes: object) -> Job:
        usual = {"device": DEVICE, "calibration": folder / "text.txt", "evaluation": folder / "text.txt"}
        return Job(str(folder / "model"), **{"context": 128, "window": 64, "effort": "fast"} | usual | changes)  # type: ignore[arg-type]

    return make


def again(folder: Path, plan: Path, **changes: object) -> Job:
    text = folder / "text.txt"
    usual = {"source": str(folder / "model"), "calibration": text, "evaluation": text}
    return Job(**usual | changes).repeating(read_plan(plan))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"target": "gguf", "bits": 4.5},
        {"target": "onnx", "recipe": "caldera"},
        {"target": "gguf", "recipe": "prune-rate"},
    ],
    ids=["budget", "recipe", "coded"],
)
def test_a_plan_gives_the_same_content_again(
    given: Given, folder: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    made = pipeline.build(given(output=tmp_path / "first", **options))
    repeated = pipeline.build(again(folder, tmp_path / "first" / "plan.json", output=tmp_path / "second"))
    assert repeated.manifest.content_digest == made.manifest.content_digest
    assert (tmp_path / "first" / "plan.json").read_text("utf-8") == to_json(made.plan)
    # Every option of every step is stated.
    for step, table in zip(Recipe.of(made.plan.recipe).steps, made.plan.recipe.steps, strict=True):
        assert table.keys() == type(step).model_fields.keys()
    rows = {row.name: row for row in made.report.tensors}
    for matrix in made.plan.matrices:
        assert (rows[matrix.name].evaluation_kl, rows[matrix.name].calibration_kl) == (
            matrix.evaluation_kl, matrix.calibration_kl,
        )  # fmt: skip
    # What this machine needs is in no plan.
    assert not any(word in to_json(made.plan) for word in ("seconds", "peak", "threads"))


@pytest.fixture(scope="module")
def plan(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the plan of a budget."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_EXPORTER_CACHE", str(folder / "cache"))
        text, output = folder / "text.txt", tmp_path_factory.mktemp("planned") / "bundle"
        job = Job(
            str(folder / "model"), DEVICE, "gguf", bits=4.5, context=128, window=64, effort="fast", calibration=text,
            evaluation=text, output=output,
        )  # fmt: skip
        pipeline.build(job)
    return output / "plan.json"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "other"}, r"the plan was made for another model; got SHA-256 \w{16}, expected SHA-256 \w{16}"),
        ({"device": "pixel-9"}, r"the plan was made for another device profile; got pixel-9"),
        ({"calibration": "other.txt"}, r"the plan was made on another calibration text; .* --calibration"),
        ({"evaluation": "other.txt"}, r"the plan was made on another evaluation text; .* --evaluation"),
        ({"calibration": None}, r"the plan was made on another calibration text; got self-sampled"),
    ],
)
def test_another_input_is_refused(
    given: Given, folder: Path, plan: Path, tmp_path: Path, changes: dict[str, str | None], message: str
) -> None:
    paths = {
        key: value if value is None or key == "device" else (str if key == "source" else Path)(folder / value)
        for key, value in changes.items()
    }
    with pytest.raises(InputError, match=message):
        pipeline.build(again(folder, plan, output=tmp_path / "out", **paths))
    assert not list(tmp_path.iterdir())


def edited(document: dict[str, object], path: str, value: object) -> dict[str, object]:
    *parents, last = path.split(".")
    holder: object = document
    for key in parents:
        holder = holder[int(key) if isinstance(holder, list) else key]  # type: ignore[index]
    if value is KeyError:
        del holder[int(last) if isinstance(holder, list) else last]  # type: ignore[attr-defined]
    else:
        holder[int(last) if isinstance(holder, list) else last] = value  # type: ignore[index]
    return document


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema_version", 2, r"the plan is of a newer schema; got version 2, expected 1; use the version"),
        ("matrices.3", KeyError, r"does not decide each matrix .* got 'none for model.layers.0.self_attn.v_proj"),
        ("matrices.3.name", "extra.weight", r"does not decide each matrix of the model once"),
        ("matrices.3.name", "lm_head.weight", r"does not decide each matrix of the model once"),
        ("matrices.3.format", "Q9_K", r"decides what its own recipe cannot; got Q9_K by ldlq, expected IQ2_XXS or "),
        ("matrices.3.method", "rtn", r"decides what its own recipe cannot; got \w+ by rtn"),
        ("matrices.3.factors", {"rank": 32, "format": "Q8_0"}, r"decides what its own recipe cannot; got .* rank 32"),
        ("matrices.3.evaluation_kl", -1.0, r"matrices.3.evaluation_kl: Input should be greater than or equal to 0"),
        ("matrices.3.reason", "x" * 1001, r"matrices.3.reason: String should have at most 1000"),
        ("matrices", [], r"matrices: "),
        ("recipe.steps.0.method", "magic", r"unknown method 'magic'"),
        ("recipe.steps.0.bits", -4.0, r"recipe.steps 1: bits: the value is wrong; got -4.0"),
        ("recipe.steps.0.bit", 4.0, r"unknown key 'bit'; did you mean 'bits'"),
        ("recipe.steps", [{"method": "transport"}], r"no step of the recipe gives matrices their formats"),
        ("recipe.steps.0.bits", 2.0, r"no choice of formats keeps the limits|exceed its own budget"),
        ("recipe.spends.calibration_windows", 1 << 40, r"calibration_windows: Input should be less than"),
        ("target", "onnx", r"decides what its own recipe cannot|does not decide"),
        ("target", "tflite", r"unknown target 'tflite'"),
        ("extra", 1, r"extra: Extra inputs are not permitted"),
    ],
)
def test_a_plan_that_was_edited_is_one_sentence(
    given: Given, folder: Path, plan: Path, tmp_path: Path, path: str, value: object, message: str
) -> None:
    document = edited(json.loads(plan.read_text("utf-8")), path, value)
    (tmp_path / "plan.json").write_text(json.dumps(document), "utf-8")
    with pytest.raises((InputError, RequestError), match=message):
        pipeline.build(again(folder, tmp_path / "plan.json", output=tmp_path / "out"))
    assert [found.name for found in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_keeps_floats_where_the_target_may_choose_them(given: Given, folder: Path, tmp_path: Path) -> None:
    """Static integers may leave a matrix of a layer in float16, and neither embedding nor head."""
    bundle = pipeline.build(given(target="onnx-qdq", type="a16w8", method="rtn", output=tmp_path / "first"))
    path = tmp_path / "plan.json"
    names = [one.name for one in bundle.plan.matrices]
    said = "decides what its own recipe cannot; got F16 by rtn, expected int8-channel"
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        document = json.loads(to_json(bundle.plan))
        path.write_text(json.dumps(edited(document, f"matrices.{names.index(name)}.format", "F16")), "utf-8")
        with pytest.raises(InputError, match=said):
            pipeline.build(again(folder, path, output=tmp_path / "out"))
    document = json.loads(to_json(bundle.plan))
    down = "model.layers.1.mlp.down_proj.weight"
    path.write_text(json.dumps(edited(document, f"matrices.{names.index(down)}.format", "F16")), "utf-8")
    made = pipeline.build(again(folder, path, output=tmp_path / "out"))
    assert {row.name: row.format for row in made.report.tensors}[down] == "F16"
    assert all(check.status == "passed" for check in made.report.checks)


def test_a_plan_of_more_bytes_than_its_budget_is_refused(
    given: Given, folder: Path, plan: Path, tmp_path: Path
) -> None:
    document = json.loads(plan.read_text("utf-8"))
    for matrix in document["matrices"]:
        matrix["format"] = "Q8_0"
    (tmp_path / "plan.json").write_text(json.dumps(document), "utf-8")
    with pytest.raises(
        InputError, match=r"the plan's formats exceed its own budget; got [\d,]+ bytes, expected at most"
    ):
        pipeline.build(again(folder, tmp_path / "plan.json", output=tmp_path / "out"))


def test_a_file_that_is_no_plan(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"none.json: there is no such file; give the plan.json of a bundle"):
        read_plan(tmp_path / "none.json")
    for text in ("", "[]", "{", "null", '{"schema_version": 1}', "[" * 100_000):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(InputError, match=r"not a Plan document"):
            read_plan(tmp_path / "plan.json")


def test_options_are_short_forms_of_steps() -> None:
    target = load_target("gguf")
    cases: list[tuple[dict[str, object], list[str], dict[str, object]]] = [
        ({}, ["named-type"], {"type": "Q4_K_M", "codes": "ldlq"}),
        ({"type": "Q8_0", "method": "rtn"}, ["named-type"], {"type": "Q8_0", "codes": "rtn"}),
        ({"max_file_bytes": 10**6}, ["allocate"], {"max_file_bytes": 10**6, "prefer": "balanced", "codes": "ldlq"}),
        ({"bits": 4.5, "prefer": "accuracy"}, ["allocate"], {"bits": 4.5, "prefer": "accuracy"}),
        ({"min_decode_tokens_per_s": 20.0}, ["allocate"], {"min_decode": 20.0, "bits": None}),
        ({"prefer": "speed"}, ["allocate"], {"prefer": "speed", "max_file_bytes": None}),
        ({"transport": "fast"}, ["named-type", "transport"], {"type": "Q4_K_M"}),
        ({"recipe": "double"}, ["coarse-int8", "transport"], {"bits": 3.8}),
        ({"recipe": "prunenet", "bits": 4.5}, ["prunenet", "allocate"], {"draws": 64}),
    ]
    for options, steps, first in cases:
        recipe = recipe_for(Job("model", DEVICE, **options), target)  # type: ignore[arg-type]
        assert [step.method for step in recipe.steps] == steps
        assert first.items() <= recipe.document.steps[0].items(), options
        # As stated, it is the same recipe.
        assert Recipe.of(recipe.document) == recipe


def test_a_recipe_file_may_name_every_step(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'schema_version = 1\ntitle = "four bits"\neffort = "max"\n[[step]]\nmethod = "allocate"\nbits = 4.5\n'
    )
    target = load_target("gguf")
    recipe = recipe_for(Job("model", DEVICE, recipe=str(path)), target)
    assert (recipe.effort, recipe.encoding.method if recipe.encoding else None) == ("max", "allocate")
    assert recipe_for(Job("model", DEVICE, recipe=str(path), effort="fast"), target).effort == "fast"
    with pytest.raises(RequestError, match=r"--recipe and --type contradict each other"):
        recipe_for(Job("model", DEVICE, recipe=str(path), type="Q4_0"), target)
    path.write_text(path.read_text() + "max_file_bytes = 1000000\n")
    with pytest.raises(
        InputError, match=r"step 1: the size is limited twice; got max_file_bytes = 1000000, bits = 4.5"
    ):
        recipe_for(Job("model", DEVICE, recipe=str(path)), target)


def test_plans_and_jobs_are_light() -> None:
    libraries = "{'torch', 'onnx', 'gguf', 'transformers', 'safetensors'}"
    code = f"import sys, exporter.planning.job; print({libraries} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
    assert Plan.model_fields["recipe"].is_required()
