"""Types with blocks of 256, which fit no matrix but the down projections of the reference model, whose width is 576.

    .venv/bin/python -m pytest tests/benchmarks/test_widths.py --timeout=0 -s

measures them on a model of width 768 that computes what the reference model does (`tests/widths.py` says what that
leaves out of the picture), and on a small Qwen3 trained from a seed. Opponents' rows are kept in quality.json.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from exporter.model.sources import open_model
from exporter.model.tokenizer import load_tokenizer
from exporter.targets.artifact import Artifact
from exporter.targets.contract import load_target
from exporter.targets.gguf.formats.ggml import ggml_format
from tests.benchmarks import llama_opponents
from tests.benchmarks.bench import Bench, Conditions
from tests.benchmarks.rows import Row
from tests.commands import printed
from tests.reference import plain_texts, reference_model
from tests.widths import BLOCK, bytes_below_small_blocks, embedded, perplexity, trained_qwen3

EMBEDDED = Conditions("seed 0 in width 768, prose", 0, "prose")
TRAINED = Conditions("Qwen3 trained from seed 0, prose", 0, "prose")
LIMIT = 0.5
PACKED = Conditions("Qwen3 trained from seed 0, packed, prose", 0, "prose")
# llama.cpp's names of the mixes that have one type for almost all matrices, where it is not the type's own.
STOCK_TYPES = {"Q3_K": "Q3_K_S", "Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S"}
TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ3_S", "IQ3_XXS")
STEPS = 500


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    scratch = tmp_path_factory.mktemp("reference")
    source = reference_model(scratch / "model", EMBEDDED.seed)
    return source, embedded(source, scratch / "wide", EMBEDDED.seed)


@torch.inference_mode()
def test_the_wide_model_computes_what_the_reference_model_does(folders: tuple[Path, Path], tmp_path: Path) -> None:
    text = plain_texts(tmp_path)[1].read_text("utf-8")[:4000]
    tokens = torch.tensor([load_tokenizer(folders[0]).ids(text)[:256]])
    expected, found = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits for folder in folders
    )
    apart = (expected - found).abs().max()
    print(f"\nlogits of up to {expected.abs().max():.1f} differ by at most {apart:.1g}")
    assert apart < 1e-3


def test_less_kl_than_stock_in_width_768(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with open_model(str(folders[1])) as model:
        assert all(group.columns % BLOCK == 0 for group in model.groups())
        bench = Bench(EMBEDDED, model, tmp_path)
        stock = [bench.llama(name, "stock", name) for name in llama_opponents.MIXES]
        exporter = bench.exporter("gguf")
        ours = [bench.ours(exporter, f"at {row.name}", row.file_bytes) for row in stock]
        bench.finish()
    assert table(stock, ours) <= LIMIT


def table(stock: list[Row], ours: list[Row]) -> float:
    """Print rows side by side and return the largest ratio of KL."""
    print(f"\n{'':10} {'bytes':>11} {'ours':>8} {'predicted':>8} {'stock':>8} {'ratio':>6}")
    for theirs, row in zip(stock, ours, strict=True):
        predicted = "" if row.predicted is None else f"{row.predicted:.4f}"
        figures = f"{row.kl_mean:8.4f} {predicted:>8} {theirs.kl_mean:8.4f} {row.kl_mean / theirs.kl_mean:6.3f}"
        print(f"{theirs.name:10} {theirs.file_bytes:11,} {figures}")
    return max(row.kl_mean / theirs.kl_mean for theirs, row in zip(stock, ours, strict=True))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scratch = tmp_path_factory.mktemp("trained")
    text, held_out = (path.read_text("utf-8") for path in plain_texts(scratch))
    untrained, trained = (
        perplexity(trained_qwen3(scratch / f"qwen3-{steps}", text, steps), held_out) for steps in (0, STEPS)
    )
    print(f"\nperplexity on text it was not trained on: {untrained:.0f} untrained, {trained:.0f} after {STEPS} steps")
    assert trained < 0.2 * untrained
    return scratch / f"qwen3-{STEPS}"


@pytest.fixture
def bench(qwen3: Path, tmp_path: Path) -> Iterator[Bench]:
    with open_model(str(qwen3)) as model:
        yield Bench(TRAINED, model, tmp_path)


def test_every_type_loses_less_than_stock_makes_it_lose(bench: Bench) -> None:
    stock = [bench.llama(name, "stock", f"token_embd=Q8_0 {STOCK_TYPES.get(name, name)}") for name in TYPES]
    exporter = bench.exporter("gguf")
    ours = [bench.alike(exporter, name, "Q8_0") for name in TYPES]
    bench.finish()
    assert all(row.file_bytes <= theirs.file_bytes for theirs, row in zip(stock, ours, strict=True))
    assert table(stock, ours) < 1


def test_the_command_line_beats_stock_on_a_trained_qwen3(qwen3: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen3, tmp_path / "qwen3")
    plain_texts(tmp_path)
    with open_model(str(qwen3)) as model:
        bench = Bench(PACKED, model, tmp_path)
        stock = bench.llama("Q4_K_M", "stock", "Q4_K_M")
        budgets = {"at Q4_K_M": stock.file_bytes, "below blocks of 32": bytes_below_small_blocks(model)}
        rows = [packed(bench, tmp_path, name, most) for name, most in budgets.items()]
        bench.finish()
    table([stock, stock], rows)
    assert all(row.file_bytes <= stock.file_bytes for row in rows)
    assert all(row.kl_mean < stock.kl_mean for row in rows)


def packed(bench: Bench, folder: Path, name: str, most: int) -> Row:
    """Build a bundle by the command line, see that it answers and has types with blocks of 256, and measure it."""
    out = name.replace(" ", "-")
    asked = ["--device", "galaxy-s24-ultra", "--target", "gguf", "--max-file-bytes", str(most)]
    facts = json.loads(
        printed(folder, "build", "qwen3", *asked, "--calibration", "calibration.txt", "-o", out, "--json")
    )
    assert facts["verdict"] == "passed"
    assert printed(folder, "run", out, "-p", "The class of an object is").strip()
    artifact = Artifact("gguf", folder / out / "model", (folder / out / "model/model.gguf",))
    stored = Counter(load_target("gguf").stored_types(artifact, bench.model).values())
    print(f"  {name}: {dict(stored)}")
    assert any(ggml_format(kind).block_columns == BLOCK for kind in stored)
    return bench.packed(artifact, name)
