"""Texts end where transformers ends them, in float32 artifacts of both targets, whichever file names the end."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

from exporter.model.ends import special_ids
from exporter.model.sources import open_model
from exporter.model.tokenizer import load_tokenizer
from exporter.prove.text_checks import preview_text
from exporter.targets.artifact import Artifact
from exporter.targets.contract import load_target
from exporter.targets.opened import OpenedArtifact
from tests.models import VOCAB, counting_model

IM_END = 1
COUNT = 10
# Where the ends stand, by file; the tokenizer's own end is <|im_end|> where nothing is said of it.
VARIANTS: dict[str, dict[str, Any]] = {
    "config": {"config.json": 200},
    "generation_config": {"config.json": None, "generation_config.json": [200, 210, 220]},
    "tokenizer": {"config.json": -1, "tokenizer": 230},
}


def written(folder: Path, variant: str) -> list[int]:
    """Write a model that counts, with the ends of a variant; return them, sorted."""
    stated = VARIANTS[variant]
    counting_model(folder, eos=stated.get("tokenizer", IM_END))
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        content = json.loads(path.read_text()) | {"eos_token_id": stated.get(name)}
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    listed = [stated.get("tokenizer", IM_END), stated["config.json"], *stated.get("generation_config.json", ())]
    return sorted({token for token in listed if token is not None and token >= 0})


def by_transformers(folder: Path, prompts: Sequence[int], ends: list[int]) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    made = []
    for prompt in prompts:
        given = torch.tensor([[prompt]])
        ids = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=COUNT, do_sample=False,
                             eos_token_id=ends, pad_token_id=0)[0, 1:].tolist()  # fmt: skip
        made.append(ids[:-1] if ids[-1] in ends else ids)
    return made


@pytest.mark.parametrize("variant", VARIANTS)
def test_texts_end_where_transformers_ends_them(tmp_path: Path, variant: str) -> None:
    folder = tmp_path / "model"
    ends = written(folder, variant)
    # Before each end, before an end of no variant, and across the last token to <|im_end|>.
    prompts = [*(end - 5 for end in (200, 210, 220, 230)), 99, VOCAB - 2]
    expected = by_transformers(folder, prompts, ends)
    assert [len(made) for made in expected].count(4) == len([end for end in ends if end != IM_END])
    with open_model(str(folder)) as model:
        assert sorted(special_ids(folder, load_tokenizer(folder, VOCAB).roles, VOCAB).ends) == ends
        for target in ("gguf", "onnx"):
            (tmp_path / target).mkdir()
            artifact = load_target(target).write_float(model, tmp_path / target)
            assert generated(artifact, prompts) == expected
            notes = preview_text(model, load_target(target)).notes
            assert bool(notes) == (target == "gguf" and variant != "config")
    if variant == "generation_config":
        assert_gguf_is_a_source_with_the_same_ends(tmp_path, prompts, expected, ends)


def generated(artifact: Artifact, prompts: Sequence[int]) -> list[list[int]]:
    with OpenedArtifact(artifact, 32, 1) as child:
        return [child.generate([prompt], COUNT) for prompt in prompts]


def assert_gguf_is_a_source_with_the_same_ends(
    folder: Path, prompts: Sequence[int], expected: list[list[int]], ends: list[int]
) -> None:
    with open_model(str(folder / "gguf" / "model.gguf")) as model:
        assert sorted(special_ids(model.folder, load_tokenizer(model.folder, VOCAB).roles, VOCAB).ends) == ends
        (folder / "again").mkdir()
        assert generated(load_target("gguf").write_float(model, folder / "again"), prompts) == expected


def test_what_llama_cpp_reads_is_used_for_ends_that_it_does_not_know(tmp_path: Path) -> None:
    written(tmp_path / "model", "generation_config")
    with open_model(str(tmp_path / "model")) as model:
        artifact = load_target("gguf").lower_text(model, tmp_path)
        notes = preview_text(model, load_target("gguf")).notes
    assert artifact is not None
    fields = gguf.GGUFReader(artifact.weights[0]).fields
    ids = {role: fields[f"tokenizer.ggml.{role}_token_id"].contents() for role in ("eos", "eot", "eom")}
    assert ids == {"eos": IM_END, "eot": 200, "eom": 210}
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert notes == (
        "llama.cpp has no place for all tokens that end a text, and by itself goes on after: "
        f"{tokens[220]!r} (220); edge-exporter run ends as the model does",
    )


def test_tokens_that_llama_cpp_takes_for_ends_by_their_text_are_told(tmp_path: Path) -> None:
    written(tmp_path / "model", "tokenizer")
    with open_model(str(tmp_path / "model")) as model:
        (note,) = preview_text(model, load_target("gguf")).notes
    assert "llama.cpp by itself ends a text also at tokens at which the model does not: '<|im_end|>' (1)" in note


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_ids_that_cannot_be_are_left_out_and_told(tmp_path: Path, target: str) -> None:
    folder = counting_model(tmp_path / "model")
    wrong = {"pad_token_id": -1, "eos_token_id": [VOCAB, 200]}
    for name, more in (("config.json", {}), ("generation_config.json", {"bos_token_id": "0"})):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | wrong | more))
    tokenizer = load_tokenizer(folder, VOCAB)
    found = special_ids(folder, tokenizer.roles, VOCAB)
    assert (found.roles["pad"], found.roles["bos"], found.ends) == (1, 0, (1, 200))
    with open_model(str(folder)) as model:
        (tmp_path / "artifact").mkdir()
        artifact = load_target(target).write_float(model, tmp_path / "artifact")
        assert generated(artifact, [195, 99]) == [[196, 197, 198, 199], list(range(100, 110))]
        notes = preview_text(model, load_target(target)).notes
    assert "eos_token_id of config.json names no token of the model and is left out: 320" in notes
    assert "bos_token_id of generation_config.json names no token of the model and is left out: '0'" in notes


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_a_model_without_any_end(tmp_path: Path, target: str) -> None:
    folder = counting_model(tmp_path / "model", eos=None)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        del content["eos_token_id"]
        (folder / name).write_text(json.dumps(content))
    with open_model(str(folder)) as model:
        (tmp_path / "artifact").mkdir()
        artifact = load_target(target).write_float(model, tmp_path / "artifact")
        (note,) = preview_text(model, load_target(target)).notes
    # Tokens that llama.cpp takes for ends: the 11th by its number, <|im_end|> by its text.
    assert generated(artifact, [5]) == [list(range(6, 16))]
    assert "by itself ends a text also at tokens at which the model does not" in note
