"""Recipes: named and the user's own, every way in which a file can be wrong, and what a step decides."""

from pathlib import Path

import pytest

from exporter.compress.caldera import Turns
from exporter.errors import ExporterError, InputError, RequestError
from exporter.job import Job
from exporter.model.sources import open_model
from exporter.pipeline import planned_within
from exporter.recipe import load_recipe, recipe_names
from exporter.targets.target import load_target
from tests.models import tiny_model

GOOD = """
schema_version = 1
title = "Two bits and factors"

[[step]]
method = "caldera"
rank = 32
factor_bits = 8
"""


def recipe(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, "utf-8")
    return path


def test_every_named_recipe_loads() -> None:
    assert "caldera" in recipe_names()
    for name in recipe_names():
        assert load_recipe(name).name == name


def test_a_users_own_recipe(tmp_path: Path) -> None:
    made = load_recipe(str(recipe(tmp_path, GOOD + 'first = "matrix"\nturns_of_each = 3\n')))
    assert (made.name, made.title) == ("mine", "Two bits and factors")
    assert made.turns == Turns(("Q", "LR"), 3)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"caldera"', '"caldra"', r"step 1: unknown method 'caldra'; did you mean 'caldera'\?"),
        ('method = "caldera"', "", r"step 1: a step must name its method; got None, expected one of caldera"),
        ("rank = 32", "ranks = 32", r"step 1: unknown key 'ranks'; did you mean 'rank'\?"),
        ("rank = 32", "rank = 0", r"step 1: rank: the value is wrong; got 0"),
        ("rank = 32", 'rank = "32"', r"step 1: rank: the value is wrong; got '32', expected a whole number"),
        ("factor_bits = 8", "factor_bits = 5", r"step 1: factor_bits: the value is wrong; got 5, expected 4, 8 or 16"),
        ("rank = 32", "rank = 32\noutliers = 4", r"step 1: factors that come first forget the outliers; got first = "),
        ("rank = 32", 'outliers = 65\nfirst = "matrix"', r"step 1: there are more outliers than ranks; got 65"),
        ("schema_version = 1", "schema_version = 2", r"schema_version: the value is wrong; got 2, expected 1"),
        ("[[step]]", "[[steps]]", r"unknown key 'steps'; did you mean 'step'\?"),
        ("[[step]]", "[[step", r"the recipe is not TOML"),
        (GOOD, GOOD + GOOD.partition("factors")[2][2:], r"caldera gives every matrix its codes, so nothing can follow"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises((InputError, RequestError), match=message):
        load_recipe(str(recipe(tmp_path, GOOD.replace(old, new))))


def test_an_unknown_name_and_a_missing_file() -> None:
    with pytest.raises(RequestError, match=r"unknown recipe 'calder'; did you mean 'caldera'\?.*give a .toml file"):
        load_recipe("calder")
    with pytest.raises(RequestError, match=r"none.toml: there is no such file; give the path of a recipe"):
        load_recipe("none.toml")


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_matrices_get_the_fewest_bits_and_factors_and_the_embedding_eight(tmp_path: Path, target: str) -> None:
    made = load_recipe(str(recipe(tmp_path, GOOD)))
    with open_model(str(tiny_model(tmp_path / "model"))) as model:
        decisions = made.decide(model, load_target(target))
        outer = {one.stored_as for one in decisions if one.group.layer is None}
        inner = {one.stored_as for one in decisions if one.group.layer is not None}
    # The model's widths are 64 and 96: no type of 256 columns fits, nor 2 bits in blocks of 64.
    assert outer == {{"gguf": "Q8_0", "onnx": "int8-b32"}[target]}
    assert inner == {{"gguf": "Q4_0+r32-Q8_0", "onnx": "int4-b32+r32-int8-b32"}[target]}


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (
            "gguf",
            "bits = 2",
            r"gguf has no format of 2 bits for matrices of these widths; got 64, 96, expected 4",
        ),
        ("onnx", "bits = 3", r"onnx has no format of 3 bits"),
        ("onnx-qdq", "", r"onnx-qdq carries no low-rank factors of 8 bits"),
        ("gguf", "rank = 48", r"factors in Q8_0 cannot have rows of 48 weights; expected a multiple of 32"),
        ("gguf", "rank = 128", r"the rank is not one that the matrix has; got 128, expected 1 to"),
    ],
)
def test_what_cannot_be_carried_is_refused_at_plan_time(
    tmp_path: Path, target: str, options: str, message: str
) -> None:
    text = GOOD.replace("rank = 32", options if options.startswith("rank") else f"rank = 32\n{options}")
    path = recipe(tmp_path, text)
    with (
        open_model(str(tiny_model(tmp_path / "model"))) as model,
        pytest.raises(ExporterError, match=message),
    ):
        planned_within(Job("model", "galaxy-s24-ultra", target, recipe=str(path)), model)


CODED = """
schema_version = 1
title = "Coarse and coded"

[[step]]
method = "double"
bits = 4

[[step]]
method = "transport"
profile = "fast"
"""
TRANSPORT = CODED[CODED.index('[[step]]\nmethod = "transport') :]


def test_files_may_be_coded_last(tmp_path: Path) -> None:
    made = load_recipe(str(recipe(tmp_path, CODED)))
    assert (made.encoding.method, made.transport) == ("double", "fast")
    assert load_recipe(str(recipe(tmp_path, GOOD))).transport is None
    assert load_recipe(str(recipe(tmp_path, GOOD + TRANSPORT))).transport == "fast"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("bits = 4", "bits = 7", r"step 1: bits: the value is wrong; got 7, expected less than or equal to 6"),
        ("bits = 4", "zeroed = 1.0", r"step 1: zeroed: the value is wrong; got 1.0, expected less than 1"),
        ("bits = 4", "equalize = true", r"step 1: unknown key 'equalize'; did you mean 'equalise'\?"),
        ('"fast"', '"quick"', r"step 2: profile: the value is wrong; got 'quick', expected 'small' or 'fast'"),
        (
            CODED,
            CODED + "[[step]]\nmethod = 'caldera'\n",
            r"transport codes the finished model files, so nothing can follow it.*got caldera, which would change what",
        ),
        (
            CODED,
            CODED + TRANSPORT,
            r"step 2: transport codes the finished model files, so nothing can follow it; got transport",
        ),
        (
            CODED,
            CODED.replace("double", "rate") + "[[step]]\nmethod = 'double'\n",
            r"nothing can follow it; got double",
        ),
        (
            CODED[CODED.index("[[step]]") :],
            TRANSPORT,
            r"step 1: transport codes model files, and no step before it makes any; put a step before it",
        ),
        ('[[step]]\nmethod = "transport', "[[step]]\nmethod = 'rate'\n[[step]]\nmethod = \"transport", r"double gives"),
    ],
)
def test_what_cannot_be_coded_is_one_sentence(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert CODED.count(old) == 1
    with pytest.raises((InputError, RequestError), match=message):
        load_recipe(str(recipe(tmp_path, CODED.replace(old, new))))


@pytest.mark.parametrize(("target", "format"), [("gguf", "Q8_0"), ("onnx", "int8-b32"), ("onnx-qdq", "int8-channel")])
@pytest.mark.parametrize("name", ["double", "rate"])
def test_steps_for_coding_take_the_targets_eight_bits(tmp_path: Path, name: str, target: str, format: str) -> None:
    with open_model(str(tiny_model(tmp_path / "model"))) as model:
        planned, _ = planned_within(Job("model", "galaxy-s24-ultra", target, recipe=name), model)
    assert {one.stored_as for one in planned.decisions} == {format}
    assert {one.method for one in planned.decisions} == {name}
    assert planned.transport == "small"


def test_coding_is_asked_for_once(tmp_path: Path) -> None:
    with open_model(str(tiny_model(tmp_path / "model"))) as model:
        job = Job("model", "galaxy-s24-ultra", "gguf", recipe="double", transport="fast")
        with pytest.raises(RequestError, match=r"--transport and the recipe's step transport contradict each other"):
            planned_within(job, model)
        planned, _ = planned_within(Job("model", "galaxy-s24-ultra", "gguf", type="Q8_0", transport="fast"), model)
    assert planned.transport == "fast"


@pytest.mark.parametrize(
    "more",
    [
        {"type": "Q4_0"}, {"method": "rtn"}, {"max_file_bytes": 10**6}, {"bits": 3.0}, {"prefer": "speed"},
        {"min_decode_tokens_per_s": 1.0}, {"min_prefill_tokens_per_s": 1.0},
    ],
)  # fmt: skip
def test_a_recipe_and_what_it_decides_contradict_each_other(tmp_path: Path, more: dict[str, object]) -> None:
    job = Job("model", "galaxy-s24-ultra", "gguf", recipe="caldera", **more)  # type: ignore[arg-type]
    with (
        open_model(str(tiny_model(tmp_path / "model"))) as model,
        pytest.raises(RequestError, match=r"--recipe and --.* contradict each other"),
    ):
        planned_within(job, model)
