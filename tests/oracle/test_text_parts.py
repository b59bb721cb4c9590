"""Multimodal models: their decoder alone is built, and computes what transformers' whole computes for a text."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedModel,
)

from exporter.foundation.errors import InputError
from exporter.model.ends import special_ids
from exporter.model.folder import save_folder
from exporter.model.sources import open_model
from exporter.prove.accuracy import Reference, distance
from exporter.targets.contract import load_target
from exporter.targets.opened import OpenedArtifact
from tests.folders import Tensors, edit, rewrite
from tests.models import tiny_model

LENGTH = 96
TOKENS = np.random.default_rng(0).integers(2, 300, (2, LENGTH))
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
WHOLE: dict[str, tuple[type, type[PreTrainedModel], dict[str, Any]]] = {
    "gemma3_text": (Gemma3Config, Gemma3ForConditionalGeneration, {"vision_config": VISION, "mm_tokens_per_image": 4}),
    "ministral3": (Mistral3Config, Mistral3ForConditionalGeneration, {"vision_config": VISION | {"head_dim": 16}}),
}
FAMILIES = tuple(WHOLE)


def whole_model(folder: Path, family: str, tied: bool = True, **text: Any) -> PreTrainedModel:
    """Write a random multimodal model beside the tokenizer of a tiny model, and return it."""
    tiny_model(folder, family, tied=tied, layers=3, changes=text)
    config_class, model_class, rest = WHOLE[family]
    own = json.loads((folder / "config.json").read_text("utf-8"))
    torch.manual_seed(0)
    model = model_class(config_class(text_config=own, tie_word_embeddings=tied, **rest)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = 0.0 if family == "gemma3_text" else 1.0
            parameter.normal_(gain if "norm" in name else 0.0, 0.1 if "norm" in name else 0.15)
    model.save_pretrained(folder)
    return model


def logits(model: PreTrainedModel) -> Any:
    """Return a function that gives a model's logits from a position on."""

    def of(tokens: list[int], first: int) -> np.ndarray:
        with torch.inference_mode():
            found: np.ndarray = model(input_ids=torch.tensor([tokens])).logits[0, first:].numpy()
        return found

    return of


def renamed(tensors: Tensors) -> Tensors:
    """Return tensors under the names of transformers' classes, which files have since its version 4.52."""
    parts = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}
    parts |= {f"{part}.": f"model.{part}." for part in ("vision_tower", "multi_modal_projector")}
    found = {}
    for name, values in tensors.items():
        prefix = next(prefix for prefix in parts if name.startswith(prefix))
        found[parts[prefix] + name.removeprefix(prefix)] = values
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_decoder_computes_what_the_whole_does(tmp_path: Path, family: str, tied: bool) -> None:
    folder = tmp_path / "model"
    whole = whole_model(folder, family, tied)
    if not tied:
        rewrite(folder, renamed)
    with open_model(str(folder)) as model:
        assert model.decoder.tied is tied
        assert model.decoder.family.model_type == family
        (note,) = [note for note in model.warnings if "ForConditionalGeneration" in note]
        assert "only its decoder is built, for texts alone; not used:" in note
        reference = Reference.of(model, TOKENS)
        assert distance(reference, logits(whole)).kl_mean < 1e-9
        for target in ("gguf", "onnx"):
            (tmp_path / target).mkdir()
            artifact = load_target(target).write_float(model, tmp_path / target)
            with OpenedArtifact(artifact, LENGTH, 1, exact=True) as opened:
                assert distance(reference, opened.logits).kl_mean < 1e-6
        save_folder(model, tmp_path / "saved")
    with open_model(str(tmp_path / "saved")) as alone:
        assert not [note for note in alone.warnings if "ForConditionalGeneration" in note]
        assert alone.decoder == model.decoder
        assert all(np.array_equal(alone.read(name), model.read(name)) for name in model.decoder.tensors())


def test_the_keys_of_a_published_gemma_3(tmp_path: Path) -> None:
    """The first files name little of the decoder, and scale one of its two rotary embeddings."""
    folder = tmp_path / "model"
    sizes = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rms_norm_eps": 1e-6}
    whole_model(folder, "gemma3_text", **sizes)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["text_config"]["rope_parameters"]["full_attention"]["factor"] == 8.0
    for key in ("rope_parameters", "_sliding_window_pattern", "rms_norm_eps", "tie_word_embeddings", "query_pre_attn"):
        config["text_config"].pop(key, None)
    del config["tie_word_embeddings"]
    config["text_config"]["rope_scaling"] = sizes["rope_scaling"]
    config |= {"eos_token_id": [1, 106], "torch_dtype": "bfloat16", "initializer_range": 0.02}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    whole = Gemma3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    with open_model(str(folder)) as model:
        assert model.decoder.tied
        assert distance(Reference.of(model, TOKENS), logits(whole)).kl_mean < 1e-9
    assert special_ids(folder, {}, 320).ends == (1, 106)


def test_tokens_that_the_decoders_config_names_end_a_text(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    whole_model(folder, "ministral3")
    (folder / "generation_config.json").unlink()
    assert "eos_token_id" not in json.loads((folder / "config.json").read_text("utf-8"))
    assert special_ids(folder, {}, 320).ends == (1,)


TEXT: dict[str, Any] = {"text_config": {"final_logit_softcapping": 30.0}}


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma3_text", TEXT, "text_config: config.json sets 'final_logit_softcapping', which no target carries"),
        (
            "gemma3_text",
            {"text_config": {"model_type": "llama"}},
            "of a kind that is not supported; got 'llama', expec",
        ),
        ("ministral3", {"text_config": {"model_type": "mistral"}}, "got 'mistral', expected the model_type ministral3"),
        ("gemma3_text", {"text_config": None}, "config.json has no usable 'text_config'; got None, expected an object"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "config.json: config.json sets 'final_logit_softcapping'"),
        ("gemma3_text", {"tie_word_embeddings": "yes"}, "config.json has no usable 'tie_word_embeddings'; got 'yes'"),
        ("gemma3_text", {"architectures": ["Gemma3ForSequenceClassification"]}, "the architecture 'Gemma3ForSequence"),
        ("ministral3", {"quantization_config": {"quant_method": "fp8"}}, "already quantised (FP8 with scales)"),
        ("ministral3", {"text_config": {"quantization_config": {"bits": 4}}}, "the weights are already quantised"),
        ("ministral3", {"text_config": {"auto_map": {"AutoConfig": "a.B"}}}, "asks to run code of its own (auto_map)"),
        ("ministral3", {"text_config": {"vocab_size": 319}}, "the tensor has the wrong shape"),
    ],
)
def test_keys_are_checked_as_those_of_a_decoder_alone(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "model"
    whole_model(folder, family)
    text = json.loads((folder / "config.json").read_text("utf-8"))["text_config"]
    given = changes.get("text_config")
    edit(folder, **changes | ({"text_config": text | given} if given else {}))
    with pytest.raises(InputError) as refused, open_model(str(folder)):
        pass
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("gemma3_text", "model.layers.0.mlp.up_proj.weight", "is not known to use: model.layers.0.mlp.up_proj.weight"),
        ("gemma3_text", "audio_tower.weight", "a Gemma3ForConditionalGeneration is not known to use: audio_tower.weig"),
        ("ministral3", "vision_tower_2.weight", "Mistral3ForConditionalGeneration is not known to use: vision_tower_2"),
        ("ministral3", "language_model.model.layers.0.bias", "holds a tensor that a Ministral3ForCausalLM does not u"),
        ("ministral3", "model.language_model.norm.weight", "two tensors of the folder are model.norm.weight"),
    ],
)
def test_other_tensors_are_refused(tmp_path: Path, family: str, name: str, message: str) -> None:
    folder = tmp_path / "model"
    whole_model(folder, family)
    rewrite(folder, lambda tensors: tensors | {name: torch.ones(64)})
    with pytest.raises(InputError) as refused, open_model(str(folder)):
        pass
    assert message in str(refused.value)


def test_a_missing_tensor_of_the_decoder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    whole_model(folder, "ministral3")
    rewrite(
        folder, lambda tensors: {name: one for name, one in tensors.items() if not name.endswith("model.norm.weight")}
    )
    with pytest.raises(InputError, match=r"the tensor model\.norm\.weight is missing"), open_model(str(folder)):
        pass
