"""Models that are wrong in one way each: one sentence, exit code 3 or 2, inputs untouched."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.compress.compression import Compression
from exporter.foundation.errors import ExporterError, InputError, RequestError
from exporter.model.sources import open_model
from exporter.pipeline import plan
from exporter.planning.job import Job
from exporter.targets.contract import load_target, lower
from tests.models import tiny_model

QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("whole") / "model", shards=2)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def refused(source: object, kind: type[ExporterError], match: str) -> None:
    with pytest.raises(kind, match=match), open_model(str(source)) as model:
        for group in model.groups():
            model.read(group.name)


def edit(folder: Path, name: str, **changes: object) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensor(folder: Path, name: str, change: object) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][name]
    tensors = load_file(path)
    tensors[name] = change(tensors[name])  # type: ignore[operator]
    save_file(tensors, path)


def test_sharded_folder_is_read(folder: Path) -> None:
    with open_model(str(folder)) as model:
        assert len(model.tensors.files) > 1
        assert model.decoder.parameters == sum(g.size for g in model.groups()) + 64 * 5
        assert model.read(QUERY).dtype == np.float32


def test_missing_shard(folder: Path) -> None:
    next(folder.glob("model-00002*")).unlink()
    refused(folder, InputError, r"model-00002.*: a shard is missing")


def test_truncated_shard(folder: Path) -> None:
    path = next(folder.glob("model-00001*"))
    path.write_bytes(path.read_bytes()[:-1000])
    refused(folder, InputError, "truncated or damaged")


@pytest.mark.parametrize("outside", ["../other.safetensors", "/etc/passwd", "other.bin"])
def test_index_that_leaves_the_folder(folder: Path, outside: str) -> None:
    edit(folder, "model.safetensors.index.json", weight_map={QUERY: outside})
    refused(folder, InputError, "names a file outside the folder")


def test_index_that_names_what_no_shard_holds(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra"] = next(folder.glob("model-00001*")).name
    path.write_text(json.dumps(index))
    refused(folder, InputError, "names a tensor that its shard does not hold: model.extra")
    path.write_text("[]")
    refused(folder, InputError, "index.json holds no JSON object")
    path.write_text("{}")
    refused(folder, InputError, "the index of shards cannot be read")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite(folder: Path, bad: float) -> None:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3, 5] = bad
        return tensor

    change_tensor(folder, QUERY, spoil)
    refused(folder, InputError, rf"{QUERY}: the tensor holds NaN or infinity; got 1 of 4096")


def test_wrong_shape_integers_missing_and_extra(folder: Path) -> None:
    change_tensor(folder, QUERY, lambda tensor: tensor[:-1].contiguous())
    refused(folder, InputError, r"wrong shape; got \[63, 64\], expected \[64, 64\]")
    change_tensor(folder, QUERY, lambda tensor: torch.zeros(64, 64, dtype=torch.int8))
    refused(folder, InputError, f"already quantised; got {QUERY} of type I8")
    change_tensor(folder, QUERY, lambda tensor: torch.zeros(64, 64))
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    held = index["weight_map"].pop(QUERY)
    path.write_text(json.dumps(index))
    tensors = load_file(folder / held)
    save_file({name: tensor for name, tensor in tensors.items() if name != QUERY}, folder / held)
    refused(folder, InputError, f"the tensor {QUERY} is missing")
    tensors |= {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}
    save_file(tensors, folder / held)
    index["weight_map"] |= {QUERY: held, "model.layers.0.self_attn.q_proj.bias": held}
    path.write_text(json.dumps(index))
    refused(folder, InputError, "holds a tensor that a LlamaForCausalLM does not use")


def test_config_that_cannot_be_used(folder: Path) -> None:
    edit(folder, "config.json", auto_map={"AutoModel": "x.Y"})
    refused(folder, InputError, r"run code of its own \(auto_map\), which is refused")
    (folder / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    refused(
        folder, InputError, "'GPT2LMHeadModel' is not supported; expected one of Gemma3ForCausalLM, Gemma4ForCausalLM"
    )
    (folder / "config.json").write_text('{"quantization_config": {}}')
    refused(folder, InputError, "already quantised")
    (folder / "config.json").write_text("{")
    refused(folder, InputError, "config.json is not valid JSON")
    (folder / "config.json").write_text('{"model_type": "nonsense"}')
    refused(folder, InputError, "no usable 'model_type'; got 'nonsense', expected one of gemma3_text, gemma4_text")
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 65}')
    refused(folder, InputError, "transformers cannot read the config")
    (folder / "config.json").unlink()
    refused(folder, InputError, "the folder holds no config.json")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"mlp_bias": True}, "mlp_bias=true is not supported"),
        ({"num_hidden_layers": 10**6}, "no usable 'num_hidden_layers'"),
        ({"num_key_value_heads": 3}, "the heads do not divide evenly"),
    ],
)
def test_config_with_an_impossible_number(folder: Path, change: dict[str, object], match: str) -> None:
    edit(folder, "config.json", **change)
    refused(folder, InputError, match)


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    refused("no such model!", RequestError, "there is no such model")
    refused("org/model", RequestError, "not in the local hub cache and could not be fetched")
    refused(tmp_path / "none.gguf", RequestError, "there is no such GGUF file")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    refused(tmp_path / "bad.gguf", InputError, "the GGUF file is truncated or damaged")


def test_no_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    refused(folder, InputError, "the folder holds no safetensors weights")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_it_is(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = tiny_model(tmp_path / "model", dtype=dtype)
    expected = load_file(folder / "model.safetensors")[QUERY].float().numpy()
    with open_model(str(folder)) as model:
        np.testing.assert_array_equal(model.read(QUERY), expected)


def test_gguf_source_is_the_model_it_was_made_from(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    target = load_target("gguf")
    with open_model(str(folder)) as model:
        artifact = lower(
            target, Compression(model, target.decide(model, "F32", "rtn")), "F32", tmp_path / "out"
        ).artifact
        with open_model(str(artifact.weights[0])) as again:
            assert not again.warnings
            for group in model.groups():
                np.testing.assert_array_equal(again.read(group.name), model.read(group.name))
    data = artifact.weights[0].read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in (5, 20, 30, 200, 2000, len(data) // 2, len(data) - 100):
        cut.write_bytes(data[:length])
        refused(cut, InputError, "truncated or damaged|cannot read|missing|not supported")


def test_a_sliding_window_bounds_the_context(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", "mistral")
    edit(folder, "config.json", sliding_window=256)
    with open_model(str(folder)) as model:
        assert model.decoder.context_length == 256
    with pytest.raises(RequestError, match="the context is longer than the model's; got 512, expected at most 256"):
        plan(Job(str(folder), "raspberry-pi-5", "gguf"))
    edit(folder, "config.json", sliding_window=None)
    with open_model(str(folder)) as model:
        assert model.decoder.context_length == 1024
