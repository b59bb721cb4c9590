"""Every family describes its blocks as transformers computes them, and the rewrites that it allows change nothing."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from exporter.calibrate.statistics import Statistics
from exporter.compress.awq_scaling import EVERY_SITE, rescaled
from exporter.formats.format import Float32
from exporter.model.decoder import HEAD_SITE
from exporter.model.family import families
from exporter.model.folder import save_folder
from exporter.model.model import Model
from exporter.model.module import separate
from exporter.model.sources import open_model
from tests.models import ALL_FAMILIES, tiny_model

TOKENS = torch.from_numpy(np.random.default_rng(0).integers(2, 300, (2, 40)))


@pytest.fixture(scope="module", params=ALL_FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    folder = tiny_model(tmp_path_factory.mktemp(request.param) / "model", request.param, tied=False, layers=3)
    with open_model(str(folder)) as opened:
        yield opened


def loaded(model: Model) -> torch.nn.Module:
    """Return transformers' module with the weights of a model."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "saved"
        save_folder(model, folder)
        module: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        )
    return module


def with_separate_matrices(model: Model) -> torch.nn.Module:
    """Return transformers' module in which each matrix has a module of its own, as in a `LayerStream`."""
    module = loaded(model)
    for block in model.decoder.blocks:
        layer = module.get_submodule(f"model.layers.{block.layer}")
        separate(layer, block)
        for linear in block.linears.values():
            weight = torch.from_numpy(model.read(linear.group.name))
            layer.get_submodule(linear.module).weight = torch.nn.Parameter(weight)
    return module


def test_every_family_has_a_tiny_model() -> None:
    assert {family.model_type for family in families().values()} == set(ALL_FAMILIES)


def test_the_description_names_each_tensor_of_the_module(model: Model) -> None:
    saved = {name: tuple(values.shape) for name, values in load_file(model.folder / "model.safetensors").items()}
    assert model.decoder.stored_tensors() == saved


def test_nothing_of_the_module_is_left_out(model: Model) -> None:
    whole = loaded(model)
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32)(TOKENS).logits
        assert torch.equal(whole(TOKENS).logits, expected)


def test_matrices_that_are_stored_together_multiply_as_before(model: Model) -> None:
    with torch.inference_mode():
        logits = [made(model)(TOKENS).logits for made in (loaded, with_separate_matrices)]
    torch.testing.assert_close(*logits)


def test_a_site_is_the_input_of_its_matrices(model: Model) -> None:
    module = with_separate_matrices(model)
    seen: dict[str, torch.Tensor] = {}
    for block in model.decoder.blocks:
        layer = module.get_submodule(f"model.layers.{block.layer}")
        for linear in block.linears.values():
            layer.get_submodule(linear.module).register_forward_pre_hook(
                lambda _, given, name=linear.group.name: seen.__setitem__(name, given[0])
            )
    with torch.inference_mode():
        module(TOKENS)
    for site in model.decoder.sites.values():
        inputs = [seen[linear.group.name] for linear in site.linears]
        assert all(torch.equal(one, inputs[0]) for one in inputs), site.name
        assert inputs[0].shape[-1] == site.columns
    assert list(seen) == [linear.group.name for block in model.decoder.blocks for linear in block.linears.values()]


def test_the_stream_grows_by_what_the_last_site_or_its_norm_makes(model: Model) -> None:
    module = loaded(model)
    streams: list[torch.Tensor] = []
    made: list[torch.Tensor] = []
    scales: list[float] = []
    for block in model.decoder.blocks:
        layer = module.get_submodule(f"model.layers.{block.layer}")
        at_end = 1.0 if block.scale is None else float(model.read(block.scale.name)[0])
        scales += [*[1.0] * (len(block.sublayers) - 1), at_end]
        for sublayer in block.sublayers:
            linear = sublayer.sites[-1].linears[-1]
            last = linear.module if linear.stacked_in is None else linear.stacked_in
            if sublayer.norm_after is not None:
                last = sublayer.norm_after.name.removeprefix(f"model.layers.{block.layer}.").removesuffix(".weight")
            layer.get_submodule(sublayer.entrance).register_forward_pre_hook(
                lambda _, given: streams.append(given[0].clone())
            )
            layer.get_submodule(last).register_forward_hook(
                lambda _, __, output, scale=sublayer.residual_scale: made.append(scale * output.view(*TOKENS.shape, -1))
            )
    module.get_submodule(f"model.{model.decoder.family.final_norm}").register_forward_pre_hook(
        lambda _, given: streams.append(given[0].clone())
    )
    with torch.inference_mode():
        module(TOKENS)
    assert len(made) == len(streams) - 1
    for before, added, scale, after in zip(streams, made, scales, streams[1:], strict=False):
        torch.testing.assert_close(scale * (before + added), after)


def rescaled_at(model: Model, kind: str) -> Model:
    """Return the model with random factors at the sites of a kind."""
    chance = np.random.default_rng(0)

    def factors(site: str, _: object) -> Float32:
        columns = model.decoder.sites[site].columns if site in model.decoder.sites else model.decoder.hidden
        return np.exp(chance.normal(0, 0.5, columns)).astype(np.float32)

    return rescaled(model, Statistics(Path("none")), (kind,), factors).model


@pytest.mark.parametrize("kind", EVERY_SITE)
def test_a_rewrite_that_the_family_allows_changes_no_logit(model: Model, kind: str) -> None:
    changed = rescaled_at(model, kind)
    names = model.decoder.tensors()
    if kind != HEAD_SITE and not any(site.producer for site in model.decoder.sites.values() if site.kind == kind):
        pytest.skip("nothing may absorb a division there")
    assert any((changed.read(name) != model.read(name)).any() for name in names)
    with torch.inference_mode():
        before, after = (loaded(one)(TOKENS).logits.double() for one in (model, changed))
    assert float((before - after).norm() / before.norm()) < 1e-5


def test_a_rewrite_that_is_not_allowed_is_seen(model: Model) -> None:
    """The rows of `gate` cannot absorb a division: an activation stands behind them."""
    layer = model.decoder.blocks[0]
    channels = layer.channels
    if channels is None:
        pytest.skip("it has no gated part outside of experts")
    site = layer.linears["down"].group.site
    wrong = replace(model.decoder.sites[site].producer, linear=channels.gate)
    sublayers = [
        replace(
            one, sites=tuple(replace(place, producer=wrong) if place.name == site else place for place in one.sites)
        )
        for one in layer.sublayers
    ]
    decoder = replace(model.decoder)
    decoder.__dict__["blocks"] = (replace(layer, sublayers=tuple(sublayers)), *model.decoder.blocks[1:])
    changed = rescaled_at(replace(model, decoder=decoder), "mlp_out")
    with torch.inference_mode():
        before, after = (loaded(one)(TOKENS).logits.double() for one in (model, changed))
    assert float((before - after).norm() / before.norm()) > 1e-3
