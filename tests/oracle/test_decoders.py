"""Families that are not in every test: their float artifacts compute what transformers does, in each runtime."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.foundation.errors import RequestError
from exporter.model.family import families
from exporter.model.sources import open_model
from exporter.prove.accuracy import Reference, distance
from exporter.targets.contract import load_target
from exporter.targets.opened import OpenedArtifact
from tests.float_artifacts import continued
from tests.models import MORE_KINDS, tiny_model

LENGTH, GENERATED = 96, 40
UNTIED_ONLY = ("olmo2", "olmo3")
TOKENS = np.random.default_rng(0).integers(2, 300, (2, LENGTH))
TARGETS = [
    (family.model_type, target)
    for family in families().values()
    if family.model_type in MORE_KINDS
    for target in ("gguf", *(("onnx",) if family.onnx else ()))
]


@pytest.mark.parametrize(
    ("family", "target", "tied"),
    [(*pair, tied) for pair in TARGETS for tied in (True, False) if not (tied and pair[0] in UNTIED_ONLY)],
)
def test_a_float_artifact_is_the_model(tmp_path: Path, family: str, target: str, tied: bool) -> None:
    folder = tiny_model(tmp_path / "model", family, layers=5, tied=tied)
    (tmp_path / "artifact").mkdir()
    with open_model(str(folder)) as model:
        artifact = load_target(target).write_float(model, tmp_path / "artifact")
        reference = Reference.of(model, TOKENS)
    prompt = TOKENS[0, : LENGTH - GENERATED].tolist()
    expected = continued(folder, prompt, GENERATED)
    most = load_target(target).most_lowering_kl(model.decoder.family)
    with OpenedArtifact(artifact, LENGTH, 1, exact=True) as opened:
        assert distance(reference, opened.logits).kl_mean < most
        made = opened.generate(prompt, GENERATED)
    assert made == expected[: len(made)]
    assert len(made) == GENERATED or 1 in expected


@pytest.mark.parametrize("family", [family for family in MORE_KINDS if (family, "onnx") not in TARGETS])
def test_what_the_builder_does_not_build_is_refused(tmp_path: Path, family: str) -> None:
    refusal = "builder does not build this family; use --target gguf"
    folder = tiny_model(tmp_path / "model", family)
    with open_model(str(folder)) as model, pytest.raises(RequestError, match=refusal):
        load_target("onnx").decide(model, "int4", "rtn")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("olmo2", {}, "'olmo2' has another value built in; got True, expected False"),
        ("smollm3", {"no_rope_layers": [0, 1, 1, 1]}, r"'smollm3' has another value built in; got \[0, 1, 1, 1\]"),
    ],
)
def test_what_llama_cpp_has_built_in_is_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    folder = tiny_model(tmp_path / "model", family, layers=4, changes=changes)
    with open_model(str(folder)) as model, pytest.raises(RequestError, match=message):
        load_target("gguf").decide(model, "F32", "rtn")
