"""Ranges of activations against hooks on the whole model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from exporter.calibrate.ranges import ChannelRanges
from exporter.calibrate.statistics import collect
from exporter.calibrate.windows import Windows
from exporter.model.sources import open_model
from tests.llama_names import LINEARS
from tests.models import tiny_model

TOKENS = np.random.default_rng(1).integers(2, 200, (3, 40))
WINDOWS = Windows.of(TOKENS, "file", 0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    return tiny_model(tmp_path / "model", "qwen2", tied=False)


@pytest.mark.usefixtures("float32_products")
def test_ranges_are_those_of_the_whole_model(folder: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: dict[str, torch.Tensor] = {}
    linears = {f"layers.1.{role}_out": f"model.layers.1.{path}" for role, (path, _) in LINEARS.items()}
    for place, path in (linears | {"head_out": "lm_head"}).items():
        module = whole.get_submodule(path)
        module.register_forward_pre_hook(lambda _, x, key=f"{place}.in": seen.update({key: x[0]}))
        # The product alone: its bias is added afterwards.
        module.register_forward_hook(lambda linear, x, _, key=place: seen.update({key: x[0] @ linear.weight.T}))
    with torch.inference_mode():
        whole(torch.from_numpy(TOKENS))
    with open_model(str(folder)) as model:
        statistics = collect(model, WINDOWS, 0, lambda done, total: None)
    for place in (*linears, "head_out"):
        check(statistics.ranges(place), seen[place])
    for role, (_, site) in LINEARS.items():
        check(statistics.ranges(f"layers.1.{site}"), seen[f"layers.1.{role}_out.in"])
    check(statistics.ranges("head_in"), seen["head_out.in"])
    assert statistics.ranges("tokens") is None


def check(found: ChannelRanges | None, values: torch.Tensor) -> None:
    assert found is not None
    rows = values.reshape(-1, values.shape[-1])
    np.testing.assert_allclose(found.low, rows.amin(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.high, rows.amax(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found.largest, np.maximum(-found.low, found.high))
