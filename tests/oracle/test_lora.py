"""LoRA adapters: an artifact of an adapter's folder is the merged model, in each runtime."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from exporter.model.ends import special_ids
from exporter.model.gguf_reader import open_gguf
from exporter.model.sources import open_model
from exporter.model.tokenizer import load_tokenizer
from exporter.targets.contract import load_target
from tests.adapters import merged, tiny_adapter
from tests.folders import edit, float_kl
from tests.models import VOCAB, tiny_model

TARGETS = ("gguf", "onnx")
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}!{% endfor %}"


FAMILIES = (("gemma3_text", True), ("llama", False), ("phi3", True), ("qwen2", True))


@pytest.mark.parametrize(
    ("family", "tied", "target"),
    [*((*one, target) for one in FAMILIES for target in TARGETS), ("qwen3_moe", False, "gguf")],
)
def test_an_artifact_is_the_merged_model(tmp_path: Path, family: str, tied: bool, target: str) -> None:
    base = tiny_model(tmp_path / "base", family, tied=tied, layers=3)
    adapter = tiny_adapter(tmp_path / "adapter", base)
    assert float_kl(adapter, target, merged(tmp_path / "merged", base, adapter)) < 1e-6
    assert float_kl(base, target, tmp_path / "merged") > 1e-3


@pytest.mark.parametrize("target", TARGETS)
def test_ranks_alphas_and_the_scaling_of_their_own(tmp_path: Path, target: str) -> None:
    base = tiny_model(tmp_path / "base", "llama", layers=3)
    deep = {f"model.layers.{layer}.mlp.down_proj": 7 for layer in range(3)}
    adapter = tiny_adapter(
        tmp_path / "adapter", base, ranks=deep, use_rslora=True, rank_pattern={"down_proj": 7},
        # The first that matches counts; a caret stands for the whole path.
        alpha_pattern={"^layers.0.self_attn.q_proj": 99, r"layers\.0\.self_attn.q_proj": 3, "q_proj": 5},
    )  # fmt: skip
    alphas = {f"model.layers.{layer}.self_attn.q_proj": 3 if layer == 0 else 5 for layer in range(3)}
    assert float_kl(adapter, target, merged(tmp_path / "merged", base, adapter, alphas)) < 1e-6
    assert float_kl(adapter, target, merged(tmp_path / "wrong", base, adapter)) > 1e-5


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("tied", [True, False])
def test_whole_tensors_and_another_vocabulary(tmp_path: Path, tied: bool, target: str) -> None:
    base = tiny_model(tmp_path / "base", "qwen3", tied=tied)
    chance = torch.Generator().manual_seed(2)
    ends = {name: torch.randn(VOCAB + 8, 64, generator=chance) * 0.1 for name in ("model.embed_tokens", "lm_head")}
    copies = {f"{name}.weight": one for name, one in ends.items()} | {
        "model.norm.weight": torch.rand(64, generator=chance),
        "model.layers.1.self_attn.v_proj.weight": torch.randn(32, 64, generator=chance) * 0.1,
    }
    adapter = tiny_adapter(
        tmp_path / "adapter", base, modules=("q_proj", "up_proj"), copies=copies,
        modules_to_save=["embed_tokens", "lm_head", "norm", "v_proj"],
    )  # fmt: skip
    expected = edit(merged(tmp_path / "merged", base, adapter), vocab_size=VOCAB + 8, tie_word_embeddings=False)
    with open_model(str(adapter)) as model:
        assert (model.decoder.vocab, model.decoder.tied) == (VOCAB + 8, False)
    assert float_kl(adapter, target, expected) < 1e-6


def test_a_table_of_embeddings_and_a_head_have_factors(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "llama", tied=False)
    adapter = tiny_adapter(tmp_path / "adapter", base, modules=("lm_head", "embed_tokens"))
    before = load_file(adapter / "adapter_model.safetensors")
    expected = merged(tmp_path / "merged", base, adapter)
    # PEFT stores the factors of a table the other way round.
    stem = "base_model.model.model.embed_tokens.lora_"
    a, b = before.pop(f"{stem}A.weight"), before.pop(f"{stem}B.weight")
    turned = before | {f"{stem}embedding_A": b.T.contiguous(), f"{stem}embedding_B": a.T.contiguous()}
    save_file(turned, adapter / "adapter_model.safetensors")
    assert float_kl(adapter, "gguf", expected) < 1e-6


def test_rows_are_those_of_the_whole(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "phi3", layers=1)
    adapter = tiny_adapter(tmp_path / "adapter", base)
    rows = np.array([3, 4, 20, 0])
    with open_model(str(adapter)) as model, open_model(str(base)) as plain:
        for group in model.groups():
            whole = model.read(group.name)
            np.testing.assert_allclose(model.read_rows(group.name, rows), whole[rows], rtol=1e-5, atol=1e-7)
            changed = not np.array_equal(whole, plain.read(group.name))
            assert changed == (group.layer is not None)


@pytest.mark.parametrize("whole", [True, False])
def test_a_chat_fine_tune_keeps_its_template_and_its_ends(tmp_path: Path, whole: bool) -> None:
    """With a tokenizer of its own, or with a template alone."""
    base = tiny_model(tmp_path / "base")
    edit(base, eos_token_id=5)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 6}))
    adapter = tiny_adapter(tmp_path / "adapter", base)
    (adapter / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    if whole:
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.chat_template = TEMPLATE
        tokenizer.eos_token = "<|im_start|>"
        tokenizer.save_pretrained(adapter)
    else:
        (adapter / "chat_template.jinja").write_text(TEMPLATE)
    with open_model(str(adapter)) as model:
        assert f"the tokenizer is the {'adapter' if whole else 'base'}'s" in str(model.warnings)
        loaded = load_tokenizer(model.folder, model.decoder.vocab)
        assert loaded.template == TEMPLATE
        ends = special_ids(model.folder, loaded.roles, model.decoder.vocab).ends
        assert ends == ((0, 5) if whole else (1, 5, 0))
        (tmp_path / "artifact").mkdir()
        made = load_target("gguf").write_float(model, tmp_path / "artifact")
    assert open_gguf(made.weights[0]).fields["tokenizer.chat_template"].contents() == TEMPLATE


def test_a_tokenizer_without_a_template_is_noted(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    adapter = tiny_adapter(tmp_path / "adapter", base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(adapter)
    with open_model(str(adapter)) as model:
        assert any("which has no chat template although the base has one" in note for note in model.warnings)
        assert load_tokenizer(model.folder, model.decoder.vocab).template is None


def test_the_base_named_on_the_command_line_counts(tmp_path: Path) -> None:
    base, other = (tiny_model(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    adapter = tiny_adapter(tmp_path / "adapter", base)
    name = "model.layers.0.self_attn.q_proj.weight"
    with open_model(str(adapter)) as one, open_model(str(adapter), str(other)) as two:
        difference = two.read(name) - one.read(name)
    bases = [load_file(folder / "model.safetensors")[name].numpy() for folder in (base, other)]
    np.testing.assert_allclose(difference, bases[1] - bases[0], atol=1e-6)
