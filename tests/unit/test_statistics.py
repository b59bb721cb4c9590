"""Second moments against hooks on the whole model; interrupted runs go on where they were."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from exporter.calibrate.statistics import collect
from exporter.calibrate.text import Windows
from exporter.errors import InputError
from exporter.model.sources import open_model
from tests.models import tiny_model

TOKENS = np.random.default_rng(1).integers(2, 200, (3, 40))
WINDOWS = Windows.of(TOKENS, "file", 0)
SITES = {"attention_in": "self_attn.q_proj", "attention_out": "self_attn.o_proj", "mlp_in": "mlp.up_proj"}


def ignore(done: int, total: int) -> None:
    """Show no progress."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    return tiny_model(tmp_path / "model", "qwen3")


def test_moments_are_those_of_the_whole_model(folder: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: dict[str, torch.Tensor] = {}
    for layer in range(2):
        for site, path in (SITES | {"mlp_out": "mlp.down_proj"}).items():
            module = whole.model.layers[layer].get_submodule(path)
            module.register_forward_pre_hook(
                lambda _, inputs, key=f"layers.{layer}.{site}": seen.update({key: inputs[0].double()})
            )
    whole.lm_head.register_forward_pre_hook(lambda _, inputs: seen.update({"head_in": inputs[0].double()}))
    with torch.inference_mode():
        whole(torch.from_numpy(TOKENS))
    with open_model(str(folder)) as model:
        statistics = collect(model, WINDOWS, ignore)
    assert len(seen) == 9
    for site, inputs in seen.items():
        rows = inputs.reshape(-1, inputs.shape[-1]).numpy()
        expected = rows.T @ rows / len(rows)
        np.testing.assert_allclose(statistics.second_moment(site), expected, rtol=1e-4, atol=1e-5 * expected.max())
        np.testing.assert_array_equal(statistics.importance(site), statistics.second_moment(site).diagonal())
    assert statistics.second_moment("tokens") is None


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with open_model(str(folder)) as model:
        with pytest.raises(KeyboardInterrupt):
            collect(model, WINDOWS, stop)
        seen: list[int] = []
        collect(model, WINDOWS, lambda done, total: seen.append(done))
        assert seen[0] == 1
        monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "straight"))
        collect(model, WINDOWS, ignore)
    resumed, straight = (sorted((tmp_path / name).rglob("*.npy")) for name in ("cache", "straight"))
    assert [path.name for path in resumed] == [path.name for path in straight]
    for one, other in zip(resumed, straight, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_activations_that_overflow_name_the_layer(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e38
    save_file(tensors, path, metadata={"format": "pt"})
    with open_model(str(folder)) as model, pytest.raises(InputError, match="layer 1: the activations are not finite"):
        collect(model, WINDOWS, ignore)
