"""Of a folder with a choice of weights those are built that transformers loads, and the report says what was not."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from transformers import AutoModel, AutoModelForCausalLM

from exporter.foundation.errors import InputError
from exporter.model.decoder import EMBEDDING, HEAD
from exporter.model.model import Model
from exporter.model.sources import open_model
from tests.folders import Tensors, edit, float_kl, rewrite
from tests.models import VOCAB, tiny_model

MOST_KL = 1e-6
QUERY = "model.layers.0.self_attn.q_proj.weight"


def resaved(folder: Path) -> None:
    """One file beside the index of shards that are gone."""
    tiny_model(folder, seed=1, shards=2)
    for path in folder.glob("model-*.safetensors"):
        path.unlink()
    tiny_model(folder, seed=2)


def both(folder: Path) -> None:
    """One file beside shards of another model, and pickles."""
    tiny_model(folder, seed=1, shards=2)
    one = tiny_model(folder.with_name("one"), seed=2)
    shutil.copyfile(one / "model.safetensors", folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"not read")


def variants(folder: Path) -> None:
    """A variant beside the model."""
    tiny_model(folder)
    other = tiny_model(folder.with_name("other"), seed=3)
    shutil.copyfile(other / "model.safetensors", folder / "model.fp16.safetensors")


def only_head(folder: Path) -> None:
    """A tied matrix under the head's name, as safetensors' own save_model leaves it."""
    tiny_model(folder, "qwen2")
    model = AutoModelForCausalLM.from_pretrained(folder)
    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
    assert EMBEDDING not in load_file(folder / "model.safetensors")


def base_model(folder: Path) -> None:
    """The base model of a tied one, saved by itself: no head, no prefix, its own class in config.json."""
    tiny_model(folder, "qwen3")
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    assert "layers.0.self_attn.q_norm.weight" in load_file(folder / "model.safetensors")


def without_prefix(folder: Path) -> None:
    """An untied model some of whose names lack the prefix, and whose head has one too many."""

    def change(tensors: Tensors) -> Tensors:
        names = {name: name.removeprefix("model.") if "layers.1." in name else name for name in tensors}
        return {("model.lm_head.weight" if new == HEAD else new): tensors[old] for old, new in names.items()}

    rewrite(tiny_model(folder, "mistral", tied=False), change)


def two_heads(folder: Path) -> None:
    """A head of its own where config.json ties it, as transformers does not then."""
    rewrite(tiny_model(folder), lambda tensors: tensors | {HEAD: torch.randn(VOCAB, 64) * 0.3})


def equal_heads(folder: Path) -> None:
    """A tied matrix stored twice, in two types."""
    rewrite(tiny_model(folder, dtype=torch.bfloat16), lambda tensors: tensors | {HEAD: tensors[EMBEDDING].float()})


def beyond_the_index(folder: Path) -> None:
    """A tensor of a shard that the index forgets."""
    tiny_model(folder, shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"][QUERY]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def in_two_shards(folder: Path) -> None:
    """A tensor that two shards hold, the index naming the first."""
    tiny_model(folder, shards=2)
    last = max(folder.glob("model-*.safetensors"))
    save_file(load_file(last) | {QUERY: torch.ones(64, 64)}, last, metadata={"format": "pt"})
    assert json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][QUERY] != last.name


Make = Callable[[Path], None]
CHOICES: dict[Make, str] = {
    resaved: "those of model.safetensors, .* not used: model.safetensors.index.json",
    both: "not used: model-00001.*, model-00002.*, model.safetensors.index.json, pytorch_model.bin",
    variants: "not used: model.fp16.safetensors",
    only_head: "",
    base_model: "",
    without_prefix: "",
    two_heads: "ties the head to the embedding, but both are stored and differ",
    equal_heads: "",
    beyond_the_index: "",
    in_two_shards: f"several shards hold {QUERY}: the last in order",
}


def tensors_of(model: Model) -> Tensors:
    names = [*(group.name for group in model.groups()), *model.decoder.vectors()]
    found = {name: torch.from_numpy(model.read(name)) for name in names}
    return found | ({HEAD: found[EMBEDDING]} if model.decoder.tied else {})


@pytest.mark.parametrize("make", CHOICES, ids=lambda make: make.__name__)
def test_every_tensor_is_the_one_that_transformers_loads(tmp_path: Path, make: Make) -> None:
    folder = tmp_path / "model"
    make(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    with open_model(str(folder)) as model:
        read = tensors_of(model)
        assert read.keys() == loaded.keys()
        for name, tensor in loaded.items():
            assert torch.equal(read[name], tensor), name
        note = CHOICES[make]
        assert len(model.warnings) == bool(note)
        assert re.search(note, "".join(model.warnings))


@pytest.mark.parametrize("target", ["gguf", "onnx"])
@pytest.mark.parametrize("make", [resaved, only_head, base_model, without_prefix, two_heads], ids=lambda m: m.__name__)
def test_it_is_what_the_runtime_computes(tmp_path: Path, make: Make, target: str) -> None:
    make(tmp_path / "model")
    assert float_kl(tmp_path / "model", target) < MOST_KL


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    folder = rewrite(tiny_model(tmp_path / "model"), lambda held: held | {"norm.weight": torch.zeros(64)})
    with (
        pytest.raises(InputError, match=r"two tensors of the folder are model.norm.weight; got"),
        open_model(str(folder)),
    ):
        pass


def test_a_head_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    folder = edit(tiny_model(tmp_path / "model"), tie_word_embeddings=False)
    with pytest.raises(InputError, match=r"the tensor lm_head.weight is missing"), open_model(str(folder)):
        pass


def test_what_no_model_uses_is_refused(tmp_path: Path) -> None:
    folder = rewrite(tiny_model(tmp_path / "model"), lambda held: held | {"v_head.summary.weight": torch.zeros(1, 64)})
    with pytest.raises(InputError, match=r"does not use: v_head.summary.weight"), open_model(str(folder)):
        pass


def test_float8_without_scales_is_read_as_the_numbers_that_it_is(tmp_path: Path) -> None:
    def cast(tensors: Tensors) -> Tensors:
        return {name: one.to(torch.float8_e4m3fn) if "_proj" in name else one for name, one in tensors.items()}

    folder = rewrite(tiny_model(tmp_path / "model", dtype=torch.bfloat16), cast)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    with open_model(str(folder)) as model:
        for name, tensor in tensors_of(model).items():
            np.testing.assert_array_equal(tensor, loaded[name])
        (note,) = model.warnings
    assert note.startswith("weights are stored as F8_E4M3 without scales")
    assert float_kl(folder, "gguf") < MOST_KL
