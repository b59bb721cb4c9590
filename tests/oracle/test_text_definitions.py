"""Tokenizers by their own definition, in both runtimes: SentencePiece's ids, and no id without a row."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from exporter.calibrate.sample import starts
from exporter.child.process import Child
from exporter.foundation.errors import InputError
from exporter.foundation.quantities import Check
from exporter.model.corpus import PARITY_CORPUS
from exporter.model.ends import special_ids
from exporter.model.model import Model
from exporter.model.sources import open_model
from exporter.model.tokenizer import ModelTokenizer, load_tokenizer, parity_texts
from exporter.prove import text_checks
from exporter.prove.text_checks import check_text, preview_text
from exporter.targets.contract import load_target
from exporter.targets.text import TextRuntime, open_text
from tests.models import TEXT, VOCAB, tiny_model

LLAMA = {
    "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
    "add_bos_token": True, "legacy": True,
}  # fmt: skip
PIECES = 310
TARGETS = ("gguf", "onnx")


def sentencepiece_model(path: Path, **options: Any) -> SentencePieceProcessor:
    """Train a SentencePiece model as Llama 2's was made, but for the options."""
    usual = {
        "vocab_size": PIECES, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "hard_vocab_limit": False, "character_coverage": 1.0, "minloglevel": 2,
    }  # fmt: skip
    sentences = iter(TEXT * 30)
    with path.open("wb") as file:
        SentencePieceTrainer.train(sentence_iterator=sentences, model_writer=file, **(usual | options))
    return SentencePieceProcessor(model_file=str(path))


def with_pieces(folder: Path, **options: Any) -> SentencePieceProcessor:
    """Write a model whose tokenizer is a tokenizer.model alone; return SentencePiece's own reading of it."""
    tiny_model(folder)
    for name in ("tokenizer.json", "chat_template.jinja"):
        (folder / name).unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(LLAMA))
    change(folder / "config.json", bos_token_id=1, eos_token_id=2, pad_token_id=None)
    (folder / "generation_config.json").unlink()
    return sentencepiece_model(folder / "tokenizer.model", **options)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def by_runtime(model: Model, target: str, folder: Path, texts: list[str]) -> list[list[int]]:
    folder.mkdir()
    artifact = load_target(target).lower_text(model, folder)
    assert artifact is not None
    with open_text(artifact) as child:
        return [child.call(TextRuntime.tokenize, 60, text) for text in texts]


@pytest.fixture(scope="module")
def classic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SentencePieceProcessor]:
    folder = tmp_path_factory.mktemp("classic") / "model"
    return folder, with_pieces(folder)


def test_sentencepiece_is_the_yardstick_of_its_own_model(
    classic: tuple[Path, SentencePieceProcessor], tmp_path: Path
) -> None:
    folder, own = classic
    tokenizer = load_tokenizer(folder, VOCAB)
    texts = [text for text in PARITY_CORPUS if not any(special in text for special in ("<s>", "</s>", "<unk>"))]
    assert [tokenizer.ids(text) for text in texts] == [[1, *own.encode(text)] for text in texts]
    (note,) = tokenizer.notes
    assert "tokenizer.model itself is what counts: the LlamaTokenizer that transformers makes of it gives other" in note
    with open_model(str(folder)) as model:
        for target in TARGETS:
            preview = preview_text(model, load_target(target))
            assert [check.status for check in preview.checks] == ["passed"], preview.checks
            assert note in preview.notes
            assert by_runtime(model, target, tmp_path / target, texts) == [tokenizer.ids(text) for text in texts]


def test_the_form_of_llama_2_in_tokenizer_json_is_its_own_yardstick(
    classic: tuple[Path, SentencePieceProcessor], tmp_path: Path
) -> None:
    _, own = classic
    folder = tmp_path / "model"
    with_pieces(folder)
    tokenizer = load_tokenizer(folder, VOCAB)
    assert tokenizer.definition["normalizer"]["normalizers"][0]["type"] == "Prepend"
    assert tokenizer.definition["pre_tokenizer"] is None
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer.definition))
    read = load_tokenizer(folder, VOCAB)
    assert (read.source, read.ids("  two spaces")) == ("tokenizer.json", [1, *own.encode("  two spaces")])
    assert AutoTokenizer.from_pretrained(folder)("  two spaces")["input_ids"] != read.ids("  two spaces")
    with open_model(str(folder)) as model:
        for target in TARGETS:
            assert [check.status for check in preview_text(model, load_target(target)).checks] == ["passed"]


@pytest.mark.parametrize(
    ("targets", "defined", "texts"),
    [(TARGETS, "<call>", ["a <call>b", "<call><call>"]), (("gguf",), "\u2581\u2581", ["x  y   z", "    four"])],
)
def test_pieces_that_users_defined_are_whole(
    tmp_path: Path, targets: tuple[str, ...], defined: str, texts: list[str]
) -> None:
    own = with_pieces(tmp_path / "model", user_defined_symbols=[defined], add_dummy_prefix=False)
    with open_model(str(tmp_path / "model")) as model:
        for target in targets:
            assert by_runtime(model, target, tmp_path / target, texts) == [[1, *own.encode(text)] for text in texts]


def test_text_that_sentencepiece_normalises_is_set_apart(tmp_path: Path) -> None:
    own = with_pieces(tmp_path / "model", normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)
    tokenizer = load_tokenizer(tmp_path / "model", VOCAB)
    assert tokenizer.ids("ｶﾀｶﾅ  ½") == [1, *own.encode("ｶﾀｶﾅ  ½")]
    with open_model(str(tmp_path / "model")) as model:
        (check,) = preview_text(model, load_target("gguf")).checks
    assert check.status == "passed"
    assert "set apart: SentencePiece normalises such text (nmt_nfkc), the runtime does not" in check.detail


def test_unigram_is_carried_by_no_target(tmp_path: Path) -> None:
    own = with_pieces(tmp_path / "model", model_type="unigram")
    assert load_tokenizer(tmp_path / "model", VOCAB).ids("hello world") == [1, *own.encode("hello world")]
    with open_model(str(tmp_path / "model")) as model:
        for target in TARGETS:
            with pytest.raises(InputError, match=r"no such tokenizer.* got Unigram.* use a model with a BPE tokenizer"):
                preview_text(model, load_target(target))


@pytest.mark.parametrize("target", TARGETS)
def test_unigram_like_that_of_t5_in_tokenizer_json_is_refused_by_name(tmp_path: Path, target: str) -> None:
    folder = tiny_model(tmp_path / "model")
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(
        TEXT * 30, trainers.UnigramTrainer(vocab_size=200, special_tokens=["</s>", "<unk>"], unk_token="<unk>")
    )
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    with (
        open_model(str(folder)) as model,
        pytest.raises(InputError, match=r"no such tokenizer.* got Unigram.* use a model with a BPE tokenizer"),
    ):
        preview_text(model, load_target(target))


@pytest.mark.parametrize("target", TARGETS)
def test_a_difference_without_a_known_reason_refuses_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    given = text_checks.check_text

    def with_another(child: Child, tokenizer: ModelTokenizer) -> list[Check]:
        digits = json.loads(json.dumps(tokenizer.definition))
        digits["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True}, digits["pre_tokenizer"],
        ]}  # fmt: skip
        digits["model"]["merges"] = []
        return given(child, replace(tokenizer, backend=Tokenizer.from_str(json.dumps(digits))))

    monkeypatch.setattr(text_checks, "check_text", with_another)
    with (
        open_model(str(tiny_model(tmp_path / "model"))) as model,
        pytest.raises(InputError, match=r"other ids than the model's tokenizer; got .*; first difference: 'The quick"),
    ):
        preview_text(model, load_target(target))


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"x" * 99, lambda data: b""])
def test_a_damaged_sentencepiece_model_is_refused(
    classic: tuple[Path, SentencePieceProcessor], tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    with_pieces(tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.model"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError):
        load_tokenizer(tmp_path / "model", VOCAB)


def with_more_tokens(folder: Path) -> Path:
    """Write a model whose tokenizer has three more tokens than rows, one of them its padding."""
    tiny_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<filler{i}>" for i in range(VOCAB - len(tokenizer) - 1)] + ["<last>", "<beyond>", "<more>"])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.convert_tokens_to_ids(["<last>", "<beyond>", "[PAD]"]) == [VOCAB - 1, VOCAB, VOCAB + 2]
    tokenizer.save_pretrained(folder)
    return folder


def test_added_tokens_without_a_row_reach_no_artifact(tmp_path: Path) -> None:
    folder = with_more_tokens(tmp_path / "model")
    texts = ["a [PAD] b", "<beyond>", "<more>x<last>", "[PAD][PAD]"]
    tokenizer = load_tokenizer(folder, VOCAB)
    assert max(max(tokenizer.ids(text)) for text in [*parity_texts(tokenizer), *texts]) == VOCAB - 1
    assert max(map(max, starts(tokenizer, 64, 0))) < VOCAB
    assert special_ids(folder, tokenizer.roles, VOCAB).roles["pad"] == 1
    note = (
        "added tokens of the tokenizer that the embedding has no rows for are left out: '<beyond>', '<more>', '[PAD]'"
    )
    with open_model(str(folder)) as model:
        for target in TARGETS:
            preview = preview_text(model, load_target(target))
            assert {check.status for check in preview.checks} == {"passed"}
            assert note in preview.notes
            assert by_runtime(model, target, tmp_path / target, texts) == [tokenizer.ids(text) for text in texts]
    held = json.loads((tmp_path / "onnx" / "tokenizer.json").read_text())
    assert max(held["model"]["vocab"].values()) < VOCAB and max(t["id"] for t in held["added_tokens"]) == VOCAB - 1


def test_a_vocabulary_larger_than_the_embedding_is_refused_alike_by_every_target(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    path = folder / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["model"]["vocab"] |= {f"word{i}": VOCAB - 10 + i for i in range(12)}
    path.write_text(json.dumps(settings))
    said = set()
    with open_model(str(folder)) as model:
        for target in (*TARGETS, "onnx-qdq"):
            with pytest.raises(
                InputError, match="more tokens than the embedding has rows; got id 321, 'word11'"
            ) as one:
                preview_text(model, load_target(target))
            said.add(str(one.value))
    assert len(said) == 1


def test_tokens_that_only_other_files_add_are_tokens(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    change(folder / "tokenizer_config.json", added_tokens_decoder={"310": {"content": "<tool>", "special": True}})
    (folder / "added_tokens.json").write_text(json.dumps({"<call>": 311}))
    tokenizer = load_tokenizer(folder, VOCAB)
    assert tokenizer.ids("<tool><call>") == [310, 311]
    with open_model(str(folder)) as model:
        for target in TARGETS:
            assert by_runtime(model, target, tmp_path / target, ["<tool><call>"]) == [[310, 311]]
    (folder / "added_tokens.json").write_text(json.dumps({"<call>": 315}))
    with pytest.raises(InputError, match="'<call>' cannot have its id; got 311, expected 315"):
        load_tokenizer(folder, VOCAB)


def test_a_special_token_that_the_definition_does_not_hold_is_not_invented(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    change(folder / "tokenizer_config.json", pad_token="[PAD]")
    tokenizer = load_tokenizer(folder, VOCAB)
    assert AutoTokenizer.from_pretrained(folder).pad_token_id == 310
    assert "pad" not in tokenizer.roles and len(tokenizer.ids("[PAD]")) > 1
    assert "special tokens that the tokenizer's settings name but tokenizer.json does not hold" in tokenizer.notes[0]


@pytest.mark.parametrize("target", TARGETS)
def test_a_runtime_with_another_definition_fails(tmp_path: Path, target: str) -> None:
    with open_model(str(tiny_model(tmp_path / "model"))) as model:
        (tmp_path / "text").mkdir()
        artifact = load_target(target).lower_text(model, tmp_path / "text")
        assert artifact is not None
        tokenizer = load_tokenizer(model.folder, VOCAB)
        other = replace(tokenizer, templates={"default": "other {{ messages[0].content }}"})
        with open_text(artifact) as child:
            assert [check.status for check in check_text(child, other)] == ["passed", "failed"]
