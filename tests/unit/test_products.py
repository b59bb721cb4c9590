"""Products of rounded float32 matrices: where they are made, how far off they are, and what statistics make of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from exporter.calibrate.bf16_matmul import TILES, VECTORS, quick_products
from exporter.calibrate.layer_stream import silent
from exporter.calibrate.statistics import Statistics, collect
from exporter.calibrate.windows import Windows
from exporter.model.sources import open_model
from tests.llama_names import LINEARS
from tests.models import tiny_model

LEFT, RIGHT = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
EXACT = LEFT.double() @ RIGHT.double()
WINDOWS = Windows.of(np.random.default_rng(1).integers(2, 200, (6, 40)), "file", 0)
has_tiles = pytest.mark.skipif(not torch.cpu.get_capabilities().get(TILES), reason="this processor has no tiles")


@pytest.fixture(params=[pytest.param(TILES, marks=has_tiles), VECTORS])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a processor with certain instructions; what vectors do, torch does on any, only more slowly."""
    has_only(monkeypatch, request.param)


def has_only(monkeypatch: pytest.MonkeyPatch, instructions: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {instructions: True})


def off(product: torch.Tensor) -> float:
    return float((product - EXACT).norm() / EXACT.norm())


def moment(statistics: Statistics, name: str) -> np.ndarray:
    site = statistics.site(name)
    assert site is not None
    return site.second_moment


def apart(found: np.ndarray | None, expected: np.ndarray | None) -> float:
    assert found is not None and expected is not None
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.usefixtures("processor")
def test_products_are_rounded_inside_and_exact_again_after_it() -> None:
    with quick_products():
        quick = LEFT @ RIGHT
    assert 1e-4 < off(quick) < 1 / 256
    with pytest.raises(KeyError), quick_products():
        raise KeyError
    assert off(LEFT @ RIGHT) < 1e-6


@pytest.mark.usefixtures("float32_products")
def test_processors_without_them_multiply_float32() -> None:
    with quick_products():
        assert off(LEFT @ RIGHT) < 1e-6


@pytest.mark.parametrize("differentiable", [False, True])
def test_what_vectors_make_of_a_layer_is_as_near(monkeypatch: pytest.MonkeyPatch, differentiable: bool) -> None:
    has_only(monkeypatch, VECTORS)
    linear = torch.nn.Linear(256, 256, bias=True).requires_grad_(False)
    linear.weight.data = RIGHT.T
    given = LEFT.clone().requires_grad_(differentiable)
    with quick_products(), torch.inference_mode(not differentiable):
        product = linear(given)
        assert product.dtype == torch.float32
        assert 1e-4 < off((product - linear.bias).detach()) < 1 / 256
        if differentiable:
            (gradient,) = torch.autograd.grad(product, given, torch.ones_like(product))
            expected = RIGHT.double().sum(1)
            assert 1e-5 < float((gradient[0] - expected).norm() / expected.norm()) < 1 / 64


def test_vectors_leave_sums_in_place_and_other_types_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    has_only(monkeypatch, VECTORS)
    with quick_products():
        assert off(torch.zeros(256, 256).addmm_(LEFT, RIGHT)) < 1e-6
        assert off(LEFT.double() @ RIGHT.double()) == 0


def test_positions_of_tokens_are_not_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    has_only(monkeypatch, TILES)
    precisions, forward = [], LlamaRotaryEmbedding.forward

    def watched(*given: Any, **named: Any) -> Any:
        precisions.append(torch.backends.mkldnn.matmul.fp32_precision)
        return forward(*given, **named)

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", watched)
    with open_model(str(tiny_model(tmp_path / "model"))) as model:
        collect(model, WINDOWS, 3, silent)
    assert set(precisions) == {"ieee"}


@pytest.mark.usefixtures("processor")
def test_statistics_hardly_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "quick"))
    with open_model(str(tiny_model(tmp_path / "model"))) as model:
        quick = collect(model, WINDOWS, 3, silent)
        request.getfixturevalue("float32_products")
        monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "exact"))
        exact, otherwise_drawn = (collect(model, WINDOWS, seed, silent) for seed in (3, 4))
    for layer in range(2):
        for _, place in LINEARS.values():
            site = f"layers.{layer}.{place}"
            assert apart(quick.importance(site), exact.importance(site)) < 0.01
            # A few tokens are drawn otherwise, and count by gradients that differ with them.
            assert (
                apart(moment(quick, site), moment(exact, site))
                < apart(moment(otherwise_drawn, site), moment(exact, site)) / 2
            )
