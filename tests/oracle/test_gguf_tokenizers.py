"""The tokenizer of a GGUF source: the file's own tokens, the ids of llama.cpp, and nothing beyond."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, Tokenizer

from exporter.foundation.errors import InputError
from exporter.model import gguf_tokenizer
from exporter.model.gguf_file import open_whole
from exporter.model.gguf_tokenizer import FORMS, case_warning, unpack_tokenizer
from exporter.model.sources import open_model
from exporter.model.tokenizer import PARITY_CORPUS, load_tokenizer, pre_tokenizer, token_ids
from tests.gguf_files import edited_gguf, float_gguf, lowered
from tests.models import VOCAB as ROWS
from tests.models import tiny_model
from tests.oracle.test_vocabulary import TEMPLATE, VOCAB, byte_level, save, sentencepiece_like, write

PIECES = 1300


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary of byte-level BPE as a GGUF file, its pre-tokenizer `gpt-2`."""
    root = tmp_path_factory.mktemp("plain")
    write(save(byte_level(pre_tokenizer("gpt-2")), root / "hf"), root / "v.gguf", VOCAB)
    return root / "v.gguf"


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary of SentencePiece's kind as a GGUF file, with a token that a user defined."""
    root = tmp_path_factory.mktemp("pieces")
    backend = sentencepiece_like(False)
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    folder = save(backend, root / "hf", unk_token="<unk>")
    write(folder, root / "v.gguf", PIECES)
    return root / "v.gguf"


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    return float_gguf(tiny_model(root / "hf"), root / "model.gguf")


def unpacked(path: Path, folder: Path, rows: int = VOCAB) -> tuple[Tokenizer, dict[str, Any]]:
    """Return the tokenizer, compared with llama.cpp, and the ids of special tokens."""
    folder.mkdir()
    special = unpack_tokenizer(open_whole(path), rows, folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json")), special


def refused(path: Path, folder: Path, match: str, rows: int = VOCAB) -> None:
    with pytest.raises(InputError, match=match):
        unpacked(path, folder, rows)


def texts(path: Path) -> list[str]:
    return list(gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"].contents())


def test_byte_level_tokens_are_those_of_the_file(plain: Path, tmp_path: Path) -> None:
    tokenizer, special = unpacked(plain, tmp_path / "made")
    assert tokenizer.get_vocab() == {token: i for i, token in enumerate(texts(plain))}
    assert special["eos_token_id"] == [1]
    assert [token.content for token in tokenizer.get_added_tokens_decoder().values()] == ["<s>", "</s>"]
    assert (tmp_path / "made" / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE


@pytest.mark.parametrize("name", [*sorted(FORMS), "llama-v3", "deepseek-r1-qwen", "refact", None])
def test_every_pre_tokenizer_splits_as_llama_cpp_does(plain: Path, tmp_path: Path, name: str | None) -> None:
    keys = {"tokenizer.ggml.pre": name, "tokenizer.ggml.add_bos_token": None}
    path = edited_gguf(plain, tmp_path / "v.gguf", keys)
    tokenizer, _ = unpacked(path, tmp_path / "made")
    assert tokenizer.encode("a").ids[:-1] == ([0] if name in ("llama-bpe", "llama-v3", "tekken") else [])
    assert bool(case_warning(open_whole(path))) is (name in ("tekken", "gpt-4o"))


@pytest.mark.parametrize("prefix", [True, False, None])
def test_sentencepiece_tokens_are_rebuilt_from_scores(pieces: Path, tmp_path: Path, prefix: bool | None) -> None:
    path = edited_gguf(pieces, tmp_path / "v.gguf", {"tokenizer.ggml.add_space_prefix": prefix})
    tokenizer, special = unpacked(path, tmp_path / "made", PIECES)
    assert tokenizer.get_vocab() == {token: i for i, token in enumerate(texts(path))}
    assert special == {"bos_token_id": 1, "eos_token_id": [2]}
    ids = tokenizer.encode("Hello\u00e9<tool>x").ids
    assert ids[0] == 1
    assert tokenizer.decode(ids[1:]) == "Hello\u00e9<tool>" + ("x" if prefix is False else " x")


def test_eos_is_added_where_the_file_asks_for_it(pieces: Path, tmp_path: Path) -> None:
    keys = {"tokenizer.ggml.add_eos_token": True, "tokenizer.ggml.add_bos_token": False}
    tokenizer, _ = unpacked(edited_gguf(pieces, tmp_path / "v.gguf", keys), tmp_path / "made", PIECES)
    assert tokenizer.encode("a").ids[-1] == 2 != tokenizer.encode("a").ids[0]


def test_all_ends_of_a_text_are_told(plain: Path, tmp_path: Path) -> None:
    tokens = texts(plain)
    tokens[500:503] = ["<|eot_id|>", "<|im_end|>", "<|mine|>"]
    types = [gguf.TokenType.CONTROL if i in (0, 1, 500, 502) else gguf.TokenType.NORMAL for i in range(VOCAB)]
    keys = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges_within(plain, tokens)}
    ids = {"tokenizer.ggml.eos_token_id": 502, "tokenizer.ggml.eom_token_id": 1}
    path = edited_gguf(plain, tmp_path / "v.gguf", keys | ids)
    retype(path, types)
    _, special = unpacked(path, tmp_path / "made")
    # llama.cpp takes 501, too, but the file says that it is an ordinary token.
    assert special["eos_token_id"] == [502, 1, 500]


def retype(path: Path, types: list[int]) -> None:
    """Change the kinds of tokens in place: gguf writes the int32 that they are only by themselves."""
    field = gguf.GGUFReader(path, "r+").fields["tokenizer.ggml.token_type"]
    for index, kind in zip(field.data, types, strict=True):
        field.parts[index][0] = kind


def merges_within(path: Path, tokens: list[str]) -> list[str]:
    """Return the merges of a file that still form tokens."""
    held = set(tokens)
    merges = gguf.GGUFReader(path).fields["tokenizer.ggml.merges"].contents()
    return [pair for pair in merges if pair.replace(" ", "") in held and set(pair.split(" ")) <= held]


def test_named_chat_templates_are_kept_and_odd_names_left_out(plain: Path, tmp_path: Path) -> None:
    keys = {f"tokenizer.chat_template.{name}": name for name in ("tool_use", "../../escape")}
    unpacked(edited_gguf(plain, tmp_path / "v.gguf", keys), tmp_path / "made")
    assert [path.name for path in tmp_path.glob("**/*.jinja")] == ["chat_template.jinja", "tool_use.jinja"]
    assert not [*tmp_path.parent.glob("escape*"), *tmp_path.glob("**/escape*")]


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"tokenizer.ggml.pre": "qwen35"}, "pre-tokenizer 'qwen35' cannot be rebuilt.* did you mean"),
        ({"tokenizer.ggml.model": "bert"}, "a tokenizer of kind 'bert' is not supported"),
        ({"tokenizer.ggml.tokens": None}, r"holds no usable tokenizer\.ggml\.tokens"),
        ({"tokenizer.ggml.merges": None}, r"holds no usable tokenizer\.ggml\.merges"),
        ({"tokenizer.ggml.merges": ["zz zz"]}, "the merges do not fit the tokens"),
        ({"tokenizer.ggml.tokens": ["a"] * VOCAB}, "two tokens of the GGUF file share a text"),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, "do not fit the rows of its embedding; got 2, expected 900"),
        ({"tokenizer.ggml.token_type": [1]}, "llama.cpp cannot load the vocabulary; use a file that llama.cpp loads"),
    ],
)
def test_a_vocabulary_that_cannot_be_rebuilt_is_refused(
    plain: Path, tmp_path: Path, keys: dict[str, object], match: str
) -> None:
    refused(edited_gguf(plain, tmp_path / "v.gguf", keys), tmp_path / "made", match)


def test_scores_that_cannot_be_used_are_refused(pieces: Path, tmp_path: Path) -> None:
    for number, (scores, match) in enumerate(
        ((None, "no usable tokenizer.ggml.scores"), ([float("nan")] * PIECES, "no usable tokenizer.ggml.scores"))
    ):
        path = edited_gguf(pieces, tmp_path / f"{number}.gguf", {"tokenizer.ggml.scores": scores})
        refused(path, tmp_path / f"made{number}", match, PIECES)
    tokens = texts(pieces)
    tokens[-1] = "x" * 2000
    refused(
        edited_gguf(pieces, tmp_path / "v.gguf", {"tokenizer.ggml.tokens": tokens}), tmp_path / "made",
        "a token of the GGUF file is too long; got 2000 characters", PIECES,
    )  # fmt: skip


def test_the_comparison_with_llama_cpp_sees_a_wrong_form(
    plain: Path, pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMS, "gpt-2", FORMS["qwen2"])
    refused(plain, tmp_path / "one", r"cannot be rebuilt: \d+ of \d+ texts get other ids .*; got \[.*expected \[")
    monkeypatch.setattr(gguf_tokenizer, "_merges_by_score", lambda file, tokens: [])
    refused(pieces, tmp_path / "other", "cannot be rebuilt", PIECES)


@pytest.mark.parametrize("with_end_of_text", [False, True])
def test_no_token_is_invented_for_either_target(model_file: Path, tmp_path: Path, with_end_of_text: bool) -> None:
    tokens = texts(model_file)
    if with_end_of_text:
        tokens[1] = "<|endoftext|>"
    path = edited_gguf(model_file, tmp_path / "source.gguf", {"tokenizer.ggml.tokens": tokens})
    with open_model(str(path)) as model:
        assert model.decoder.vocab == ROWS
        tokenizer = Tokenizer.from_file(str(model.folder / "tokenizer.json"))
        assert tokenizer.get_vocab() == {token: i for i, token in enumerate(tokens)}
        assert ("<|endoftext|>" in tokens) is with_end_of_text
        longest = [token_ids(load_tokenizer(model.folder), text) for text in (*PARITY_CORPUS, "a<|endoftext|>b")]
        assert max(max(ids, default=0) for ids in longest) < ROWS
    written = lowered(path, tmp_path / "gguf", "gguf", "Q8_0").weights[0]
    assert texts(written) == tokens
    folder = lowered(path, tmp_path / "onnx", "onnx", "int8").folder
    held = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert {token["content"] for token in held["added_tokens"]} == set(tokens[:2])
    assert sorted(held["model"]["vocab"].values()) == list(range(ROWS))


def test_a_qwen_file_gets_no_token_or_normaliser_of_the_family(model_file: Path, tmp_path: Path) -> None:
    qwen = float_gguf(tiny_model(tmp_path / "hf", "qwen2"), tmp_path / "qwen.gguf")
    path = edited_gguf(qwen, tmp_path / "model.gguf", {"tokenizer.ggml.tokens": texts(model_file)})
    with open_model(str(path)) as model:
        tokenizer = Tokenizer.from_file(str(model.folder / "tokenizer.json"))
        assert "<|endoftext|>" not in tokenizer.get_vocab()
        assert tokenizer.normalizer is None
        settings = json.loads((model.folder / "generation_config.json").read_text(encoding="utf-8"))
        assert settings == {"bos_token_id": 0, "eos_token_id": [1], "pad_token_id": 1}
        assert model.config.eos_token_id == 1
