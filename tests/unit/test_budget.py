"""Builds under a budget of bytes: kept, spent, and refused where nothing is so small."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path

import numpy as np
import pytest

from exporter import pipeline
from exporter.calibrate.evaluation_statistics import EvaluationStatistics
from exporter.calibrate.layer_stream import silent
from exporter.calibrate.statistics import collect
from exporter.calibrate.windows import Windows
from exporter.compress.allocate import Choice, Limits, Storage, with_predicted_kl
from exporter.compress.awq_scaling import Rewritten
from exporter.compress.effort import EFFORTS
from exporter.device.profile import load_device
from exporter.formats.format import WeightFormat
from exporter.formats.group import Decision
from exporter.foundation.errors import RequestError
from exporter.model.sources import open_model
from exporter.planning.budget import Budget, cost_of_speed, cpu_as_predicted
from exporter.planning.expected import format_of
from exporter.planning.job import Job
from exporter.planning.outline import needs_of
from exporter.planning.step import Draft
from exporter.predict.rates import rates
from exporter.predict.request import LEAST_BYTES, LEAST_PARAMETERS, Request, checked_request
from exporter.predict.roofline import Cpu
from exporter.predict.workload import format_family
from exporter.prove.prompt import DECODE_TOKENS, prompt_for
from exporter.targets.contract import Budgeted, budgeted, load_target
from exporter.targets.gguf.formats.ggml import ggml_format
from tests.models import FAMILIES, tiny_model

pytestmark = pytest.mark.slow

WORDS = "the capital of France is Paris, numbers 12 345 and hello world. " * 400


def budget_of(draft: Draft) -> Budget:
    budget = vars(draft)["budget"]
    assert isinstance(budget, Budget)
    return budget


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Job]:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(WORDS)

    def make(family: str = "llama", tied: bool = True, **changes: object) -> Job:
        folder = tmp_path / f"{family}-{tied}"
        if not folder.is_dir():
            tiny_model(folder, family, tied=tied, hidden=128, intermediate=256)
        text = tmp_path / "text.txt"
        return Job(
            str(folder), "raspberry-pi-5", output=tmp_path / "bundle", calibration=text, evaluation=text, context=128,
            window=64, **changes,
        )  # fmt: skip

    return make


@pytest.mark.parametrize("target", ["gguf", "onnx"])
@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False)])
# By default some bytes may be left over, so that the model is not slower than what the stock tool makes.
@pytest.mark.parametrize(
    ("prefer", "spent", "named"), [("balanced", 0.85, ""), ("accuracy", 0.9, ", accuracy preferred")]
)
def test_a_budget_is_kept_and_spent(
    job: Callable[..., Job], family: str, tied: bool, target: str, prefer: str, spent: float, named: str
) -> None:
    with open_model(job(family, tied).source) as model:
        made = load_target(target)
        fixed = made.fixed_bytes(model)
        most = fixed + int(0.75 * model.decoder.parameters)
    bundle = pipeline.build(job(family, tied, target=target, max_file_bytes=most, prefer=prefer))
    size = bundle.report.size.file_bytes.value
    matrices = sum(row.stored_bytes for row in bundle.report.tensors)
    assert size <= most
    assert matrices <= size <= matrices + fixed
    # No matrix of this model is so large that a step of its format is more than a tenth of the budget.
    assert matrices > spent * (most - fixed)
    assert len({row.format for row in bundle.report.tensors}) > 1
    assert all((row.calibration_kl or 0) > 0 and (row.evaluation_kl or 0) > 0 for row in bundle.report.tensors)
    assert bundle.report.recipe.scheme == f"at most {most:,} bytes{named}"
    # What a measurement is written down as must be a format that a prediction knows.
    assert format_family(
        format_of(bundle.report.recipe.scheme, ((r.format, r.stored_bytes) for r in bundle.report.tensors))
    )


def test_more_bits_predict_less_loss_and_count_the_whole_file(job: Callable[..., Job], tmp_path: Path) -> None:
    predicted = []
    for index, bits in enumerate((14.0, 16.0, 18.0)):
        made = pipeline.build(Job(**{**vars(job(target="gguf", bits=bits)), "output": tmp_path / str(index)}))
        assert made.report.size.bits_per_weight.value <= bits
        predicted.append(sum(row.calibration_kl or 0.0 for row in made.report.tensors))
    assert predicted == sorted(predicted, reverse=True)


def test_a_budget_that_nothing_fits_names_one_that_does(job: Callable[..., Job]) -> None:
    for start in (pipeline.build, pipeline.plan):
        with pytest.raises(
            RequestError, match=r"no choice of formats keeps the limits.* got at most 20,000 bytes"
        ) as refused:
            start(job(target="gguf", max_file_bytes=20_000))
    least = int(re.search(r"expected at most ([\d,]+) bytes", str(refused.value)).group(1).replace(",", ""))  # type: ignore[union-attr]
    bundle = pipeline.build(job(target="gguf", max_file_bytes=least))
    assert bundle.report.size.file_bytes.value <= least


def test_a_budget_and_a_type_contradict_each_other(job: Callable[..., Job]) -> None:
    for changes in (
        {"type": "Q4_0", "bits": 4.0}, {"max_file_bytes": 1, "bits": 4.0}, {"type": "Q4_0", "prefer": "speed"},
        {"type": "Q4_0", "min_decode_tokens_per_s": 1.0},
    ):  # fmt: skip
        with pytest.raises(RequestError, match=r"--\S+ and --.+ contradict each other"):
            pipeline.build(job(target="gguf", **changes))


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_limits_of_time_are_kept_with_those_of_bytes_and_refused_where_they_cannot_be(
    job: Callable[..., Job], target: str
) -> None:
    with open_model(job().source) as model:
        most = load_target(target).fixed_bytes(model) + int(0.9 * model.decoder.parameters)
        resolved, draft = pipeline.drafted(job(target=target, max_file_bytes=most), model)
        budget = budget_of(draft)
        free = [budget.timed(Storage.of(d), Choice(d.format, 0, 0.0)) for d in draft.decisions]
        rate = 1.3 / sum(choice.decode_s for choice in free)
        limited, quick = pipeline.drafted(job(target=target, max_file_bytes=most, min_decode_tokens_per_s=rate), model)
        assert needs_of(limited, quick.decisions).file < needs_of(resolved, draft.decisions).file
        timed = [budget.timed(Storage.of(d), Choice(d.format, 0, 0.0)) for d in quick.decisions]
        assert sum(choice.decode_s for choice in timed) <= 1 / rate
        assert re.fullmatch(r"at most [\d,]+ bytes, at least [\d,.]+ tokens/s decoded \(estimated\)", quick.scheme)
        with pytest.raises(RequestError, match=r"got at most .*, expected at least \S+ tokens/s decoded") as refused:
            pipeline.drafted(job(target=target, max_file_bytes=most, min_decode_tokens_per_s=1e9), model)
        named = float(re.search(r"expected at least (\S+) tokens/s", str(refused.value)).group(1).replace(",", ""))  # type: ignore[union-attr]
        pipeline.drafted(job(target=target, max_file_bytes=most, min_decode_tokens_per_s=0.999 * named), model)


def test_what_the_speed_costs_is_said_where_it_is_much() -> None:
    """Of three choices for one matrix the finest is slow; the limits of bytes and of the stock tool's speed differ."""
    slow, quick, quickest = (
        Choice(ggml_format(name), bytes, kl, decode_s, prefill_s)
        for name, bytes, kl, decode_s, prefill_s in (
            ("Q6_K", 9, 0.02, 4.0, 10.0), ("Q4_0", 7, 0.05, 3.0, 8.0), ("Q3_K", 6, 0.06, 2.0, 5.0),
        )
    )  # fmt: skip

    def said(best: Choice, others: list[Choice], prefer: str = "balanced", most: int = 10) -> tuple[str, ...]:
        budget = Budget(Limits(bytes=most), 0, [], prefer, load_target("gguf"), Cpu(1e9, 1e9), [])
        return cost_of_speed(budget, [[*others, best]], [best])

    (remark,) = said(quick, [slow, quickest])
    assert "--prefer accuracy is expected to lose 0.02 nats instead of 0.05, on the calibration text" in remark
    assert "0.80 times the speed in prompts and 0.75 times in answers" in remark
    assert not said(quick, [slow, quickest], most=8)
    assert not said(slow, [quick, quickest])
    assert not said(quick, [slow, quickest], prefer="accuracy")
    assert not said(quick, [slow, quickest], prefer="speed")
    # Little is not worth a remark.
    assert not said(quick, [replace(slow, kl=0.047)])


def test_speed_is_preferred_where_it_is_asked_for(job: Callable[..., Job]) -> None:
    with open_model(job().source) as model:
        most = load_target("gguf").fixed_bytes(model) + int(0.8 * model.decoder.parameters)
        seconds = {}
        for prefer in ("balanced", "accuracy", "speed"):
            _, draft = pipeline.drafted(job(target="gguf", max_file_bytes=most, prefer=prefer), model)
            budget = budget_of(draft)
            timed = [budget.timed(Storage.of(d), Choice(d.format, 0, 0.0)) for d in draft.decisions]
            seconds[prefer] = sum(512 * choice.prefill_s + 128 * choice.decode_s for choice in timed)
            if prefer == "balanced":
                assert sum(choice.decode_s for choice in timed) <= budget.no_slower_than_stock.decode_s < inf
                assert sum(choice.prefill_s for choice in timed) <= budget.no_slower_than_stock.prefill_s < inf
        assert seconds["speed"] < min(seconds["accuracy"], seconds["balanced"])
        # Without a budget, the file may be as large as that of the default type.
        assert pipeline.drafted(job(target="gguf", prefer="speed"), model)[1].most_file_bytes < inf
    with pytest.raises(RequestError, match=r"unknown preference 'sped'; .*'speed'"):
        pipeline.plan(job(prefer="sped"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_is_in_one_storage(job: Callable[..., Job], family: str) -> None:
    with open_model(job(family, tied=False).source) as model:
        for target in ("gguf", "onnx"):
            storages = load_target(target).storages(model)
            names = [group.name for storage in storages for group in storage.groups]
            assert sorted(names) == sorted(group.name for group in model.groups())
            assert all(storage.formats for storage in storages)


def test_more_effort_calibrates_on_more_text_and_is_stated(job: Callable[..., Job], tmp_path: Path) -> None:
    tokens = {}
    for effort in ("fast", "balanced"):
        made = pipeline.build(Job(**{**vars(job(target="gguf", effort=effort)), "output": tmp_path / effort}))
        assert made.report.recipe.effort == effort
        assert made.report.accuracy.predicted_kl.basis == "estimated"
        tokens[effort] = made.report.recipe.calibration.tokens
    assert tokens == {name: 64 * EFFORTS[name].calibration_windows for name in tokens}
    assert tokens["fast"] < tokens["balanced"]


def test_an_unknown_effort_is_refused_before_any_work(job: Callable[..., Job]) -> None:
    for start in (pipeline.build, pipeline.plan):
        with pytest.raises(RequestError, match=r"unknown effort 'bold'; .*balanced"):
            start(job(effort="bold"))


def test_each_matrix_is_predicted_by_its_own_method_on_both_texts(job: Callable[..., Job]) -> None:
    target, effort = load_target("gguf"), EFFORTS["balanced"]
    tokens = np.random.default_rng(0).integers(2, 200, (8, 48))
    with open_model(job().source) as model:
        one, other = (collect(model, Windows.of(some, "file", 0), 0, silent) for some in (tokens[:4], tokens[4:]))
        given, on_other = Rewritten(model, one), EvaluationStatistics(one, other)

        def predicted(decisions: list[Decision]) -> list[tuple[float | None, float | None]]:
            made = with_predicted_kl(decisions, given, on_other, effort, {}, silent)
            return [(decision.calibration_kl, decision.predicted_kl) for decision in made]

        decided = {method: target.decide(model, "Q4_0", method) for method in ("rtn", "ldlq")}
        mixed = [decided["rtn" if at % 2 else "ldlq"][at] for at in range(len(decided["rtn"]))]
        rtn, ldlq, both = (predicted(some) for some in (decided["rtn"], decided["ldlq"], mixed))
    assert both == [(rtn if at % 2 else ldlq)[at] for at in range(len(rtn))]
    assert rtn[1] != ldlq[1]
    # The texts differ, so what the same error costs does.
    assert all(first != second for first, second in ldlq)


@pytest.mark.parametrize("context", [64, 128, 4096])
def test_a_prompt_fills_the_context_whatever_the_text(context: int) -> None:
    tokens = np.arange(2 * 48).reshape(2, 48)
    prompt = prompt_for(tokens, context)
    assert len(prompt) == context - DECODE_TOKENS - 1
    assert prompt == [at % 96 for at in range(len(prompt))]


def decode_of(target: Budgeted, storage: Storage, format: WeightFormat) -> float:
    return target.throughput(storage.groups[0], format).decode


@pytest.mark.parametrize("device", ["raspberry-pi-5", "galaxy-s24-ultra", "core-ultra-200v", "macbook-air-m1"])
@pytest.mark.parametrize("target", ["gguf", "onnx", "onnx-qdq"])
def test_budgets_and_predictions_state_one_speed(job: Callable[..., Job], target: str, device: str) -> None:
    """Of a model in one format."""
    profile = load_device(device)
    made = budgeted(load_target(target).on(profile))
    with open_model(job().source) as model:
        storages = made.storages(model)
        cpu = cpu_as_predicted(made, model, storages, profile)
        chosen = []
        for one in storages:
            # Of the formats of 4.5 bits the quickest; the target with static activations has one of 8 bits.
            alike = [format for format in one.formats if format.stored_bytes(1, 256) == 144] or one.formats
            chosen.append((one, max(alike, key=partial(decode_of, made, one))))
        budget = Budget(Limits(), 0, storages, "accuracy", made, cpu, [])
        timed = [budget.timed(one, Choice(format, 0, 0.0)) for one, format in chosen]
        sizes = [(group, format) for one, format in chosen for group in one.groups if group.site != "tokens"]
    (name, _) = Counter(format.name for _, format in sizes).most_common(1)[0]
    read = sum(format.stored_bytes(group.rows, group.columns) for group, format in sizes)
    # The same model, so many times as large that there are predictions for it.
    scale = max(1.0, LEAST_PARAMETERS / model.decoder.parameters, LEAST_BYTES / read)
    request = Request(int(scale * read) + 1, int(scale * model.decoder.parameters) + 1, name, "cpu")
    predicted = rates(profile, checked_request(request, profile))
    assert scale * sum(one.decode_s for one in timed) == pytest.approx(1 / predicted.decode.value, rel=1e-3)
    assert scale * sum(one.prefill_s for one in timed) == pytest.approx(1 / predicted.prefill.value, rel=1e-3)
