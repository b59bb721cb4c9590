"""What every target, step, recipe, method and family must be: a new one is tested at once."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from exporter.calibrate.layer_stream import silent
from exporter.calibrate.statistics import collect
from exporter.calibrate.windows import Windows
from exporter.compress.effort import EFFORTS
from exporter.compress.method import AS_STORED, load_method, method_kind, method_names
from exporter.device.profile import load_device
from exporter.foundation.errors import ExporterError
from exporter.foundation.registry import load
from exporter.model.family import families
from exporter.model.model import Model
from exporter.model.sources import open_model
from exporter.planning.job import Job
from exporter.planning.recipe import STEPS, Recipe, load_recipe, recipe_names, step_names, step_of
from exporter.planning.resolve import recipe_for, resolve
from exporter.planning.step import EncodingStep, EncodingTask, RewritingStep
from exporter.steps.transport import Transport
from exporter.targets.artifact import target_names
from exporter.targets.backends import BackendFormats
from exporter.targets.contract import Budgeted, FormatsByBits, Target, load_target
from exporter.targets.facts import facts_of, libraries, settings_files
from tests.models import FAMILIES as TINY
from tests.models import tiny_model

DEVICE = "raspberry-pi-5"
# The least options of the steps that need some.
NEEDED = {"named-type": {}, "allocate": {"bits": 6.0}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    folder = tiny_model(tmp_path_factory.mktemp("contract") / "model", hidden=256, intermediate=512, layers=3)
    with open_model(str(folder)) as opened:
        yield opened


@pytest.fixture
def drafted(model: Model) -> Callable[..., list[str]]:
    """Return a function that gives the formats that a job is drafted with."""

    def draft(**options: object) -> list[str]:
        resolved = resolve(Job("model", DEVICE, context=64, **options), model)  # type: ignore[arg-type]
        decisions = resolved.draft().decisions
        assert [one.group for one in decisions] == list(resolved.model.groups())
        return [one.stored_as for one in decisions]

    return draft


def fixed_bytes(target: Target, model: Model) -> int:
    return target.fixed_bytes(model) if isinstance(target, Budgeted) else 0


@pytest.mark.parametrize("name", target_names())
def test_a_target_with_budgets(name: str, model: Model) -> None:
    target = load_target(name)
    if isinstance(target, Budgeted):
        assert 0 <= target.decode_margin < 1
        names = sorted(group.name for storage in target.storages(model) for group in storage.groups)
        assert names == sorted(group.name for group in model.groups())


def sentence(error: ExporterError) -> bool:
    text = str(error)
    return 1 < len(text) < 600 and text.isprintable() and text.endswith(".") and error.exit_code in (2, 3)


@pytest.mark.parametrize("name", target_names())
def test_a_target(name: str, model: Model, drafted: Callable[..., list[str]]) -> None:
    target = load_target(name)
    assert isinstance(target, Target)
    assert target.name == name
    assert target.default_type in target.types()
    assert target.default_method in method_names()
    assert 0 < target.most_rounding_kl < 1
    own = {target.default_type} | ({target.type_of_8_bits} if isinstance(target, FormatsByBits) else set())
    for device in (DEVICE, "core-ultra-200v"):
        made = target.on(load_device(device))
        # Named mixes, which come first, are asked of the runtime's own tool, which takes seconds for each.
        # A source of floats has no types of its own.
        for type in {*own, *made.types()[-8:]} - {AS_STORED}:
            decisions = made.decide(model, type, target.default_method)
            size = made.estimated_file_bytes(model, decisions)
            stored = sum(one.stored_bytes for one in decisions)
            # All else in the files is no more than is said of it; alignment is within that.
            assert stored <= size <= stored + 1.1 * fixed_bytes(target, model) + 4096, type
            assert made.estimated_peak(model, decisions, 128).bytes > size
    with pytest.raises(ExporterError) as refused:
        drafted(target=name, type="no such type")
    assert (sentence(refused.value) and "did you mean" in str(refused.value)) or "known" in str(refused.value)


@pytest.mark.parametrize("name", step_names())
def test_a_step(name: str, model: Model) -> None:
    kind = load(f"{STEPS}.{{}}", name, step_names(), "step").STEP
    assert get_args(kind.model_fields["method"].annotation) == (name,)
    assert issubclass(kind, RewritingStep | EncodingStep | Transport)
    options = [field for field in kind.model_fields if field != "method"]
    # Every option but those that are inherited stands in the docstring.
    documented = "".join(str(parent.__doc__) for parent in kind.__mro__)
    assert [option for option in options if f" {option}: " not in documented] == []
    step = step_of({"method": name} | NEEDED.get(name, {}), "test")
    stated = step.model_dump(mode="json")
    assert stated.keys() == kind.model_fields.keys()
    assert step_of(stated, "test") == step
    with pytest.raises(ExporterError) as refused:
        step_of({"method": name, "no_such_option": 1}, "test")
    assert sentence(refused.value)
    if isinstance(step, RewritingStep):
        assert step.outlined(model).decoder.parameters < model.decoder.parameters
        assert step.work(model).operations > 0
    if isinstance(step, EncodingStep):
        for target_name in target_names():
            target = load_target(target_name)
            task = EncodingTask(model, model, load_device(DEVICE), target, BackendFormats("cpu", None), EFFORTS["fast"])
            try:
                draft = step.resolved(target).draft(task)
            except ExporterError as error:
                assert sentence(error), error
                continue
            assert [one.group for one in draft.decisions] == list(model.groups())
            assert all(one.method in method_names() and one.reason for one in draft.decisions)
            assert draft == step.resolved(target).draft(task)


@pytest.mark.parametrize("target", target_names())
@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe(name: str, target: str, drafted: Callable[..., list[str]]) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.title
    resolved = recipe_for(Job("model", DEVICE, recipe=name), load_target(target))
    assert Recipe.of(resolved.document) == resolved
    try:
        assert drafted(recipe=name, target=target)
    except ExporterError as error:
        assert sentence(error), error


@pytest.mark.parametrize("name", [name for name in method_names() if not method_kind(name).keeps_codes])
def test_a_method(name: str, model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path))
    tokens = np.random.default_rng(0).integers(2, 200, (4, 32))
    statistics = collect(model, Windows.of(tokens, "file", 0), 0, silent)
    group = next(iter(group for group in model.groups() if group.role == "down"))
    weight, site = model.read(group.name), statistics.site(group.site)
    for level in EFFORTS.values():
        method = load_method(name, level)
        assert method.name == name
        assert not method.supports_error_propagation or method.error_feedback
        for target_name in target_names():
            target = load_target(target_name)
            if not isinstance(target, FormatsByBits):
                continue
            (format,) = {one.format for one in target.decide(model, target.type_of_8_bits, name) if one.group == group}
            method.require(format)
            before = weight.copy()
            made = method.encode(weight, format, site)
            np.testing.assert_array_equal(weight, before)
            # Three coded bits keep most of a matrix; what is planned is what the bytes decode to.
            assert np.square(made.planned - weight).sum() < 0.05 * np.square(weight).sum(), (name, target_name)
            np.testing.assert_array_equal(format.decode_rows(made.data, group.columns), made.planned)


@pytest.mark.parametrize("target", target_names())
@pytest.mark.parametrize("family", TINY)
def test_a_family(family: str, target: str, tmp_path: Path) -> None:
    with open_model(str(tiny_model(tmp_path / "model", family))) as opened:
        assert opened.decoder.family is families()[opened.decoder.family.architecture]
        resolved = resolve(Job("model", DEVICE, target, context=64), opened)
        decisions = resolved.draft().decisions
        assert sum(one.group.size for one in decisions) > 0.9 * opened.decoder.parameters
    assert {families()[name].architecture for name in families()} == set(families())


@pytest.mark.parametrize("name", target_names())
def test_a_targets_facts(name: str) -> None:
    facts = facts_of(name)
    assert facts.runtime == load("exporter.targets.{}.text", name, target_names(), "target").TEXT.title
    assert set(facts.runtime_libraries) | set(facts.text_libraries) <= set(facts.libraries)
    assert set(facts.libraries) <= set(libraries()) and set(facts.settings) <= settings_files()
