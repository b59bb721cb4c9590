"""Texts longer than usual, in the real runtimes: pieces of tokens, and prompts beyond the usual context."""

import tarfile
from pathlib import Path

import pytest

from exporter.bundle import installed
from exporter.bundle.installed import USUAL_CONTEXT, answer
from exporter.foundation.errors import RequestError
from exporter.targets.artifact import Artifact
from exporter.targets.gguf import runtime
from exporter.targets.gguf.runtime import LlamaCpp

BUNDLES = Path(__file__).parents[1] / "data" / "bundles-0.1.0"


@pytest.fixture
def bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    for target in ("gguf", "onnx"):
        with tarfile.open(BUNDLES / f"{target}.tar.xz") as packed:
            packed.extractall(tmp_path / target, filter="data")
    return tmp_path


def test_a_piece_longer_than_the_buffer_is_read_whole(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bundles / "gguf" / "model"
    loaded = LlamaCpp(Artifact("gguf", folder, (folder / "model.gguf",)), 64, 1, False, 1)
    text = "the capital of France is Paris, numbers 12 345"
    tokens = loaded.tokenize(text)
    assert loaded.text(tokens).strip() == text
    monkeypatch.setattr(runtime, "PIECE_BYTES", 1)
    assert loaded.text(tokens).strip() == text


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_a_prompt_longer_than_the_model_s_context_is_refused(bundles: Path, target: str) -> None:
    with pytest.raises(
        RequestError, match=r"longer than the model's context; got [\d,]+ and 4 tokens, expected at most"
    ):
        answer(bundles / target, "zq" * USUAL_CONTEXT, 4, False, 1)


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_a_prompt_longer_than_the_usual_context_is_answered(
    bundles: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The models of these bundles are made for 256 positions.
    monkeypatch.setattr(installed, "USUAL_CONTEXT", 8)
    monkeypatch.setattr(installed, "TOKENS_AT_ENDS", 2)
    assert isinstance(answer(bundles / target, "the capital of France " * 8, 4, False, 1).text, str)
