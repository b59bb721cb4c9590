"""Recipes: named and the user's own, every way in which a file can be wrong, and what a step decides."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from exporter.calibrate.statistics import Statistics, collect
from exporter.calibrate.windows import Windows
from exporter.compress.caldera import Alternation
from exporter.device.profile import load_device
from exporter.foundation.errors import ExporterError, InputError, RequestError
from exporter.foundation.quantities import Quantity
from exporter.model.blocks import Block
from exporter.model.family import families
from exporter.model.model import Model
from exporter.model.shape import Shape
from exporter.model.sources import open_model
from exporter.pipeline import drafted
from exporter.planning.job import Job
from exporter.planning.outline import needs_of, pruning
from exporter.planning.recipe import load_recipe, recipe_names
from exporter.planning.resolve import ResolvedJob
from exporter.planning.step import Draft, EncodingTask
from exporter.report import figures
from exporter.targets.backends import BackendFormats
from exporter.targets.contract import load_target
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
    made = load_recipe(str(recipe(tmp_path, GOOD + 'first = "matrix"\niterations = 3\n')))
    assert (made.name, made.title) == ("mine", "Two bits and factors")
    assert made.encoding is not None and made.encoding.alternation == Alternation(("Q", "LR"), 3)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"caldera"', '"caldra"', r"step 1: unknown method 'caldra'; did you mean 'caldera'\?"),
        (
            'method = "caldera"',
            "",
            r"step 1: a step must name its method; got None, expected one of allocate, caldera, coarse-int8, ",
        ),
        ("rank = 32", "ranks = 32", r"step 1: unknown key 'ranks'; did you mean 'rank'\?"),
        ("rank = 32", "rank = 0", r"step 1: rank: the value is wrong; got 0"),
        ("rank = 32", 'rank = "32"', r"step 1: rank: the value is wrong; got '32', expected a whole number"),
        ("factor_bits = 8", "factor_bits = 5", r"step 1: factor_bits: the value is wrong; got 5, expected 4, 8 or 16"),
        (
            "rank = 32",
            'outliers = 4\nfirst = "factors"',
            r"step 1: factors that come first forget the outliers; got first = ",
        ),
        ("rank = 32", "outliers = 65", r"step 1: there are more outliers than ranks; got 65"),
        ("schema_version = 1", "schema_version = 2", r"schema_version: the value is wrong; got 2, expected 1"),
        ("[[step]]", "[[steps]]", r"unknown key 'steps'; did you mean 'step'\?"),
        ("[[step]]", "[[step", r"the recipe is not TOML"),
        (
            GOOD,
            GOOD + GOOD.partition("factors")[2][2:],
            r"step 2: caldera gives every matrix its codes, so caldera cannot",
        ),
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
        assert made.encoding is not None
        task = EncodingTask(
            model, model, load_device("galaxy-s24-ultra"), load_target(target), BackendFormats("cpu", None), made.spends
        )
        decisions = made.encoding.draft(task).decisions
        outer = {one.stored_as for one in decisions if one.group.layer is None}
        inner = {one.stored_as for one in decisions if one.group.layer is not None}
    # The widths are 64 and 96: no type of 256 columns fits, but 2 bits in blocks of 32 do.
    assert outer == {{"gguf": "Q8_0", "onnx": "int8-b32"}[target]}
    assert inner == {{"gguf": "Q4_0+r32-Q8_0", "onnx": "int2-b32+r32-int8-b32"}[target]}


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
        ("gguf", "rank = 16", r"factors in Q8_0 cannot have rows of 16 weights; expected a multiple of 32"),
        ("gguf", "rank = 128", r"k_proj.weight: the rank is not one that the matrix has; got 128, expected 1 to 32"),
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
        drafted(Job("model", "galaxy-s24-ultra", target, recipe=str(path)), model)


def test_factors_take_their_share_of_a_rate(tmp_path: Path) -> None:
    text = GOOD.replace("caldera", "entropy-constrained-int8")
    with open_model(str(tiny_model(tmp_path / "model", hidden=256, intermediate=512))) as model:
        job = Job("model", "galaxy-s24-ultra", "onnx", recipe=str(recipe(tmp_path, text + "bits = 5.0\n")))
        _, draft = drafted(job, model)
        assert {one.stored_as for one in draft.decisions} == {"int8-b32", "int8-b32+r32-int8-b32"}
        few = Job("model", "galaxy-s24-ultra", "onnx", recipe=str(recipe(tmp_path, text + "bits = 2.0\n")))
        with pytest.raises(
            RequestError, match=r"the factors leave the matrices too few bits; got 0\.\d\d of 2 beside "
        ):
            drafted(few, model)


PRUNED = """
schema_version = 1
title = "A third of the channels goes"

[[step]]
method = "prunenet"
ratio = 0.34
"""
CODED = GOOD.partition("title")[2].partition("\n")[2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + PRUNED.partition("goes\"")[2], r"step 2: caldera gives every matrix its codes, so prunenet cannot "
         r"follow it; got caldera, then prunenet; put prunenet before caldera"),
        (PRUNED + PRUNED.partition("goes\"")[2].replace("prunenet", "prune-closed-form"), r"step 2: a model is pruned "
         r"once; got prunenet, then prune-closed-form; leave one out and choose the ratio of the other"),
        (PRUNED.replace("0.34", "1.5"), r"step 1: ratio: the value is wrong; got 1.5, expected less than 1"),
        (PRUNED + "sizes = 'equal'", r"step 1: unknown key 'sizes'"),
        (PRUNED + "published = true\ndraws = 16", r"step 1: the published form draws one mask; got draws = 16"),
        (PRUNED + "episodes = 0", r"step 1: episodes: the value is wrong; got 0"),
        (PRUNED.replace("prunenet", "prune-closed-form") + "sizes = 'even'", r"expected 'per-layer' or 'equal'"),
    ],
)  # fmt: skip
def test_orders_and_options_that_cannot_be(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises((InputError, RequestError), match=message):
        load_recipe(str(recipe(tmp_path, text)))


def test_pruning_may_come_before_what_gives_formats(tmp_path: Path) -> None:
    path = str(recipe(tmp_path, PRUNED + CODED))
    with open_model(str(tiny_model(tmp_path / "model"))) as model:
        resolved, draft = drafted(Job("model", "galaxy-s24-ultra", "gguf", recipe=path), model)
    assert (resolved.scheme(draft), resolved.encoding.chooses_codes_by) == ("recipe mine", "caldera")
    pruned = pruning(resolved, draft.decisions)
    assert pruned is not None and pruned.widths == (64, 64)
    assert {one.stored_as for one in draft.decisions} == {"Q8_0", "Q4_0+r32-Q8_0"}


def ungated(shape: Shape, layer: int) -> Block:
    """Describe a block as if its feed-forward part had no gate."""
    block = families()["MistralForCausalLM"].block(shape, layer)
    return replace(block, sublayers=tuple(replace(one, channels=None) for one in block.sublayers))


def drafted_with(
    folder: Path, text: str, family: str = "llama", target: str = "gguf", **more: object
) -> tuple[ResolvedJob, Draft]:
    folder.mkdir(exist_ok=True)
    path = str(recipe(folder, text))
    with open_model(str(tiny_model(folder / "model", family, layers=3))) as model:
        return drafted(Job("model", "galaxy-s24-ultra", target, recipe=path, **more), model)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("target", "more", "scheme", "method"),
    [
        ("gguf", {}, "recipe mine, Q4_K_M", "ldlq"),
        ("onnx", {}, "recipe mine, int4", "ldlq"),
        ("gguf", {"type": "Q8_0", "method": "rtn"}, "recipe mine, Q8_0", "rtn"),
        ("gguf", {"bits": 5.0}, "recipe mine, at most 70,680 bytes", "ldlq"),
        ("onnx", {"max_file_bytes": 160_000}, "recipe mine, at most 160,000 bytes", "ldlq"),
    ],
)
def test_without_a_step_that_gives_formats_the_job_does(
    tmp_path: Path, target: str, more: dict[str, object], scheme: str, method: str
) -> None:
    resolved, draft = drafted_with(tmp_path, PRUNED, "llama", target, **more)
    assert (resolved.scheme(draft), resolved.encoding.chooses_codes_by) == (scheme, method)
    pruned = pruning(resolved, draft.decisions)
    assert pruned is not None
    assert pruned.removed == Quantity(value=1 - 192 / 288, unit="fraction", basis="estimated")
    assert {one.group.rows for one in draft.decisions if one.group.role in ("gate", "up")} == {64}


@pytest.mark.parametrize(
    ("family", "target", "sizes", "widths", "carried", "zeros"),
    [
        ("llama", "gguf", "per-layer", (96, 32, 64), "written as 'deci'", False),
        ("llama", "gguf", "equal", (64, 64, 64), "all layers are 64 wide", False),
        ("qwen2", "gguf", "per-layer", (96, 32, 64), "zeros fill each up to 96", True),
        ("qwen2", "onnx", "per-layer", (96, 32, 64), "every layer of the graph has its own shapes", False),
    ],
)
def test_the_plan_says_how_the_files_hold_the_widths(
    tmp_path: Path, family: str, target: str, sizes: str, widths: tuple[int, ...], carried: str, zeros: bool
) -> None:
    text = PRUNED.replace('"prunenet"', f'"prune-closed-form"\nsizes = "{sizes}"')
    resolved, draft = drafted_with(tmp_path, text, family, target)
    pruned = pruning(resolved, draft.decisions)
    assert pruned is not None and pruned.widths == widths
    assert carried in pruned.carried
    assert (pruned.zero_bytes.value > 0) is zeros
    said = figures.pruned(pruned)
    assert said.startswith("33.3 % of the feed-forward channels (estimated), ") and ("of zeros" in said) is zeros


@pytest.mark.parametrize("method", ["prunenet", "prune-closed-form"])
def test_what_cannot_be_pruned_is_refused_at_plan_time(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = PRUNED.replace("prunenet", method)
    with pytest.raises(RequestError, match=r"rounds to none of a layer's channels; got 0.01 of 96.* smaller multiple"):
        drafted_with(tmp_path, text.replace("0.34", "0.01"))
    _, narrow = drafted_with(tmp_path / "again", text.replace("0.34", "0.34\nmultiple = 72"), type="Q8_0")
    assert {one.format.name for one in narrow.decisions if one.group.columns == 72} == {"F16"}
    assert all("falls back to F16" in one.reason for one in narrow.decisions if one.group.columns == 72)
    monkeypatch.setitem(families(), "LlamaForCausalLM", replace(families()["LlamaForCausalLM"], block=ungated))
    with pytest.raises(RequestError, match=r"the feed-forward part of a LlamaForCausalLM is not gated"):
        drafted_with(tmp_path / "third", text)


@pytest.mark.parametrize(
    ("options", "observing"),
    [("", True), ("draws = 0", False), ("published = true", False), ("draws = 0\nrepair = true", True)],
)
def test_prunenet_reads_text_where_something_is_chosen_or_fitted_by_it(
    tmp_path: Path, options: str, observing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    (step,) = load_recipe(str(recipe(tmp_path, PRUNED + "episodes = 1\n" + options))).rewriting
    observed = []

    def observe(model: Model) -> Statistics:
        observed.append(model)
        return collect(model, Windows.of(np.arange(96).reshape(2, 48) + 2, "file", 0), 0, lambda done, total: None)

    with open_model(str(tiny_model(tmp_path / "model"))) as model:
        assert step.work(model).observes is observing
        assert set(step.rewritten(model, observe, lambda done, total: None).decoder.intermediate) == {64}
        assert observed == ([model] if observing else [])


def test_more_pruning_needs_less_and_more_observing_more(tmp_path: Path) -> None:
    with open_model(str(tiny_model(tmp_path / "model", layers=3))) as model:
        plain, quarter, observed = (
            drafted(Job("model", "galaxy-s24-ultra", "gguf", recipe=name), model)
            for name in (None, str(recipe(tmp_path, PRUNED + "draws = 0")), "prune-closed-form")
        )
        needs = [needs_of(resolved, draft.decisions) for resolved, draft in (plain, quarter, observed)]
    assert needs[1].file < needs[0].file
    assert needs[1].cache == needs[0].cache < needs[2].cache


@pytest.mark.parametrize("recipe_name", [None, "caldera"])
def test_nothing_pruned_is_saved_without_pruning(tmp_path: Path, recipe_name: str | None) -> None:
    job = Job("model", "galaxy-s24-ultra", "gguf", recipe=recipe_name, save_pruned=tmp_path / "saved")
    with (
        open_model(str(tiny_model(tmp_path / "model"))) as model,
        pytest.raises(RequestError, match=r"--save-pruned: there is no pruned model to save; .* --recipe prunenet"),
    ):
        drafted(job, model)


SHIPPED = """
schema_version = 1
title = "Coarse and coded"

[[step]]
method = "coarse-int8"
bits = 4

[[step]]
method = "transport"
profile = "fast"
"""
TRANSPORT = SHIPPED[SHIPPED.index('[[step]]\nmethod = "transport') :]


def test_files_may_be_coded_last(tmp_path: Path) -> None:
    made = load_recipe(str(recipe(tmp_path, SHIPPED)))
    assert made.encoding is not None and (made.encoding.method, made.transport) == ("coarse-int8", "fast")
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
            SHIPPED,
            SHIPPED + "[[step]]\nmethod = 'caldera'\n",
            r"step 3: transport codes the finished model files, so nothing can follow it; got caldera after it; make",
        ),
        (
            SHIPPED,
            SHIPPED + TRANSPORT,
            r"step 3: transport codes the finished model files, so nothing can follow it; got transport",
        ),
        (
            SHIPPED,
            SHIPPED.replace("coarse", "entropy-constrained") + "[[step]]\nmethod = 'coarse-int8'\n",
            r"nothing can follow it; got coarse-int8",
        ),
        (
            '[[step]]\nmethod = "transport',
            "[[step]]\nmethod = 'entropy-constrained-int8'\n[[step]]\nmethod = \"transport",
            r"coarse-int8 gives",
        ),
    ],
)
def test_what_cannot_be_coded_is_one_sentence(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert SHIPPED.count(old) == 1
    with pytest.raises((InputError, RequestError), match=message):
        load_recipe(str(recipe(tmp_path, SHIPPED.replace(old, new))))


@pytest.mark.parametrize(("target", "format"), [("gguf", "Q8_0"), ("onnx", "int8-b32"), ("onnx-qdq", "int8-channel")])
@pytest.mark.parametrize(("name", "method"), [("double", "coarse-int8"), ("rate", "entropy-constrained-int8")])
def test_steps_for_coding_take_the_targets_eight_bits(
    tmp_path: Path, name: str, method: str, target: str, format: str
) -> None:
    with open_model(str(tiny_model(tmp_path / "model"))) as model:
        resolved, draft = drafted(Job("model", "galaxy-s24-ultra", target, recipe=name), model)
    assert {one.stored_as for one in draft.decisions} == {format}
    assert {one.method for one in draft.decisions} == {method}
    assert resolved.recipe.transport == "small"


def test_coding_is_requested_once(tmp_path: Path) -> None:
    with open_model(str(tiny_model(tmp_path / "model"))) as model:
        job = Job("model", "galaxy-s24-ultra", "gguf", recipe="double", transport="fast")
        with pytest.raises(RequestError, match=r"--transport and the recipe's step transport contradict each other"):
            drafted(job, model)
        resolved, _ = drafted(Job("model", "galaxy-s24-ultra", "gguf", type="Q8_0", transport="fast"), model)
    assert resolved.recipe.transport == "fast"


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
        drafted(job, model)
