"""The model of a few layers, one of each kind: the same weights under new numbers, and a model that runs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from exporter.model.excerpt import excerpt, excerpt_layers, source_name
from exporter.model.sources import open_model
from exporter.model.widths import outlined
from exporter.prove.accuracy import Reference
from tests.models import tiny_model

TOKENS = np.random.default_rng(0).integers(2, 200, (1, 24))


@pytest.mark.parametrize(
    ("family", "kept"),
    [("gemma3_text", (0, 5)), ("lfm2", (0, 4, 5)), ("llama", (0, 5)), ("qwen2", (0, 5)), ("qwen3", (0, 5))],
)
def test_an_excerpt_is_the_model_without_its_middle(tmp_path: Path, family: str, kept: tuple[int, ...]) -> None:
    folder = tiny_model(tmp_path / "model", family, layers=6, tied=family != "qwen2")
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    whole.model.layers = torch.nn.ModuleList([whole.model.layers[layer] for layer in kept])
    whole.config.num_hidden_layers = len(kept)
    kinds = getattr(whole.config, "layer_types", None)
    if kinds:
        whole.config.layer_types = [kinds[layer] for layer in kept]
    with torch.inference_mode():
        expected = whole(torch.from_numpy(TOKENS), use_cache=False).logits[0]
    with open_model(str(folder)) as model:
        short = excerpt(model)
        assert excerpt_layers(model.decoder) == kept
        short.decoder.check_shapes(short.tensors.shapes(), short.decoder.tensors(), folder)
        assert short.digest != model.digest
        assert short.own_config().num_hidden_layers == len(kept)
        got = Reference.of(short, TOKENS).logits(0, slice(0, 24))
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def test_unequal_widths_stay_with_their_layers(tmp_path: Path) -> None:
    with open_model(str(tiny_model(tmp_path / "model", layers=4))) as model:
        short = excerpt(outlined(model, [96, 32, 32, 64]))
        assert short.decoder.intermediate == (96, 64)
        for group in short.groups():
            assert short.read(group.name).shape == (group.rows, group.columns)
            whole = model.read(source_name(group.name, (0, 3)))[: group.rows, : group.columns]
            np.testing.assert_array_equal(short.read(group.name), whole)


def test_a_model_of_two_layers_is_its_own_excerpt(tmp_path: Path) -> None:
    with open_model(str(tiny_model(tmp_path / "model"))) as model:
        assert excerpt(model) is model
