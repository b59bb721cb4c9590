"""Experts: statistics of the tokens that reach each, one type for those of a layer, error propagation around them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from exporter.calibrate.layer_stream import silent
from exporter.calibrate.statistics import Statistics, collect
from exporter.calibrate.windows import Windows
from exporter.child.process import Child
from exporter.compress.compression import Compression
from exporter.device.profile import load_device
from exporter.foundation.errors import ExporterError, InputError, RequestError
from exporter.model.gguf_names import gguf_matrices
from exporter.model.model import Model
from exporter.model.sources import open_model
from exporter.planning.budget import cpu_as_predicted
from exporter.prove.accuracy import Reference, distance
from exporter.targets.contract import budgeted, load_target, lower
from exporter.targets.gguf.quantise import quantise
from exporter.targets.opened import OpenedArtifact
from tests.models import tensor_digests, tiny_model

EXPERTS, USED, HIDDEN = 6, 2, 64
TOKENS = np.random.default_rng(1).integers(2, 300, (8, 64))
WINDOWS = Windows.of(TOKENS, "file", 0)
CHANGES = {"num_experts": EXPERTS, "num_experts_per_tok": USED, "moe_intermediate_size": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("experts") / "model", "qwen3_moe", tied=False, changes=CHANGES)


@pytest.fixture
def model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    with open_model(str(folder)) as opened:
        yield opened


class Whole:
    """What the experts of a layer of transformers' own model are given, and the gradients at their outputs."""

    def __init__(self, folder: Path, layer: int) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
        part = model.model.layers[layer].mlp
        seen: dict[str, Any] = {}
        part.gate.register_forward_hook(lambda _, __, made: seen.update(weights=made[1], chosen=made[2]))

        def keep(_: object, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            output.retain_grad()
            seen.update(inputs=given[0].detach(), output=output)

        part.experts.register_forward_hook(keep)
        logits = model(torch.from_numpy(TOKENS)).logits
        chance = torch.Generator().manual_seed(3)
        p = logits.detach().softmax(-1)
        draws = [torch.rand(TOKENS.shape[1], 1, generator=chance) for _ in TOKENS]
        drawn = torch.stack(
            [(q.cumsum(-1) <= d * q.sum(-1, keepdim=True)).sum(-1, keepdim=True) for q, d in zip(p, draws, strict=True)]
        )
        logits.log_softmax(-1).gather(-1, drawn).sum().backward()
        self.inputs, self.gradient = seen["inputs"].double(), seen["output"].grad.double()
        self.chosen, self.weights = seen["chosen"], seen["weights"].detach().double()

    def tokens_of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the numbers of the tokens that reach an expert, and their weights there."""
        tokens, places = (self.chosen == expert).nonzero(as_tuple=True)
        return tokens, self.weights[tokens, places]


@pytest.mark.usefixtures("float32_products")
def test_statistics_are_those_of_the_tokens_that_reach_an_expert(model: Model) -> None:
    found = collect(model, WINDOWS, 3, silent)
    whole = Whole(model.folder, 1)
    seen = 0
    for expert in range(EXPERTS):
        tokens, weights = whole.tokens_of(expert)
        seen += len(tokens)
        gradients = whole.gradient[tokens] * weights[:, None]
        np.testing.assert_allclose(
            found.sensitivity(1, f"expert_down.{expert}"), gradients.square().sum(0) / TOKENS.size, rtol=1e-3, atol=1e-9
        )
        site = found.site(f"layers.1.{expert}.expert_in")
        assert site is not None
        if len(tokens) >= HIDDEN:
            np.testing.assert_allclose(site.squares, whole.inputs[tokens].square().mean(0), rtol=1e-4)
    assert seen == USED * TOKENS.size


@pytest.mark.usefixtures("float32_products")
def test_rare_experts_take_the_inputs_of_all(model: Model) -> None:
    few = Windows.of(TOKENS[:2, :40], "file", 0)
    found = collect(model, few, 3, silent)
    squares = [found.importance(f"layers.1.{expert}.expert_in") for expert in range(EXPERTS)]
    # Eighty tokens, two experts each: none is reached by as many as an input has channels.
    assert all(one is not None and np.array_equal(one, squares[0]) for one in squares)
    moment = found.site("layers.1.0.expert_in")
    every = found.site("layers.1.mlp_in")
    assert moment is not None and every is not None
    # Each token counts as often as it is computed, here twice.
    np.testing.assert_allclose(moment.squares, every.squares, rtol=1e-4)


@pytest.mark.parametrize("mix", ["Q4_K_M", "IQ4_XS", "Q2_K"])
def test_named_mixes_are_those_of_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mix: str) -> None:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    folder = tiny_model(
        tmp_path / "model", "qwen3_moe", hidden=256, layers=3, changes=CHANGES | {"moe_intermediate_size": 256}
    )
    target = load_target("gguf")
    with open_model(str(folder)) as model:
        statistics = collect(model, WINDOWS, 0, silent)
        (tmp_path / "ours").mkdir()
        compressed = Compression(model, target.decide(model, mix, "rtn"), statistics)
        ours = lower(target, compressed, mix, tmp_path / "ours").artifact.weights[0]
        (tmp_path / "float").mkdir()
        floats = target.write_float(model, tmp_path / "float")
        importance = {
            name: np.concatenate([importance_of(statistics, group.site) for group in groups])
            for name, groups in gguf_matrices(model.decoder).items()
            if groups[0].expert is not None or len(groups) == 1
        }
    stock = tmp_path / "stock.gguf"
    with Child("llama.cpp", 1 << 30) as child:
        assert child.run(quantise, 120, floats.weights[0], stock, mix, importance) == (0, "")
    assert tensor_digests(ours) == tensor_digests(stock)


def importance_of(statistics: Statistics, site: str) -> np.ndarray:
    found = statistics.importance(site)
    assert found is not None
    return found


def test_fitted_codes_lose_less_than_the_nearest(model: Model, tmp_path: Path) -> None:
    target = load_target("gguf")
    statistics = collect(model, WINDOWS, 0, silent)
    reference = Reference.of(model, TOKENS[:4])
    losses = {}
    for name, method, tokens in (("nearest", "rtn", None), ("fitted", "ldlq", None), ("corrected", "ldlq", TOKENS)):
        (tmp_path / name).mkdir()
        decisions = target.decide(model, "Q4_0", method)
        compression = Compression(model, decisions, statistics, propagation_text=tokens)
        artifact = lower(target, compression, "Q4_0", tmp_path / name).artifact
        read = target.read_back(artifact, model)
        for group in model.groups():
            if group.exact:
                np.testing.assert_array_equal(read(group), model.read(group.name))
        with OpenedArtifact(artifact, TOKENS.shape[1], 1, exact=True) as opened:
            losses[name] = distance(reference, opened.logits).kl_mean
    assert losses["corrected"] < losses["fitted"] < losses["nearest"]


def test_experts_of_a_layer_share_a_type_and_count_by_their_share(model: Model) -> None:
    target = budgeted(load_target("gguf"))
    storages = target.storages(model)
    kinds = [{group.role for group in storage.groups} for storage in storages if storage.groups[0].layer == 0]
    assert kinds == [{"q"}, {"k"}, {"v"}, {"o"}, {"router"}, {"expert_gate"}, {"expert_up"}, {"expert_down"}]
    assert [format.name for storage in storages if storage.groups[0].exact for format in storage.formats] == ["F32"] * 2
    of_experts = sum(group.size for group in model.groups() if group.expert is not None)
    active = model.decoder.active_parameters
    assert active == model.decoder.parameters - round(of_experts * (1 - USED / EXPERTS))
    assert cpu_as_predicted(target, model, storages, load_device("raspberry-pi-5")).decode_factor > 0


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"mlp_only_layers": [0]}, InputError, "some layers have no experts, which no target carries"),
        ({"decoder_sparse_step": 2}, InputError, "decoder_sparse_step 2, expected experts in every layer"),
        ({"num_experts_per_tok": 9}, InputError, "no usable 'num_experts_per_tok'; got 9, expected a whole number"),
        ({"norm_topk_prob": False}, RequestError, "has another value built in; got False, expected True; no target"),
    ],
)
def test_what_is_not_carried_is_refused(
    tmp_path: Path, changes: dict[str, Any], kind: type[ExporterError], message: str
) -> None:
    folder = tiny_model(tmp_path / "model", "qwen3_moe", changes=CHANGES | changes)
    with pytest.raises(kind) as refused, open_model(str(folder)) as model:
        load_target("gguf").decide(model, "F32", "rtn")
    assert message in str(refused.value)
