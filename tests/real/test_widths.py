"""A small Qwen3 trained from a seed, whose every width divides by 256, through the command line into both targets."""

import json
from pathlib import Path
from typing import Any

import pytest

from exporter.model.sources import open_model
from tests.commands import printed
from tests.reference import plain_texts
from tests.widths import bytes_below_small_blocks, perplexity, trained_qwen3

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]
STEPS = 80


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    text, held_out = (path.read_text("utf-8") for path in plain_texts(folder))
    untrained, trained = (
        perplexity(trained_qwen3(folder / name, text, steps), held_out, windows=4)
        for name, steps in (("untrained", 0), ("qwen3", STEPS))
    )
    assert trained < 0.4 * untrained
    return folder


def built(folder: Path, name: str, *options: str) -> dict[str, Any]:
    asked = ["build", "qwen3", "--calibration", "calibration.txt", "--evaluation", "evaluation.txt", "-o", name]
    return json.loads(printed(folder, *asked, "--effort", "fast", "--json", *options))  # type: ignore[no-any-return]


def test_types_with_blocks_of_256_beat_stock_in_fewer_bytes(folder: Path) -> None:
    with open_model(str(folder / "qwen3")) as model:
        most = bytes_below_small_blocks(model)
    on = ("--device", "galaxy-s24-ultra", "--target", "gguf")
    stock = built(folder, "stock", *on, "--type", "Q4_K_M", "--method", "rtn")
    ours = built(folder, "ours", *on, "--max-file-bytes", str(most))
    kl, stock_kl = (facts["accuracy"]["kl_mean"]["value"] for facts in (ours, stock))
    size, stock_size = (facts["size"]["file_bytes"]["value"] for facts in (ours, stock))
    types = {tensor["format"] for tensor in ours["tensors"]}
    print(f"\nKL {kl:.4f} in {size:,} bytes with {sorted(types)}; stock Q4_K_M: {stock_kl:.4f} in {stock_size:,}")
    assert types & {"IQ2_XXS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K"}
    assert ours["verdict"] == "passed"
    assert size <= stock_size
    assert kl < stock_kl
    printed(folder, "verify", "ours")
    assert printed(folder, "run", "ours", "-p", "The class of an object is").strip()


def test_onnx_takes_the_same_widths(folder: Path) -> None:
    facts = built(folder, "onnx", "--device", "core-ultra-200v", "--target", "onnx", "--bits", "6")
    assert facts["verdict"] == "passed"
    assert facts["accuracy"]["kl_mean"]["value"] < 0.1
    assert printed(folder, "run", "onnx", "-p", "The class of an object is").strip()
