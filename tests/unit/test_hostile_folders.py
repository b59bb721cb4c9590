"""Files of a model folder with any content: opening and planning end in one sentence, or the model is read."""

import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from exporter.foundation.errors import ExporterError
from exporter.model.sources import open_model
from exporter.planning.job import Job
from exporter.planning.resolve import resolve
from exporter.targets.contract import load_target
from tests.models import FAMILIES, tiny_model

pytestmark = pytest.mark.slow

DEEP = b"[" * 60 + b"]" * 60
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 0.0, -0.5, 1e-320, 1e400, float("nan"), float("inf"), 2**31, 2**63, 10**40,
    "", "x", "0", "silu\n", "\x00", "é" * 200, "{" * 100,
    [], [None], [[]], [1, "a"], ["full_attention"], ["x"] * 3000,
    {}, {"a": {"b": []}}, {"rope_type": "yarn"}, {"rope_type": ["yarn"]}, {"type": "llama3", "factor": 0},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1, "rope_theta": 1},
    {"rope_theta": None}, {"__float__": "NaN"}, {"full_attention": {"rope_type": "default"}},
)  # fmt: skip
# Keys that transformers reads in some config, besides those of the models here.
OTHERS = (
    "__class__", "architectures", "attn_implementation", "attribute_map", "auto_map", "compression_config",
    "configuration_files", "distributed_config", "dtype", "fusion_config", "id2label", "layer_types", "model_type",
    "name_or_path", "num_labels", "num_local_experts", "original_max_position_embeddings", "output_attentions",
    "pad_token_id", "partial_rotary_factor", "per_layer_config", "quantization", "quantization_config", "return_dict",
    "rope_scaling", "rope_theta", "sliding_window", "sub_configs", "text_config", "to_dict", "torch_dtype",
    "transformers_weights", "use_sliding_window",
)  # fmt: skip
NOT_OBJECTS = (b"", b"null", b"[]", b"3", b'"x"', b"{", b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"{}" * 2, b'{"a":' * 5000,
               b'{"a":' + b"9" * 5000 + b"}", b'{"a": "\\ud800"}', b"\x00" * 100)  # fmt: skip
CONFIGS_PER_FAMILY = 300


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a folder for each family, with a file that the hub has beside many models."""
    made = {family: tiny_model(tmp_path_factory.mktemp(family) / "model", family, shards=2) for family in FAMILIES}
    for folder in made.values():
        (folder / "generation_config.json").write_text("{}")
    return made


def ends_in_a_sentence(folder: Path) -> bool:
    """Return whether the folder is refused; any other exception than the product's own fails the test."""
    try:
        with open_model(str(folder)) as model:
            # The plan for GGUF asks llama.cpp in a child process, which takes a second.
            load_target("gguf").as_stored(model)
            resolve(Job(str(folder), "raspberry-pi-5", "onnx", "int8", context=64), model).draft()
    except ExporterError as error:
        assert error.exit_code in (2, 3), error
        assert len(str(error)) < 2000
        assert len(str(error).splitlines()) == 1
        return True
    return False


def changed(config: dict[str, Any], chance: random.Random) -> bytes:
    """Return a config.json with one to three keys of strange values, missing, or twice."""
    made = dict(config)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        key, value = chance.choice((*made, *OTHERS)), chance.choice(STRANGE)
        rope = made.get("rope_parameters")
        if chance.random() < 0.1:
            made.pop(key, None)
        elif chance.random() < 0.3 and isinstance(rope, dict):
            kind = chance.choice(("default", "linear", "dynamic", "yarn", "llama3", "longrope", "x"))
            names = ("factor", "rope_theta", "beta_fast", "low_freq_factor", "original_max_position_embeddings", "type")
            made["rope_parameters"] = {"rope_theta": 1e4, "factor": 2.0, "rope_type": kind, chance.choice(names): value}
        else:
            made[key] = value
    text = json.dumps(made)
    if chance.random() < 0.05:
        text = text[:-1] + f', "{chance.choice((*made, "x"))}": {DEEP.decode()}' + "}"
    return text.encode()


@pytest.mark.parametrize("family", FAMILIES)
def test_config_of_any_content(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    folder = Path(shutil.copytree(folders[family], tmp_path / "model"))
    path, chance = folder / "config.json", random.Random(family)
    config = json.loads(path.read_text())
    refused = 0
    for _ in range(CONFIGS_PER_FAMILY):
        path.write_bytes(changed(config, chance))
        refused += ends_in_a_sentence(folder)
    assert CONFIGS_PER_FAMILY // 2 < refused < CONFIGS_PER_FAMILY


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "adapter_config.json"])
def test_what_is_no_object_is_refused(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(folders["llama"], tmp_path / "model"))
    for content in NOT_OBJECTS:
        (folder / name).write_bytes(content)
        assert ends_in_a_sentence(folder), content


def test_other_json_of_any_content(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["qwen2"], tmp_path / "model"))
    for name in ("generation_config.json", "quantize_config.json"):
        for content in NOT_OBJECTS:
            (folder / name).write_bytes(content)
            ends_in_a_sentence(folder)
        for value in STRANGE:
            (folder / name).write_text(json.dumps({"eos_token_id": value, "quant_method": value, "bits": value}))
            ends_in_a_sentence(folder)
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for value in STRANGE:
        for content in ({"weight_map": value}, {"weight_map": {**weight_map, "model.norm.weight": value}}):
            (folder / "model.safetensors.index.json").write_text(json.dumps(content))
            assert ends_in_a_sentence(folder), content
    for value in STRANGE:
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": value, "base_model_name_or_path": value}))
        assert ends_in_a_sentence(folder), value


def headers() -> Iterator[bytes]:
    good = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    for bad in ({"shape": [2**62, 4]}, {"shape": [-1]}, {"dtype": "F31"}, {"dtype": "a\nb"},
                {"data_offsets": [0, 2**63]}, {"shape": None},
                {"data_offsets": [16, 0]}, {"data_offsets": []}, {"dtype": 3}):  # fmt: skip
        yield json.dumps({"model.norm.weight": good | bad}).encode()
    yield from (b"", b"{", b"[]", b"{}", b'{"a":' * 3000, b"\xff" * 40, b'{"__metadata__": 3}')
    yield json.dumps({"x" * 100_000: good, "\x00\n": good | {"data_offsets": [16, 32]}}).encode()


def test_safetensors_headers_of_any_content(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["llama"], tmp_path / "model"))
    for header in headers():
        for length in (len(header), len(header) + 1000, 2**63):
            (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + header + bytes(32))
            assert ends_in_a_sentence(folder), header[:200]


@pytest.mark.parametrize(
    "make", [Path.mkdir, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path)]
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "adapter_config.json"])
def test_what_is_no_file_is_not_read(
    folders: dict[str, Path], tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    folder = Path(shutil.copytree(folders["llama"], tmp_path / "model"))
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    ends_in_a_sentence(folder)
