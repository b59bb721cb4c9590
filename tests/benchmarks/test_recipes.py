"""Every named recipe with its defaults, in both targets, and some at other sizes: what is shipped, and its KL.

    .venv/bin/python -m pytest tests/benchmarks/test_recipes.py --timeout=0 -s

builds bundles of the reference model at effort `balanced` and takes the figures from their reports, which are measured
in the real runtimes: on a model and a text that recipes were not tuned on, those of test_quality.py, whose rows are
drawn beside them. Each row is kept in recipes.json when it is there, so that an interrupted run goes on.
"""

import shutil
from dataclasses import dataclass
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from exporter import pipeline
from exporter.calibrate.windows import Tokens, file_windows
from exporter.compress.compression import Compression
from exporter.model.model import Model
from exporter.model.sources import open_model
from exporter.model.tokenizer import load_tokenizer
from exporter.planning.job import Job
from exporter.planning.recipe import recipe_names
from exporter.prove.accuracy import Reference, dequantised, distance
from exporter.prove.proof import ROUNDING_SHARE, Proof, prove
from exporter.report.data import Report
from exporter.targets.contract import Lowered, Target, lower
from exporter.targets.opened import OpenedArtifact
from tests.benchmarks.bench import EVALUATION_WINDOWS, PUBLISHED, source_code
from tests.benchmarks.measured import THREADS, WINDOW, instructions
from tests.benchmarks.picture import Axis, picture
from tests.benchmarks.rows import BENCHMARKS, PARAMETERS, PICTURES, Published, Row
from tests.benchmarks.test_quality import UNTUNED
from tests.reference import plain_texts, reference_model

ROWS = Published(BENCHMARKS / "recipes.json")
PICTURE = PICTURES / "recipes.svg"
# Of each target the type of 8 bits: a model of them is what is least changed.
EIGHT_BITS = {"gguf": "Q8_0", "onnx": "int8"}
# What double compression is to be compared with: 4-bit weights with error feedback, as stored and coded.
FOUR_BITS = {
    "Q4_0, ldlq": {"type": "Q4_0", "method": "ldlq"},
    "Q4_0, ldlq, coded": {"type": "Q4_0", "method": "ldlq", "transport": "small"},
}
DEVICE = "core-ultra-200v"
# KL of pruning in closed form over PruneNet's, at most.
CLOSED_LIMIT = 0.6
# What the runtime's rounding adds, over what it adds to 8-bit weights, at most. A model that lost much is itself more
# sensitive (2-bit weights alone, at 2.8 nats, show five times what 8-bit weights do): where it adds more than to the
# original's weights in 8 bits, it is compared with what it adds to the artifact's own weights in 8 bits.
ROUNDING_LIMIT = 1.2


@dataclass(frozen=True)
class Point:
    """A recipe at another size than its own: name, target, and the options of its only step but transport."""

    name: str
    target: str
    step: str
    options: tuple[tuple[str, float], ...]
    coded: bool = False

    def written(self, folder: Path) -> Path:
        """Write the recipe into a folder."""
        lines = ["schema_version = 1", f'title = "{self.name}"', "", "[[step]]", f'method = "{self.step}"']
        lines += [f"{key} = {value}" for key, value in self.options]
        if self.coded:
            lines += ["", "[[step]]", 'method = "transport"', 'profile = "small"']
        path = folder / f"{self.name.replace(' ', '-').replace('%', 'percent').replace(',', '')}.toml"
        path.write_text("\n".join(lines) + "\n", "utf-8")
        return path


# What FOUR_BITS take when they are coded: 4.9 bits of everything that is shipped.
AS_CODED = 4.83
POINTS = (
    *(Point(f"rate {bits:g}", "gguf", "rate", (("bits", bits),), coded=True) for bits in (2.0, 2.5, 3.5, AS_CODED)),
    *(Point(f"double {bits:g}", "gguf", "double", (("bits", bits),), coded=True) for bits in (3.0, AS_CODED)),
)


@dataclass(frozen=True)
class World:
    """The model, the texts, and what figures depend on."""

    folder: Path
    calibration: Path
    evaluation: Path
    identity: dict[str, Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = reference_model(tmp_path_factory.mktemp("reference") / "model", UNTUNED.seed)
    texts = tmp_path_factory.mktemp("texts")
    calibration, _ = plain_texts(texts)
    evaluation = source_code(texts)
    with open_model(str(folder)) as model:
        windows = file_windows(evaluation, load_tokenizer(model.folder), EVALUATION_WINDOWS, WINDOW)
        identity = {"model": model.digest, "evaluation": windows.digest, "machine": instructions()}
    return World(folder, calibration, evaluation, identity)


@dataclass
class Prover:
    """Proves an artifact as the exporter does; where the runtime's rounding adds much, its weights in 8 bits, too.

    Attributes:
        much: KL in nats.
        in_8_bits: What the runtime's rounding adds to the same weights in 8 bits; None where it does not add much.
    """

    much: float
    in_8_bits: float | None = None

    def __call__(self, target: Target, lowered: Lowered, tokens: Tokens, *others: Any) -> Proof:
        """Stand in for `exporter.prove.proof.prove`."""
        proof = prove(target, lowered, tokens, *others)
        if proof.rounding.kl_mean > self.much:
            model = lowered.compression.model
            model = dequantised(model, target.read_back(lowered.artifact, model))
            self.in_8_bits = rounding_in_8_bits(target, model, tokens[: -(-len(tokens) // ROUNDING_SHARE)])
        return proof


def rounding_in_8_bits(target: Target, model: Model, tokens: Tokens) -> float:
    """Return what the runtime's rounding adds to a model's weights in 8 bits, in nats a token."""
    type = EIGHT_BITS[target.name]
    with TemporaryDirectory() as scratch:
        artifact = lower(target, Compression(model, target.decide(model, type, "rtn")), type, Path(scratch)).artifact
        own = Reference.of(dequantised(model, target.read_back(artifact, model)), tokens)
        with OpenedArtifact(artifact, WINDOW, THREADS) as child:
            return distance(own, child.logits).kl_mean


def row(name: str, kind: str, report: Report, in_8_bits: float | None) -> Row:
    size, accuracy = report.size, report.accuracy
    shipped = size.coded_bytes or size.file_bytes
    return Row(
        name,
        kind,
        report.target,
        int(shipped.value),
        accuracy.kl_mean.value,
        accuracy.top1_agreement.value,
        accuracy.predicted_kl.value,
        accuracy.runtime_rounding_kl.value,
        in_8_bits,
    )


def built(
    world: World, name: str, target: str, scratch: Path, kind: str, request: dict[str, Any], prover: Prover
) -> Row:
    """Return the row of what is asked for, from the file if it is there."""
    conditions = f"{name}, {target}"
    if known := ROWS.rows(conditions, world.identity):
        return known[0]
    output = scratch / "bundle"
    job = Job(
        str(world.folder), DEVICE, target, output=output, threads=THREADS, calibration=world.calibration,
        evaluation=world.evaluation, evaluation_windows=EVALUATION_WINDOWS, **request,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "prove", prover)
        found = row(name, kind, pipeline.build(job).report, prover.in_8_bits)
    shutil.rmtree(output)
    ROWS.keep(conditions, world.identity, [found])
    return found


def test_recipes_where_they_stand(world: World, tmp_path: Path) -> None:
    asked: list[tuple[str, str, str, dict[str, Any]]]
    asked = [(type, target, "ours", {"type": type}) for target, type in EIGHT_BITS.items()]
    asked += [(name, target, "recipe", {"recipe": name}) for name in recipe_names() for target in EIGHT_BITS]
    asked += [(name, "gguf", "recipe", request) for name, request in FOUR_BITS.items()]
    asked += [(one.name, one.target, "recipe", {"recipe": str(one.written(tmp_path))}) for one in POINTS]
    rows: list[Row] = []
    most = dict.fromkeys(EIGHT_BITS, inf)
    print(f"\n{UNTUNED.name}: {EVALUATION_WINDOWS} windows of {WINDOW} tokens")
    for name, target, kind, request in asked:
        found = built(world, name, target, tmp_path, kind, request, Prover(most[target]))
        rows.append(found)
        assert found.rounding is not None
        if name == EIGHT_BITS[target]:
            most[target] = ROUNDING_LIMIT * found.rounding
        print(
            f"  {target:4} {found.file_bytes:11,} bytes  KL {found.kl_mean:.4f}, of it by the runtime's rounding "
            f"{found.rounding:.4f} ({found.rounding_in_8_bits}) {found.top1:.1%}  {name}",
            flush=True,
        )
    with open_model(str(world.folder)) as model:
        assert model.decoder.parameters == PARAMETERS
    PICTURE.write_text(picture([*rows, *stock_and_ours()], Axis.bits(PARAMETERS)), "utf-8")
    kl = {(one.name, one.target): one.kl_mean for one in rows}
    for one in rows:
        allowed = max(most[one.target], ROUNDING_LIMIT * (one.rounding_in_8_bits or 0))
        assert one.rounding is not None and one.rounding <= allowed, one
    for target in EIGHT_BITS:
        assert kl["prune-closed-form", target] <= CLOSED_LIMIT * kl["prunenet", target]
        (caldera,) = (one for one in rows if (one.name, one.target) == ("caldera", target))
        rates = [one for one in rows if one.name.startswith("rate") and one.target == target]
        assert min(one.kl_mean for one in rates if one.file_bytes < caldera.file_bytes) < caldera.kl_mean
    assert kl[f"double {AS_CODED:g}", "gguf"] < kl["Q4_0, ldlq, coded", "gguf"]


def stock_and_ours() -> list[Row]:
    """Return the rows of test_quality.py on the same model and text, without those that restrict the embedding."""
    rows = [one for one in PUBLISHED.latest(UNTUNED.name) if one.kind in ("ours", "stock")]
    if not rows:
        pytest.fail("run tests/benchmarks/test_quality.py first: the picture needs its rows")
    return [one for one in rows if "embedding" not in one.name and "budget" not in one.name]
