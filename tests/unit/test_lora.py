"""Folders of LoRA adapters: where the base is looked for, what makes up the digest, and what is refused."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.foundation.errors import ExporterError, InputError, RequestError
from exporter.model.sources import open_model
from exporter.pipeline import plan
from exporter.planning.job import Job
from tests.adapters import PREFIX, tiny_adapter
from tests.folders import edit
from tests.models import VOCAB, tiny_model

Q = "model.layers.0.self_attn.q_proj"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "base", layers=1)


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return tiny_adapter(tmp_path / "adapter", base)


def refused(adapter: Path, match: str, kind: type[ExporterError] = InputError, base: str | None = None) -> None:
    with pytest.raises(kind, match=match) as caught, open_model(str(adapter), base):
        pass
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 2000


def rewrite(adapter: Path, **tensors: torch.Tensor | None) -> None:
    """Put tensors into an adapter's file, or take them out; the names leave out PEFT's prefix."""
    path = adapter / WEIGHTS
    held = load_file(path) | {PREFIX + name: one for name, one in tensors.items()}
    save_file({name: one for name, one in held.items() if one is not None}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["base", "../base", "adapter/../base", "sub/../../base"])
def test_the_base_is_found_from_the_adapter(adapter: Path, name: str) -> None:
    (adapter / "sub").mkdir()
    edit(adapter, CONFIG, base_model_name_or_path=name)
    with open_model(str(adapter)) as model:
        assert model.name == "adapter"
        assert model.origin == "LoRA adapter adapter, merged into Hugging Face folder base"
        assert any("it changes 7 matrices" in note for note in model.warnings)


def test_the_base_comes_from_the_local_hub_cache_alone(
    adapter: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        return str(base)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    edit(adapter, CONFIG, base_model_name_or_path="org/base-1b", revision="v2")
    with open_model(str(adapter)) as model:
        assert "base-1b" in model.origin
    with open_model(str(adapter), "org/other"):
        pass
    facts = [(one["name"], one["revision"], one["local_files_only"]) for one in asked]
    assert facts == [("org/base-1b", "v2", True), ("org/other", None, False)]


def test_a_base_that_is_not_at_hand(adapter: Path, tmp_path: Path) -> None:
    edit(adapter, CONFIG, base_model_name_or_path="org/no-such-base")
    told = (
        rf"the adapter's base 'org/no-such-base' is not at hand; got nothing in {adapter}/org/no-such-base, "
        rf"{tmp_path}/org/no-such-base, and the local hub cache; name its folder or hub id with --base"
    )
    refused(adapter, told, RequestError)
    edit(adapter, CONFIG, base_model_name_or_path="/no/such/base")
    refused(adapter, r"got nothing in /no/such/base; name its folder", RequestError)
    edit(adapter, CONFIG, base_model_name_or_path="x" * 5000)
    refused(adapter, "is not at hand", RequestError)
    edit(adapter, CONFIG, base_model_name_or_path=None)
    refused(adapter, "names no base; name it with --base", RequestError)


def test_bases_that_are_none(adapter: Path, base: Path, tmp_path: Path) -> None:
    refused(adapter, "there is no such model", RequestError, str(tmp_path / "x"))
    other = tiny_adapter(tmp_path / "other", base)
    refused(adapter, "the adapter's base is an adapter itself; expected a model", base=str(other))
    refused(base, "a base was named, but the model is no adapter", RequestError, str(base))
    refused(tmp_path / "x.gguf", "a base was named, but the model is no adapter", RequestError, str(base))


def test_the_digest_is_of_adapter_and_base(adapter: Path, base: Path, tmp_path: Path) -> None:
    def digest() -> str:
        with open_model(str(adapter)) as model:
            return model.digest

    found = [digest()]
    rewrite(adapter, **{f"{Q}.lora_A.weight": torch.zeros(4, 64)})
    found.append(digest())
    edit(adapter, CONFIG, lora_alpha=1)
    found.append(digest())
    tiny_model(base, layers=1, seed=3)
    found.append(digest())
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    found.append(digest())
    assert len(set(found)) == len(found)
    moved = Path(shutil.copytree(adapter, tmp_path / "moved" / "adapter"))
    with open_model(str(moved), str(base)) as model:
        assert model.digest == found[-1]


@pytest.mark.parametrize("file", ["base/model.safetensors", f"adapter/{WEIGHTS}", f"adapter/{CONFIG}"])
def test_a_change_of_either_is_noticed(adapter: Path, base: Path, file: str) -> None:
    with open_model(str(adapter)) as model:
        model.require_unchanged()
        os.utime(adapter.parent / file, ns=(1, 1))
        with pytest.raises(InputError, match=f"{file}: the source changed"):
            model.require_unchanged()


def test_an_adapter_is_planned_for(adapter: Path, base: Path) -> None:
    edit(adapter, CONFIG, base_model_name_or_path="elsewhere")
    made = plan(Job(str(adapter), "raspberry-pi-5", "gguf", "Q8_0", context=64, base=str(base)))
    assert made.file_bytes.value > 0


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (f"{Q}.lora_A.weight", torch.zeros(5, 64), r"wrong shape: .*q_proj.lora_A.weight; got \[5, 64\], expected \[4"),
        (f"{Q}.lora_A.weight", torch.zeros(4), r"wrong shape: .*q_proj.lora_A.weight; got \[4\], expected \[4, 64\]"),
        (f"{Q}.lora_B.weight", torch.zeros(65, 4), r"wrong shape: .*q_proj.lora_B.weight; got \[65, 4\], expected"),
        (f"{Q}.lora_B.weight", None, rf"holds only one factor of {Q}.weight; got .*lora_A.weight, expected A and B"),
        (f"{Q}.lora_magnitude_vector", torch.zeros(64), "belongs to nothing in the base: .*lora_magnitude_vector"),
        (f"{Q}.bias", torch.zeros(64), r"belongs to nothing in the base: .*q_proj.bias"),
        ("model.layers.1.mlp.up_proj.lora_A.weight", torch.zeros(4, 64), r"belongs to nothing .*layers.1.mlp.up_proj"),
        ("score.weight", torch.zeros(2, 64), "belongs to nothing in the base: base_model.model.score.weight"),
        (f"{Q}.lora_embedding_A", torch.zeros(4, 64), "factor is of another kind than its module: .*lora_embedding_A"),
        ("model.norm.lora_A.weight", torch.zeros(4, 64), "that adapter_config.json does not name: .*norm.lora_A"),
        ("model.norm.weight", torch.zeros(65), r"wrong shape: .*model.norm.weight; got \[65\], expected \[64\]"),
        ("model.embed_tokens.weight", torch.tensor(0.0), r"wrong shape: .*embed_tokens.weight; got \[\]"),
        (f"{Q}.base_layer.weight", torch.zeros(64, 65), r"wrong shape: .*base_layer.weight; got \[64, 65\]"),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(
    adapter: Path, name: str, tensor: torch.Tensor | None, message: str
) -> None:
    rewrite(adapter, **{name: tensor})
    refused(adapter, message)


def test_a_tensor_twice_and_none_at_all(adapter: Path) -> None:
    rewrite(adapter, **{f"{Q}.base_layer.weight": torch.zeros(64, 64), f"{Q}.weight": torch.zeros(64, 64)})
    refused(adapter, rf"holds {Q}.weight twice")
    save_file({}, adapter / WEIGHTS)
    refused(adapter, "the adapter holds no tensors")
    (adapter / WEIGHTS).unlink()
    refused(adapter, "holds an adapter's settings, but no adapter_model.safetensors")
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x04")
    refused(adapter, "holds an adapter in a pickle, which may run code and is not read")


def test_factors_that_are_no_finite_numbers(adapter: Path) -> None:
    rewrite(adapter, **{f"{Q}.lora_A.weight": torch.full((4, 64), torch.nan)})
    with open_model(str(adapter)) as model, pytest.raises(InputError, match=r"lora_A\.weight: the tensor holds NaN"):
        model.read(f"{Q}.weight")
    rewrite(adapter, **{f"{Q}.lora_A.weight": torch.zeros((4, 64), dtype=torch.int32)})
    with open_model(str(adapter)) as model, pytest.raises(InputError, match=r"lora_A\.weight: .* not of a floating-po"):
        model.read_rows(f"{Q}.weight", torch.arange(2).numpy())


@pytest.mark.parametrize(
    ("modules", "names", "more"),
    [
        (("lm_head",), [], {}),
        (("embed_tokens",), [], {}),
        (("q_proj",), ["model.embed_tokens.weight"], {"modules_to_save": ["embed_tokens"]}),
        (("q_proj",), ["model.embed_tokens.weight", "lm_head.weight"], {}),
    ],
)
def test_one_of_two_tied_matrices_is_not_changed(
    tmp_path: Path, base: Path, modules: tuple[str, ...], names: list[str], more: dict[str, object]
) -> None:
    copies = {name: torch.full((VOCAB, 64), float(number)) for number, name in enumerate(names)}
    adapter = tiny_adapter(tmp_path / "adapter", base, modules=("q_proj",), copies=copies, **more)
    if modules != ("q_proj",):
        table, factors = modules[0] == "embed_tokens", [torch.zeros(4, 64), torch.zeros(VOCAB, 4)]
        edit(adapter, CONFIG, target_modules=["q_proj", *modules])
        stem = "model.embed_tokens.lora_embedding_" if table else "lm_head.lora_"
        a, b = (factors[1].T, factors[0].T) if table else factors
        end = "" if table else ".weight"
        rewrite(adapter, **{f"{stem}A{end}": a.contiguous(), f"{stem}B{end}": b.contiguous()})
    refused(adapter, "the base ties embedding and head, and the adapter changes one of them")


def test_tied_matrices_are_replaced_together(tmp_path: Path, base: Path) -> None:
    same = torch.full((VOCAB + 1, 64), 0.5)
    for number, names in enumerate((["lm_head.weight"], ["lm_head.weight", "model.embed_tokens.weight"])):
        adapter = tiny_adapter(tmp_path / str(number), base, copies={name: same.clone() for name in names})
        with open_model(str(adapter)) as model:
            assert (model.decoder.tied, model.decoder.vocab) == (True, VOCAB + 1)
            assert json.loads((model.folder / "config.json").read_text())["vocab_size"] == VOCAB + 1
            assert (model.read("model.embed_tokens.weight") == 0.5).all()


def test_a_vocabulary_of_which_a_part_is_missing(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", layers=1, tied=False)
    copies = {"model.embed_tokens.weight": torch.zeros(VOCAB + 1, 64)}
    adapter = tiny_adapter(tmp_path / "adapter", base, copies=copies)
    refused(adapter, "has an embedding for another vocabulary, but no head for it; got 321 rows, expected 320 rows")
    rewrite(adapter, **{"model.embed_tokens.weight": None, "lm_head.weight": torch.zeros(VOCAB + 1, 64)})
    refused(adapter, r"wrong shape: .*lm_head.weight; got \[321, 64\], expected \[320, 64\]")


def test_tokens_without_embeddings(adapter: Path, base: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, adapter / name)
    definition = json.loads((adapter / "tokenizer.json").read_text())
    definition["added_tokens"].append(definition["added_tokens"][0] | {"id": VOCAB, "content": "<|new|>"})
    (adapter / "tokenizer.json").write_text(json.dumps(definition))
    refused(adapter, r"tokens that neither the base nor the adapter has embeddings for; got '<\|new\|>'")
    # A base may list tokens that it has no rows for, as Gemma 3 does.
    (base / "tokenizer.json").write_text(json.dumps(definition))
    with open_model(str(adapter)):
        pass


def test_a_part_of_a_tokenizer(adapter: Path) -> None:
    (adapter / "tokenizer_config.json").write_text("{}")
    refused(adapter, "holds a part of a tokenizer; got tokenizer_config.json, expected a whole one, or none")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"peft_type": "IA3"}, "the adapter is of a kind that is not read; got peft_type 'IA3', expected LORA"),
        ({"peft_type": ...}, "got peft_type None"),
        ({"peft_type": ["LORA"]}, "of a kind that is not read"),
        ({"use_dora": True}, "sets 'use_dora', which would change the model and is not read; got True, expected"),
        ({"bias": "all"}, "sets 'bias', .* got 'all', expected none"),
        ({"bias": {}}, "sets 'bias'"),
        ({"fan_in_fan_out": True}, "sets 'fan_in_fan_out'"),
        ({"trainable_token_indices": [1]}, "sets 'trainable_token_indices'"),
        ({"layer_replication": [[0, 1]]}, "sets 'layer_replication'"),
        ({"lora_bias": True}, "sets 'lora_bias'"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "sets 'target_parameters'"),
        ({"init_lora_weights": "pissa_niter_4"}, "sets 'init_lora_weights', .* got 'pissa_niter_4', expected true"),
        ({"init_lora_weights": {"a": 1}}, "sets 'init_lora_weights'"),
        ({"brand_new": 0.5}, "sets 'brand_new'"),
        ({"r": 1 << 40}, r"no usable 'r'; got 1099511627776, expected a whole number from 1 to 65536"),
        ({"r": 0}, "no usable 'r'"),
        ({"r": True}, "no usable 'r'"),
        ({"r": "4"}, "no usable 'r'"),
        ({"r": ...}, "no usable 'r'; got None"),
        ({"r": 5}, r"wrong shape: .*lora_A.weight; got \[4, 96\], expected \[5, 96\]"),
        ({"lora_alpha": 10**400}, "no usable 'lora_alpha'; got .*, expected a finite number"),
        ({"lora_alpha": float("nan")}, "no usable 'lora_alpha'; got nan"),
        ({"lora_alpha": float("inf")}, "no usable 'lora_alpha'; got inf"),
        ({"lora_alpha": [1]}, "no usable 'lora_alpha'"),
        ({"use_rslora": 2}, "no usable 'use_rslora'"),
        ({"rank_pattern": [1]}, "no usable 'rank_pattern'; got .*, expected a table"),
        ({"rank_pattern": {"q_proj": 0}}, "no usable 'rank_pattern.q_proj'"),
        ({"alpha_pattern": {"(a+)+$": 1}}, r"pattern in 'alpha_pattern' that is no name of modules; got '\(a\+\)\+\$'"),
        ({"alpha_pattern": {".*q_proj": 1}}, "that is no name of modules"),
        ({"modules_to_save": "lm_head"}, "no usable 'modules_to_save'; got 'lm_head', expected a list of at most 1000"),
        ({"modules_to_save": [["lm_head"]]}, "no usable 'modules_to_save'"),
        ({"target_modules": {"q_proj": 1}}, "no usable 'target_modules'"),
        ({"target_modules": ["k_proj"]}, r"of a module that adapter_config.json does not name: .*lora_A.weight"),
        ({"base_model_name_or_path": 3}, "no usable 'base_model_name_or_path'; got 3"),
        ({"base_model_name_or_path": "a\0b"}, "no usable 'base_model_name_or_path'"),
        ({"revision": "../../x"}, "no usable 'revision'"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(adapter: Path, keys: dict[str, object], message: str) -> None:
    refused(edit(adapter, CONFIG, **keys), message)


@pytest.mark.parametrize(
    "keys",
    [
        {"target_modules": "(a+)+$"}, {"target_modules": None, "brand_new": []}, {"brand_new": None}, {"bias": None},
        {"init_lora_weights": "Gaussian"}, {"lora_alpha": -1.5}, {"revision": "refs/pr/1"},
        {"layers_pattern": "layers"},
        {"rank_pattern": {"no.such.module": 3}}, {"megatron_core": "megatron.core"}, {"lora_alpha": 0},
    ],
)  # fmt: skip
def test_settings_that_change_nothing(tmp_path: Path, base: Path, keys: dict[str, object]) -> None:
    none = {} if keys.get("target_modules", 0) is not None else {"target_modules": ["q_proj"]}
    with open_model(str(tiny_adapter(tmp_path / "adapter", base, modules=("q_proj",), **keys | none))):
        pass
