"""Statistics against automatic differentiation of the whole model, and against the KL that they predict."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from exporter.calibrate.layer_stream import silent
from exporter.calibrate.statistics import Statistics, collect
from exporter.calibrate.windows import Windows
from exporter.foundation.errors import InputError, RequestError
from exporter.model.decoder import Decoder
from exporter.model.sources import open_model
from tests.damage import left_over
from tests.models import tiny_model

TOKENS = np.random.default_rng(1).integers(2, 200, (6, 40))
WINDOWS = Windows.of(TOKENS, "file", 0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    return tiny_model(tmp_path / "model", "qwen2", tied=False)


def draw(p: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Draw from each row's distribution: the first token whose cumulative probability passes its chance."""
    return (p.cumsum(-1) <= draws * p.sum(-1, keepdim=True)).sum(-1, keepdim=True)


class Whole:
    """Inputs, and gradients at the outputs, of all matrices of a whole model, float64 [windows, length, width].

    Those of the head are its outputs before they are capped.
    """

    def __init__(self, folder: Path, decoder: Decoder, tokens: np.ndarray, seed: int) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.inputs: dict[str, torch.Tensor] = {}
        outputs: dict[str, torch.Tensor] = {}

        def keep(name: str, given: torch.Tensor, output: torch.Tensor) -> None:
            output.retain_grad()
            self.inputs[name], outputs[name] = given.detach().double(), output

        def watch(name: str, module: nn.Module) -> None:
            module.register_forward_hook(lambda _, given, output: keep(name, given[0], output))

        for block in decoder.blocks:
            for role, linear in block.linears.items():
                watch(f"{block.layer}.{role}", model.model.layers[block.layer].get_submodule(linear.module))
        for table in decoder.tables:
            watch(table.role, model.get_submodule(table.name.removesuffix(".weight")))
        watch("head", model.lm_head)
        logits = model(torch.from_numpy(tokens)).logits
        # The same draws: window by window, from one generator.
        chance = torch.Generator().manual_seed(seed)
        self.p = logits.detach().softmax(-1)
        cap = decoder.logits_cap
        self.slope = torch.ones(()) if cap is None else 1 - (logits.detach() / cap).square()
        drawn = torch.stack([draw(window, torch.rand(len(window), 1, generator=chance)) for window in self.p])
        logits.log_softmax(-1).gather(-1, drawn).sum().backward()
        self.gradients = {name: output.grad.double() for name, output in outputs.items() if output.grad is not None}


def weighted(inputs: torch.Tensor, weights: torch.Tensor) -> np.ndarray:
    rows = inputs.flatten(0, 1)
    return ((rows * weights.flatten()[:, None]).T @ rows / weights.sum()).numpy()


def close(found: np.ndarray | None, expected: np.ndarray) -> None:
    assert found is not None
    np.testing.assert_allclose(found, expected, rtol=5e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize(("family", "layers"), [("qwen2", 2), ("gemma3_text", 2), ("gemma4_text", 5)])
def test_they_are_those_of_the_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, layers: int
) -> None:
    """Gemma scales its embeddings; in Gemma 4, layers share keys and values, and have inputs that are looked up."""
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    folder = tiny_model(tmp_path / "model", family, tied=False, layers=layers)
    with open_model(str(folder)) as model:
        decoder, found = model.decoder, collect(model, WINDOWS, 3, silent)
    whole = Whole(folder, decoder, TOKENS, 3)
    held = np.arange(6) % 4 == 3
    for block in decoder.blocks:
        layer = block.layer
        for role in block.linears:
            squares = whole.gradients[f"{layer}.{role}"].square()
            close(found.sensitivity(layer, role), squares.mean((0, 1)).numpy())
        for name, roles in {site.kind: [one.part for one in site.linears] for site in block.sites}.items():
            energies = [whole.gradients[f"{layer}.{role}"].square().sum(-1) for role in roles]
            weights = torch.stack([energy / energy.mean() for energy in energies]).mean(0)
            inputs = whole.inputs[f"{layer}.{roles[0]}"]
            site = found.site(f"layers.{layer}.{name}")
            assert site is not None
            close(site.second_moment, weighted(inputs, weights))
            close(site.fitted, weighted(inputs[~held], weights[~held]))
            close(site.held, weighted(inputs[held], weights[held]))
            np.testing.assert_array_equal(found.power(f"layers.{layer}.{name}"), site.second_moment.diagonal())
            assert site.share == pytest.approx(float(weights[held].sum() / weights.sum()), rel=1e-4)
            close(site.squares, inputs.square().mean((0, 1)).numpy())
            np.testing.assert_array_equal(found.importance(f"layers.{layer}.{name}"), site.squares)
            for width, peaks in site.peaks.items():
                largest = inputs.abs().unflatten(-1, (-1, width)).amax(-1).square()
                close(peaks, ((largest * weights[..., None]).sum((0, 1)) / weights.sum()).numpy())
    variance = (whole.p - whole.p * whole.p) * whole.slope**2
    close(found.sensitivity(None, "head"), variance.mean((0, 1)).numpy())
    site = found.site("head_in")
    assert site is not None
    close(site.second_moment, weighted(whole.inputs["head"], variance.sum(-1).double()))
    for table, scale in zip(decoder.tables, (decoder.embedding_scale, decoder.layer_input_width**0.5), strict=False):
        looked_up, columns = found.lookups(table.role)
        close(columns, scale**2 * whole.gradients[table.role].square().mean((0, 1)).numpy())
        close(looked_up, np.bincount(TOKENS.reshape(-1), minlength=320) / TOKENS.size)
    assert found.site("tokens") is None and found.importance("tokens") is None and found.power("tokens") is None


def test_without_windows_to_hold_back_all_are_fitted(folder: Path) -> None:
    with open_model(str(folder)) as model:
        site = collect(model, Windows.of(TOKENS[:3], "file", 0), 0, silent).site("layers.0.mlp_in")
    assert site is not None and site.share == 0
    np.testing.assert_array_equal(site.fitted, site.held)
    np.testing.assert_array_equal(site.fitted, site.second_moment)


@pytest.mark.parametrize(
    ("name", "role"),
    [("model.layers.0.mlp.up_proj", "up"), ("model.layers.1.self_attn.o_proj", "o"), ("lm_head", "head")],
)
def test_they_predict_the_divergence_that_a_small_change_causes(folder: Path, name: str, role: str) -> None:
    windows = Windows.of(np.random.default_rng(2).integers(2, 200, (24, 64)), "file", 0)
    with open_model(str(folder)) as model:
        found = collect(model, windows, 0, silent)
    layer = int(name.split(".")[2]) if "layers" in name else None
    site = found.site({"up": "layers.0.mlp_in", "o": "layers.1.attention_out", "head": "head_in"}[role])
    assert site is not None
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.from_numpy(windows.tokens)
    weight = whole.get_submodule(name).weight
    change = 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = whole(tokens).logits.double().log_softmax(-1)
        weight += change
        after = whole(tokens).logits.double().log_softmax(-1)
    measured = float((before.exp() * (before - after)).sum(-1).mean())
    error = np.einsum("ij,ij->i", change.numpy() @ site.second_moment, change.numpy())
    assert 0.5 * float(found.sensitivity(layer, role) @ error) == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    def stop(done: int, total: int) -> None:
        if done == stop_at:
            raise KeyboardInterrupt

    with open_model(str(folder)) as model:
        with pytest.raises(KeyboardInterrupt):
            collect(model, WINDOWS, 0, stop)
        seen: list[int] = []
        collect(model, WINDOWS, 0, lambda done, total: seen.append(done))
        assert seen == [done for done in range(5) if done >= stop_at]
        monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "straight"))
        collect(model, WINDOWS, 0, silent)
    resumed, straight = (sorted((tmp_path / name).rglob("*.np*")) for name in ("cache", "straight"))
    assert [path.name for path in resumed] == [path.name for path in straight]
    assert not any(path.name.startswith(("inputs", "gradient")) for path in straight)
    for one, other in zip(resumed, straight, strict=True):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("kept", range(5))
def test_a_run_killed_between_two_deletions_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    delete, deleted = Path.unlink, []

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if len(deleted) == kept:
            raise KeyboardInterrupt
        deleted.append(path)
        delete(path, missing_ok)

    with open_model(str(folder)) as model:
        with monkeypatch.context() as patched:
            patched.setattr(Path, "unlink", unlink)
            with pytest.raises(KeyboardInterrupt):
                collect(model, WINDOWS, 0, silent)
        found = collect(model, WINDOWS, 0, silent)
        monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(folder / "straight"))
        straight = collect(model, WINDOWS, 0, silent)
    for one, other in zip(found.lookups(), straight.lookups(), strict=True):
        np.testing.assert_array_equal(one, other)
    for layer in range(2):
        np.testing.assert_array_equal(found.sensitivity(layer, "down"), straight.sensitivity(layer, "down"))
    assert not left_over(found._folder)


@pytest.mark.parametrize("missing", ["layers.0.mlp_in.npy", "layers.1.gradients.npz", "head_out.range.npy"])
@pytest.mark.parametrize("stop_at", [3, None])
def test_where_a_file_is_missing_all_are_made_anew(folder: Path, missing: str, stop_at: int | None) -> None:
    def stop(done: int, total: int) -> None:
        if done == stop_at:
            raise KeyboardInterrupt

    with open_model(str(folder)) as model:
        whole = collect(model, WINDOWS, 0, silent)._folder
        content = {path.name: path.read_bytes() for path in whole.iterdir()}
        if stop_at is not None:
            for path in whole.iterdir():
                path.unlink()
            with pytest.raises(KeyboardInterrupt):
                collect(model, WINDOWS, 0, stop)
        (whole / missing).unlink(missing_ok=True)
        collect(model, WINDOWS, 0, silent)
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == content


@pytest.mark.parametrize(
    ("name", "where"), [("model.layers.1.mlp.down_proj.weight", "layer 1"), ("lm_head.weight", "head")]
)
def test_activations_that_overflow_name_the_layer(folder: Path, name: str, where: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name] *= 1e38
    save_file(tensors, path, metadata={"format": "pt"})
    with open_model(str(folder)) as model, pytest.raises(InputError, match=f"{where}: the activations are not finite"):
        collect(model, WINDOWS, 0, silent)


def test_a_disk_too_small_for_the_statistics_is_refused_before_they_begin(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.foundation.cache.shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    refused = pytest.raises(RequestError, match=r"not enough free disk space; got 1,000 bytes")
    with open_model(str(folder)) as model, refused:
        collect(model, WINDOWS, 0, silent)


def test_statistics_are_read_when_asked_for(tmp_path: Path) -> None:
    assert Statistics(tmp_path).site("layers.0.mlp_in") is None
