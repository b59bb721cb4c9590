"""How quickly llama.cpp multiplies with each type, against Q4_0, on the cores of this machine.

    .venv/bin/python -m pytest tests/benchmarks/test_llama_kernels.py --timeout=0 -s

What a kernel takes depends on the shape, so types are timed in the reference model's own matrices: all in Q4_0, by
turns with the same model of which one part has another type. The part is all matrices of layers but the down
projections, then these, and then the head; types of 256 weights a block fit the down projections only. What a weight
takes is Q4_0's plus the difference; Q4_0's own is what each weight more takes in a random model with feed-forwards
twice as wide. A figure is the products a second over those of Q4_0 with many tokens at once, as
`targets/gguf/kernel_speeds` holds them; for one token it is what the file has for Q4_0 times the type's ratio to it.
"""

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import mkdtemp

from exporter.calibrate.statistics import Statistics, collect
from exporter.calibrate.windows import file_windows
from exporter.compress.compression import Compression
from exporter.formats.group import WeightGroup
from exporter.model.model import Model
from exporter.model.sources import open_model
from exporter.model.tokenizer import load_tokenizer
from exporter.predict.peak_memory import host_features
from exporter.predict.roofline import Throughput
from exporter.targets.artifact import Artifact
from exporter.targets.contract import load_target, lower
from exporter.targets.gguf.formats.ggml import ggml_format
from exporter.targets.gguf.target import ALPHABET
from exporter.targets.kernel_speeds import speeds_on
from tests.benchmarks.measured import by_turns
from tests.benchmarks.ours import silent
from tests.models import VOCAB, tiny_model
from tests.reference import reference_model

# Of the random models, as of the reference model.
HIDDEN, INTERMEDIATE, LAYERS = 576, 1536, 30
PROMPT, DECODE, LOADS, ROUNDS = 256, 32, 3, 5
BASELINE = "Q4_0"
WITHIN = 0.35


@dataclass(frozen=True)
class Seconds:
    """What a token takes, or a weight of it: one at a time, and among many."""

    decode: float
    prefill: float

    def of(self, weights: int) -> "Seconds":
        return Seconds(self.decode / weights, self.prefill / weights)


def test_speed_of_every_type(tmp_path: Path) -> None:
    known, far = speeds_on("exporter.targets.gguf", host_features()), []
    own = _own_seconds(tmp_path)
    print(f"\n{BASELINE}: {own.decode * 1e12:.1f} ps a weight, {1e-9 / own.prefill:.0f} G products/s with many")
    with open_model(str(reference_model(tmp_path / "reference"))) as model:
        statistics = _seen(model, tmp_path)
        base = _in_types(model, statistics, tmp_path, lambda group: BASELINE)
        narrow = min(group.columns for group in model.groups())

        def in_layers(type: str) -> Callable[[WeightGroup], bool]:
            return _elsewhere if ggml_format(type).fits(narrow) else _in_down

        everywhere = [type for type in ALPHABET if ggml_format(type).fits(narrow)]
        places = [("layers", type, in_layers(type)) for type in (*ALPHABET, "F16", "F32")]
        places += [("down", type, _in_down) for type in everywhere]
        places += [("head", type, _in_head) for type in everywhere]
        for place, type, has in places:
            made = _in_types(
                model, statistics, tmp_path, lambda group, type=type, has=has: type if has(group) else BASELINE
            )
            changed = [group for group in model.groups() if has(group)]
            more = _more_seconds(base, made).of(sum(group.size for group in changed))
            shutil.rmtree(made.folder)
            beside = own.decode / (own.decode + more.decode)
            found = Throughput(beside * known[BASELINE].decode, own.prefill / (own.prefill + more.prefill))
            print(f'  {place:6}  "{type}": Throughput({found.decode:.4f}, {found.prefill:.2f}),  ', end="")
            print(f"# {more.decode * 1e12:+.1f} ps", flush=True)
            held = known[type]
            slower = found.decode / held.decode, found.prefill / held.prefill
            # Of a prompt only the last token goes through the head.
            if max(abs(one - 1) for one in slower[: 1 if place == "head" else 2]) > WITHIN:
                far.append((place, type))
    assert not far, "no file in targets/gguf/kernel_speeds is of such a machine"


def _in_head(group: WeightGroup) -> bool:
    return group.layer is None


def _in_down(group: WeightGroup) -> bool:
    return group.role == "down"


def _elsewhere(group: WeightGroup) -> bool:
    return not _in_head(group) and not _in_down(group)


def _own_seconds(folder: Path) -> Seconds:
    """Return what a weight takes in the type that all others are compared with."""
    with ExitStack() as stack:
        model, wider = (
            stack.enter_context(
                open_model(str(tiny_model(folder / f"{width}", hidden=HIDDEN, intermediate=width, layers=LAYERS)))
            )
            for width in (INTERMEDIATE, 2 * INTERMEDIATE)
        )
        made = [_in_types(one, _seen(one, folder), folder, lambda group: BASELINE) for one in (model, wider)]
        added = sum(group.size for group in wider.groups()) - sum(group.size for group in model.groups())
    return _more_seconds(*made).of(added)


def _seen(model: Model, folder: Path) -> Statistics:
    """Return importance, which some types cannot do without."""
    text = folder / "text.txt"
    text.write_text("the capital of France is Paris, numbers 12 345 and hello world. " * 200, "utf-8")
    return collect(model, file_windows(text, load_tokenizer(model.folder), 4, 64), 0, silent)


def _in_types(model: Model, statistics: Statistics, folder: Path, type_of: Callable[[WeightGroup], str]) -> Artifact:
    target = load_target("gguf")
    decisions = [
        replace(decision, format=ggml_format(type_of(decision.group)))
        for decision in target.decide(model, BASELINE, "rtn")
    ]
    return lower(target, Compression(model, decisions, statistics), BASELINE, Path(mkdtemp(dir=folder))).artifact


def _more_seconds(one: Artifact, other: Artifact) -> Seconds:
    """Return by how much longer a token takes in the other."""
    rounds = by_turns([one, other], [token % VOCAB for token in range(PROMPT)], DECODE, LOADS, ROUNDS)
    return Seconds(
        median(1 / more.decode_tokens_per_s - 1 / less.decode_tokens_per_s for less, more in rounds),
        median(1 / more.prefill_tokens_per_s - 1 / less.prefill_tokens_per_s for less, more in rounds),
    )
