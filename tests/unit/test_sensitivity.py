"""Sensitivities against automatic differentiation of the whole model, and against the KL that they predict."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from exporter.calibrate.layers import silent
from exporter.calibrate.sensitivity import collect_sensitivities
from exporter.calibrate.statistics import collect
from exporter.calibrate.text import Windows
from exporter.model.sources import open_model
from tests.models import tiny_model

TOKENS = np.random.default_rng(1).integers(2, 200, (6, 40))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    return tiny_model(tmp_path / "model", "qwen2", tied=False)


def test_they_are_those_of_the_whole_model(folder: Path) -> None:
    with open_model(str(folder)) as model:
        found = collect_sensitivities(model, Windows.of(TOKENS, "file", 0), 3, silent)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = {"q": "self_attn.q_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj", "down": "mlp.down_proj"}
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str, output: torch.Tensor) -> None:
        output.retain_grad()
        outputs[name] = output

    for layer in range(2):
        for role, path in names.items():
            module = whole.model.layers[layer].get_submodule(path)
            module.register_forward_hook(lambda _, __, output, name=f"{layer}.{role}": keep(name, output))
    whole.model.embed_tokens.register_forward_hook(lambda _, __, output: keep("embedding", output))
    logits = whole(torch.from_numpy(TOKENS)).logits
    # The same draws: window by window, from one generator.
    chance = torch.Generator().manual_seed(3)
    p = logits.detach().softmax(-1)
    drawn = torch.stack([torch.multinomial(window, 1, generator=chance) for window in p])
    logits.log_softmax(-1).gather(-1, drawn).sum().backward()
    for layer in range(2):
        for role in names:
            gradient = outputs[f"{layer}.{role}"].grad
            assert gradient is not None
            np.testing.assert_allclose(found.rows(layer, role), gradient.pow(2).mean((0, 1)), rtol=2e-4)
    np.testing.assert_allclose(found.rows(None, "head"), (p - p * p).mean((0, 1)), rtol=1e-4)
    looked_up, embedding = found.lookups()
    gradient = outputs["embedding"].grad
    assert gradient is not None
    np.testing.assert_allclose(embedding, gradient.pow(2).mean((0, 1)), rtol=2e-4)
    np.testing.assert_allclose(looked_up, np.bincount(TOKENS.reshape(-1), minlength=320) / TOKENS.size, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "role"),
    [("model.layers.0.mlp.up_proj", "up"), ("model.layers.1.self_attn.o_proj", "o"), ("lm_head", "head")],
)
def test_they_predict_the_divergence_that_a_small_change_causes(folder: Path, name: str, role: str) -> None:
    windows = Windows.of(np.random.default_rng(2).integers(2, 200, (24, 64)), "file", 0)
    with open_model(str(folder)) as model:
        found = collect_sensitivities(model, windows, 0, silent)
        layer = int(name.split(".")[2]) if "layers" in name else None
        site = {"up": "layers.0.mlp_in", "o": "layers.1.attention_out", "head": "head_in"}[role]
        second_moment = collect(model, windows, silent).second_moment(site)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.from_numpy(windows.tokens)
    weight = whole.get_submodule(name).weight
    change = 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = whole(tokens).logits.double().log_softmax(-1)
        weight += change
        after = whole(tokens).logits.double().log_softmax(-1)
    measured = float((before.exp() * (before - after)).sum(-1).mean())
    error = np.einsum("ij,ij->i", change.numpy() @ second_moment, change.numpy())
    assert 0.5 * float(found.rows(layer, role) @ error) == pytest.approx(measured, rel=0.25)
