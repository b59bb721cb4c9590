"""Files of a tokenizer with any content: loading, and what the targets make of it, ends well or in one sentence."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from exporter.child.process import Child
from exporter.foundation.errors import ExporterError, InputError
from exporter.model.chat import LOAD_S, TEXT_BYTES
from exporter.model.ends import special_ids
from exporter.model.sources import open_model
from exporter.model.tokenizer import load_tokenizer, try_tokenizer
from exporter.targets.artifact import Artifact
from exporter.targets.gguf.vocabulary import read_vocabulary
from exporter.targets.onnx.companions import write_text_alone
from exporter.targets.onnx.text import GenaiText
from tests.models import TEMPLATE, VOCAB, tiny_model

pytestmark = pytest.mark.slow

STRANGE: tuple[Any, ...] = (
    None, -1, 0, True, "x", "", [], {}, [[]], {"a": {}}, 1e30, 2**70, 1.5, ["a", "b"], "\u2581", "a" * 300, [None],
    {"content": 5}, "{{", "\x00",
)  # fmt: skip
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
NOT_OBJECTS = (b"", b"null", b"[]", b'"x"', b"{", b"\xff\xfe{}", b'{"a":' * 5000, b'{"a": "\\ud800"}', b"\x00" * 100)
MUTATIONS = 45


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model with all files that a tokenizer may have."""
    made = tiny_model(tmp_path_factory.mktemp("hostile") / "model")
    (made / "chat_template.jinja").unlink()
    token = {"content": "<|im_start|>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    (made / "special_tokens_map.json").write_text(json.dumps({"bos_token": token, "eos_token": "<|im_end|>"}))
    (made / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 1, "<x>": 310}))
    path = made / "tokenizer_config.json"
    more = {
        "chat_template": [{"name": "default", "template": TEMPLATE}, {"name": "other", "template": "x"}],
        "added_tokens_decoder": {"0": token | {"special": True}},
        "model_max_length": 1024,
        "extra_special_tokens": ["<|im_end|>"],
        "add_bos_token": False,
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    return made


def places(value: Any, chance: random.Random, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return paths to some values inside a value."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    some = chance.sample(keys, min(len(keys), 12))
    return [found for key in some for found in ((*path, key), *places(value[key], chance, (*path, key)))]


def mutated(content: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """Return content with one value strange or missing."""
    made = json.loads(json.dumps(content))
    *above, last = chance.choice(places(made, chance))
    parent = made
    for key in above:
        parent = parent[key]
    if chance.random() < 0.25:
        del parent[last]
    else:
        parent[last] = chance.choice(STRANGE)
    return made


def ends_well(folder: Path, scratch: Path) -> bool:
    """Return whether all is made of the folder that targets make; else one sentence was said."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        with open_model(str(folder)) as model:
            tokenizer = load_tokenizer(folder, VOCAB)
            special_ids(folder, tokenizer.roles, VOCAB)
            read_vocabulary(tokenizer, folder, VOCAB)
            write_text_alone(model, scratch)
    except ExporterError as error:
        assert error.exit_code == 3, error
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 2000
        return False
    return True


class Genai:
    """Load and use the text of a folder, in a `Child`."""

    def use(self, folder: Path) -> None:
        GenaiText(Artifact("onnx", folder, ())).tokenize("hello <|im_end|> world")


@pytest.mark.parametrize("name", FILES)
def test_files_of_any_content(folder: Path, tmp_path: Path, name: str) -> None:
    copy, scratch = Path(shutil.copytree(folder, tmp_path / "model")), tmp_path / "scratch"
    content, chance = json.loads((folder / name).read_text()), random.Random(name)
    made = 0
    with Child("onnxruntime-genai", TEXT_BYTES) as child:
        child.make(Genai, LOAD_S)
        for _ in range(MUTATIONS):
            (copy / name).write_text(json.dumps(mutated(content, chance)))
            if ends_well(copy, scratch):
                made += 1
                child.call(Genai.use, 20, scratch)
    # transformers does not look into special_tokens_map.json where tokenizer_config.json says as much.
    assert made > 0 and (made < MUTATIONS or name == "special_tokens_map.json")
    for damaged in NOT_OBJECTS:
        (copy / name).write_bytes(damaged)
        assert not ends_well(copy, scratch), damaged


@pytest.mark.parametrize(
    "name", ["merges.txt", "vocab.json", "chat_template.jinja", "additional_chat_templates/x.jinja"]
)
def test_other_files_of_any_content(folder: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    own = json.loads((copy / "tokenizer.json").read_text())["model"]
    (copy / "vocab.json").write_text(json.dumps(own["vocab"]))
    (copy / "merges.txt").write_text("\n".join(" ".join(pair) for pair in own["merges"]))
    if name in ("merges.txt", "vocab.json"):
        (copy / "tokenizer.json").unlink()
        (copy / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    path = copy / name
    path.parent.mkdir(exist_ok=True)
    for content in (*NOT_OBJECTS, b"\xff", b"a b c d\n" * 5, b'{"a": 0, "b": 0}', b'{"a": -1}', b'{"a": "x"}'):
        path.write_bytes(content)
        ends_well(copy, tmp_path / "scratch")
    path.write_bytes(b"\xff")
    assert not ends_well(copy, tmp_path / "scratch")


def endless(definition: dict[str, Any]) -> None:
    """Let texts be split by a pattern that takes longer than a life on many letters in a row."""
    definition["pre_tokenizer"] = {
        "type": "Split", "pattern": {"Regex": "(a|aa|aaa)+$^x"}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip


def panicking(definition: dict[str, Any]) -> None:
    """Let the tokenizers library panic: a merge shorter than the prefix that it is said to have."""
    definition["model"]["continuing_subword_prefix"] = "a" * 300


@pytest.mark.parametrize(
    ("change", "seconds", "said"),
    [(endless, 60.0, "retry-limit-in-match over"), (panicking, 60.0, "out of range"),
     (lambda definition: None, 0.0, "did not answer within 0 s")],
)  # fmt: skip
def test_what_the_library_does_not_survive_is_tried_apart(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, Any]], None],
    seconds: float,
    said: str,
) -> None:
    monkeypatch.setattr("exporter.model.tokenizer.LOAD_S", seconds)
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    definition = json.loads((copy / "tokenizer.json").read_text())
    change(definition)
    (copy / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(InputError, match=f"the tokenizer cannot be used; got .*{said}"):
        try_tokenizer(copy)


def test_a_panic_is_no_traceback(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    definition = json.loads((copy / "tokenizer.json").read_text())
    panicking(definition)
    (copy / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(BaseException, match="out of range") as panic:
        Tokenizer.from_str(json.dumps(definition))
    assert not isinstance(panic.value, Exception)
    assert not ends_well(copy, tmp_path / "scratch")
