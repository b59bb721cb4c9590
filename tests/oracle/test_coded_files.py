"""Coded files of real artifacts are restored bit by bit, and the targets carry the methods that are made for coding."""

from pathlib import Path

import numpy as np
import pytest

from exporter.calibrate.statistics import collect
from exporter.calibrate.windows import Windows
from exporter.coding.container import PROFILES, code_file, restore_file
from exporter.coding.layout import CODES, parts_of
from exporter.compress.checks import with_factors
from exporter.compress.compression import Compression
from exporter.compress.methods.coarse_int8 import coarse_int8_methods, in_scaled_channels
from exporter.compress.methods.entropy_constrained_int8 import entropy_constrained_methods, in_even_columns
from exporter.model.sources import open_model
from exporter.prove.accuracy import Reference, distance
from exporter.prove.lowering import Decoded, check_weights
from exporter.targets.coded_layout import layout_of
from exporter.targets.contract import load_target, low_rank, lower
from exporter.targets.opened import OpenedArtifact
from tests.models import tiny_model

RANK = 32
TOKENS = np.random.default_rng(0).integers(2, 200, (4, 48))
ARTIFACTS = [
    ("gguf", "Q8_0"), ("gguf", "Q4_0"), ("gguf", "Q5_1"), ("gguf", "IQ4_NL"), ("gguf", "Q4_K"), ("gguf", "Q6_K"),
    ("gguf", "Q2_K"), ("gguf", "Q3_K"), ("gguf", "Q5_K"), ("gguf", "IQ4_XS"), ("gguf", "IQ3_S"), ("gguf", "F16"),
    ("gguf", "F32"), ("onnx", "int8"), ("onnx", "int4"), ("onnx", "F32"), ("onnx-qdq", "a16w8"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model", hidden=256, intermediate=256, layers=1, tied=False)


@pytest.mark.parametrize(("target", "type"), ARTIFACTS)
def test_every_file_of_an_artifact_is_restored(folder: Path, tmp_path: Path, target: str, type: str) -> None:
    made = load_target(target)
    with open_model(str(folder)) as model:
        statistics = collect(model, Windows.of(TOKENS, "file", 0), 0, lambda done, total: None)
        decisions = made.decide(model, type, "rtn")
        artifact = lower(made, Compression(model, decisions, statistics), type, tmp_path).artifact
        weights = sum(decision.stored_bytes for decision in decisions)
    known = 0
    for path in artifact.weights:
        parts = list(parts_of(layout_of(path), path.stat().st_size, 1 << 20))
        assert sum(part.bytes for part in parts) == path.stat().st_size
        known += sum(part.bytes for part in parts if part.fields[0].width > 1 or part.fields[0].kind == CODES)
        for profile in PROFILES:
            coded = code_file(path, tmp_path / "coded", profile, layout_of(path))
            assert restore_file(tmp_path / "coded", tmp_path / "restored").name == path.name
            assert (tmp_path / "restored").read_bytes() == path.read_bytes()
            assert coded.coded_bytes < 1.02 * path.stat().st_size + 100
    # The layout knows what every weight's bytes mean.
    assert known >= 0.99 * weights


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("target", "type"), [("gguf", "Q8_0"), ("onnx", "int8")])
@pytest.mark.parametrize("method", ["rate", "rate beside factors", "double"])
def test_methods_with_steps_are_carried_by_the_targets(
    tmp_path: Path, method: str, target: str, type: str, tied: bool
) -> None:
    made = load_target(target)
    with open_model(str(tiny_model(tmp_path / "model", tied=tied))) as model:
        statistics = collect(model, Windows.of(TOKENS, "file", 0), 0, lambda done, total: None)
        rewritten = (in_scaled_channels if method == "double" else in_even_columns)(model, statistics)
        # Other coordinates, the same model.
        again = Reference.of(rewritten.model, TOKENS)
        assert distance(Reference.of(model, TOKENS), lambda t, f: logits_of(again, t, f)).kl_mean < 1e-8
        decisions = made.decide(model, type, "rtn")
        groups = [decision.group for decision in decisions]
        if method == "double":
            methods = dict(coarse_int8_methods(rewritten.model, rewritten.statistics, groups, 6.0))
        elif method == "rate":
            methods = dict(entropy_constrained_methods(rewritten.model, rewritten.statistics, groups, 6.0))
        else:
            decisions = with_factors(decisions, low_rank(made, RANK, 8))
            ranks = {group.name: RANK for group in groups if group.layer is not None}
            methods = dict(entropy_constrained_methods(rewritten.model, rewritten.statistics, groups, 6.0, ranks=ranks))
        compressed = Compression(rewritten.model, decisions, rewritten.statistics, methods=methods, source=model)
        (tmp_path / "artifact").mkdir()
        lowered = lower(made, compressed, type, tmp_path / "artifact")
        artifact = lowered.artifact
        decoded = Decoded(made.read_back(artifact, model))
        for decision in decisions:
            decoded(decision.group)
        assert check_weights(decoded.digests, lowered).status == "passed"
        with OpenedArtifact(artifact, 64, 1) as child:
            found = distance(Reference.of(model, TOKENS), child.logits)
        assert found.kl_mean < 0.05


def logits_of(reference: Reference, tokens: list[int], first: int) -> np.ndarray:
    window = [row.tolist() for row in reference.tokens].index(tokens)
    return reference.logits(window, slice(first, None)).numpy()
