"""How quickly llama.cpp multiplies with each type, against Q4_0, on the cores of this machine.

    .venv/bin/python -m pytest tests/benchmarks/test_llama_kernels.py --timeout=0 -s

Models that are nearly all matrices, too large for the caches, every matrix in one type, by turns with the same model in
Q4_0. A figure is the products a second over those of Q4_0 with many tokens at once, as `exporter.targets.gguf.kernels`
holds them.
"""

from pathlib import Path
from statistics import median
from tempfile import mkdtemp

from exporter.calibrate.statistics import collect
from exporter.calibrate.text import file_windows
from exporter.compress.compressed import CompressedModel
from exporter.model.sources import open_model
from exporter.model.tokenizer import load_tokenizer
from exporter.targets.artifact import Artifact, open_artifact
from exporter.targets.gguf.kernels import ON_X86
from exporter.targets.gguf.target import ALPHABET
from exporter.targets.target import load_target
from tests.benchmarks.measured import THREADS
from tests.models import VOCAB, tiny_model

HIDDEN, INTERMEDIATE, LAYERS = 2048, 8192, 2
PROMPT, DECODE, ROUNDS = 256, 32, 7
BASELINE = "Q4_0"
# Products with a matrix, of all matrices but the embedding, for each token.
PRODUCTS = LAYERS * (3 * HIDDEN * INTERMEDIATE + 3 * HIDDEN * HIDDEN)
WITHIN = 0.35


def test_speed_of_every_type(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", hidden=HIDDEN, intermediate=INTERMEDIATE, layers=LAYERS)
    text = tmp_path / "text.txt"
    text.write_text("the capital of France is Paris, numbers 12 345 and hello world. " * 200, "utf-8")
    target = load_target("gguf")
    with open_model(str(folder)) as model:
        windows = file_windows(text, load_tokenizer(model.folder), 4, 64)
        statistics = collect(model, windows, 0, lambda done, total: None)

        def made(type: str) -> Artifact:
            to = Path(mkdtemp(dir=tmp_path))
            return target.lower(CompressedModel(model, target.decide(model, type, "rtn"), statistics), type, to)

        prompt = [token % VOCAB for token in range(PROMPT)]
        with open_artifact(made(BASELINE), PROMPT + DECODE + 1, THREADS) as base:
            far = []
            for type in (*ALPHABET, "F16", "F32"):
                with open_artifact(made(type), PROMPT + DECODE + 1, THREADS) as other:
                    rounds = [[one.call("measure", prompt, DECODE, 1) for one in (base, other)] for _ in range(ROUNDS)]
                prefill = median(other.prefill_tokens_per_s / base.prefill_tokens_per_s for base, other in rounds)
                decode = median(other.decode_tokens_per_s / base.prefill_tokens_per_s for base, other in rounds)
                rate = median(base.prefill_tokens_per_s for base, _ in rounds) * PRODUCTS
                print(
                    f'    "{type}": Throughput({decode:.3f}, {prefill:.2f}),  # {rate / 1e9:.0f} G products/s in Q4_0'
                )
                held = ON_X86.get(type)
                if held is None or max(abs(decode / held.decode - 1), abs(prefill / held.prefill - 1)) > WITHIN:
                    far.append(type)
    assert not far, "the table in exporter.targets.gguf.kernels is not of such a machine"
