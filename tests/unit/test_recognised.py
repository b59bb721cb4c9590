"""Folders that hold something else than a model of floating-point weights: named, with a next step that helps."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from exporter.foundation.errors import InputError
from exporter.model.sources import open_model
from tests.folders import Tensors, edit, float_kl, rewrite
from tests.models import tiny_model

BEFORE = "give the model before quantisation"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model")


def refused(folder: Path, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught, open_model(str(folder)):
        pass
    assert "fetch" not in str(caught.value)
    assert caught.value.exit_code == 3


def packed(endings: dict[str, torch.Tensor]) -> Callable[[Tensors], Tensors]:
    """Return what puts tensors of these endings in the place of matrices."""

    def change(tensors: Tensors) -> Tensors:
        kept = {name: one for name, one in tensors.items() if not name.endswith("_proj.weight")}
        stems = [name.removesuffix(".weight") for name in tensors if name not in kept]
        return kept | {stem + end: one.clone() for stem in stems for end, one in endings.items()}

    return change


INTEGERS = torch.zeros(8, 8, dtype=torch.int32)
ONES = torch.ones(8)
KINDS = {
    "GPTQ": packed({".qweight": INTEGERS, ".qzeros": INTEGERS, ".scales": ONES, ".g_idx": INTEGERS}),
    "GPTQ or AWQ": packed({".qweight": INTEGERS, ".qzeros": INTEGERS, ".scales": ONES}),
    "bitsandbytes": packed({".weight": INTEGERS.byte(), ".weight.absmax": ONES, ".weight.quant_map": ONES}),
    "compressed-tensors": packed({".weight_packed": INTEGERS, ".weight_scale": ONES, ".weight_shape": INTEGERS}),
    "FP8 with scales": packed({".weight": torch.zeros(64, 64, dtype=torch.float8_e4m3fn), ".weight_scale_inv": ONES}),
    "MLX": packed({".weight": INTEGERS.view(torch.uint32), ".scales": ONES, ".biases": ONES}),
    "HQQ": packed({".W_q": INTEGERS.byte(), ".scale": ONES, ".zero": ONES}),
}


@pytest.mark.parametrize("method", KINDS)
def test_quantised_weights_are_known_by_their_tensors(folder: Path, method: str) -> None:
    rewrite(folder, KINDS[method])
    refused(folder, rf"the weights are already quantised \({method}\); got a tensor model\.layers.*; {BEFORE}")


def test_integers_of_no_known_method(folder: Path) -> None:
    rewrite(folder, packed({".weight": INTEGERS.short()}))
    refused(folder, rf"already quantised; got model\.layers\.0\..*\.weight of type I16; {BEFORE}")


@pytest.mark.parametrize(
    ("file", "settings", "method"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 128}, "GPTQ"),
        ("quantize_config.json", {"quant_method": "awq"}, "AWQ"),
        ("quant_config.json", {"w_bit": 4}, "AWQ"),
        ("hf_quant_config.json", {"producer": {}}, "NVIDIA ModelOpt"),
    ],
)
def test_a_file_of_the_quantiser_names_the_method(
    folder: Path, file: str, settings: dict[str, object], method: str
) -> None:
    (folder / file).write_text(json.dumps(settings))
    with open_model(str(folder)) as model:
        assert not model.warnings
    rewrite(folder, KINDS["GPTQ or AWQ"])
    refused(folder, rf"already quantised \({method}\)")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            r"quantised \(GPTQ\); got quantization_config in",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantised \(AWQ\)"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantised \(FP8 with scales\)"),
        ({"quantization_config": {"load_in_4bit": True}}, r"quantised \(bitsandbytes\)"),
        ({"quantization_config": {"quant_method": "brand-new"}}, r"quantised \('brand-new'\)"),
        ({"quantization_config": {}}, "quantised; got"),
        ({"compression_config": {"format": "int-quantized"}}, r"quantised \(compressed-tensors\)"),
        ({"quantization": {"group_size": 64, "bits": 4}}, r"quantised \(MLX\)"),
    ],
)
def test_quantised_weights_are_known_by_config_json(folder: Path, settings: dict[str, object], told: str) -> None:
    refused(edit(folder, **settings), rf"{told}.*; {BEFORE}")


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_null_stands_for_weights_that_are_not_quantised(folder: Path, target: str) -> None:
    edit(folder, quantization_config=None, compression_config=None, quantization=None)
    assert float_kl(folder, target) < 1e-6


def test_an_adapter_beside_a_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    refused(
        folder, "adapter_config.json: the folder holds a model and beside it an adapter; expected one of them; move"
    )


@pytest.mark.parametrize(
    ("file", "told"),
    [
        (
            "pytorch_model.bin",
            "weights in pickles, pytorch_model.bin, which may run code .* save it with save_pretrained",
        ),
        ("pytorch_model-00001-of-00002.bin", "weights in pickles, pytorch_model-00001-of-00002.bin"),
        ("consolidated.00.pth", "weights in pickles, consolidated.00.pth"),
        ("model-q4.gguf", "a GGUF file, model-q4.gguf; .*; give that file itself"),
        ("model.onnx", "an ONNX model, model.onnx, .*; give the model that it was made from"),
        ("onnx/model.onnx", "an ONNX model, onnx/model.onnx"),
        ("model.fp16.safetensors", "a variant alone, model.fp16.safetensors"),
        ("consolidated.safetensors", "Mistral's own format, consolidated.safetensors"),
        ("tf_model.h5", "TensorFlow weights"),
        ("shard-00000-model-00001-of-00001.safetensors", "a distributed checkpoint"),
    ],
)
def test_weights_of_other_kinds(folder: Path, file: str, told: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(bytes(8))
    refused(folder, told)


def test_a_folder_with_nothing_but_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    refused(tmp_path, "the folder holds a GGUF file, a.gguf; .*; give that file itself")
    (tmp_path / "a.gguf").unlink()
    refused(tmp_path, "the folder holds no config.json; give a Hugging Face model folder")


def test_weights_of_every_floating_type_are_read(tmp_path: Path) -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2):
        folder = tiny_model(tmp_path / str(dtype), dtype=torch.bfloat16)
        rewrite(folder, lambda held, dtype=dtype: {name: one.to(dtype) for name, one in held.items()})  # type: ignore[misc]
        with open_model(str(folder)) as model:
            assert model.read("model.norm.weight").dtype == np.float32
