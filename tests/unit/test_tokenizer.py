"""Loading tokenizers, the texts of the parity checks, and the checks themselves."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from exporter.foundation.errors import DeadlineError, InputError, RequestError, RuntimeCrashError
from exporter.model.chat import PARITY_CHATS, Chat, Rendered
from exporter.model.corpus import PARITY_CORPUS
from exporter.model.tokenizer import (
    PRE_TOKENIZERS,
    known_difference,
    load_tokenizer,
    parity_texts,
    pre_tokenizer,
)
from exporter.prove.parity import check_chat_template, check_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random.seed(0)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer("gpt-2")
    backend.decoder = decoders.ByteLevel()
    backend.normalizer = normalizers.NFC()
    digits = [str(random.randrange(10**6)) for _ in range(300)]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*PARITY_CORPUS, *digits], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|eos|>")
    path = tmp_path_factory.mktemp("tokenizer")
    made.save_pretrained(path)
    return path


def test_corpus_is_distinct_valid_text_without_nul() -> None:
    assert len(set(PARITY_CORPUS)) == len(PARITY_CORPUS)
    assert all(text.encode().decode() == text and "\0" not in text for text in PARITY_CORPUS)
    assert all(message["role"] in ("system", "user", "assistant") for chat in PARITY_CHATS for message in chat)


def test_parity_texts_hold_every_special_token_alone_inside_and_at_both_ends(folder: Path) -> None:
    texts = parity_texts(load_tokenizer(folder))
    for token in ("<|bos|>", "<|eos|>"):
        assert token in texts
        assert any(text.startswith(token) and text != token for text in texts)
        assert any(text.endswith(token) and text != token for text in texts)
        assert any(token in text[1:-1] for text in texts)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no tokenizer; expected tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(InputError, match=r"tokenizer\.json is not valid JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"}}')
    with pytest.raises(InputError, match="the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


def test_remote_code_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["own.Tok", None]}}))
    with pytest.raises(InputError, match="asks for remote code, which is never run; got auto_map"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("content", "said"), [("{", "is not valid JSON"), ("3", "holds no JSON object")])
def test_a_damaged_tokenizer_config_is_refused(folder: Path, tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(InputError, match=f"tokenizer_config.json {said}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_pretokenizers_lose_no_text(name: str) -> None:
    back = decoders.ByteLevel()
    for text in PARITY_CORPUS:
        assert back.decode([piece for piece, _ in pre_tokenizer(name).pre_tokenize_str(text)]) == text


def test_text_that_the_tokenizer_normalises_has_a_known_difference(folder: Path) -> None:
    reason = known_difference(load_tokenizer(folder))
    assert reason("cafe\u0301") == "the tokenizer normalises such text (NFC), the runtime does not"
    assert reason("caf\u00e9") is None


def test_equal_ids_pass() -> None:
    check = check_tokenizer(["ab", "c"], lambda t: [ord(c) for c in t], lambda t: [ord(c) for c in t], "llama.cpp")
    assert (check.name, check.status, check.value, check.limit) == ("parity.tokenizer.llama.cpp", "passed", 0, 0)
    assert check.detail == "2 of 2 texts equal"


def test_one_different_id_fails_and_is_shown() -> None:
    check = check_tokenizer(
        ["ab", "c"], lambda t: [1, 2, 3, 4], lambda t: [1, 2, 3, 5] if t == "c" else [1, 2, 3, 4], "x"
    )
    assert (check.status, check.value) == ("failed", 1)
    assert (
        check.detail == "1 of 2 texts equal; first difference: 'c': from position 1 got [2, 3, 5], expected [2, 3, 4]"
    )


def test_a_missing_last_id_fails() -> None:
    assert check_tokenizer(["a"], lambda t: [1, 2], lambda t: [1], "x").status == "failed"


def test_texts_with_a_known_difference_are_counted_apart() -> None:
    check = check_tokenizer(["a", "b"], lambda t: [1], lambda t: [2 if t == "b" else 1], "x", {"b": "no NFC"}.get)
    assert check.status == "passed"
    assert check.value == 0
    assert check.detail == (
        "1 of 1 texts equal; 1 of 2 texts set apart: no NFC; of these 0 of 1 texts equal; "
        "first difference: 'b': from position 0 got [2], expected [1]"
    )


def test_the_first_difference_without_a_known_reason_comes_first() -> None:
    check = check_tokenizer(["a", "b", "c"], lambda t: [1], lambda t: [2], "x", {"a": "no NFC", "c": "no NFC"}.get)
    assert (check.status, check.value) == ("failed", 1)
    assert check.detail.startswith("0 of 1 texts equal; first difference: 'b': from position 0 got [2], expected [1]; ")
    assert "; 2 of 3 texts set apart: no NFC; of these 0 of 2 texts equal; first difference: 'a'" in check.detail


def test_what_a_runtime_cannot_do_is_not_run() -> None:
    def cannot(_: object) -> None:
        raise RequestError("the runtime has no chat template")

    check = check_chat_template(PARITY_CHATS, lambda chat: Rendered("x"), cannot, "onnxruntime-genai")
    assert (check.name, check.status) == ("parity.chat_template.onnxruntime-genai", "not run")
    assert check.detail == "the runtime has no chat template."
    assert check_tokenizer([], lambda t: [], lambda t: [], "x").status == "not run"


def test_a_runtime_that_dies_fails() -> None:
    def dies(_: str) -> list[int]:
        raise RuntimeCrashError("llama.cpp died")

    check = check_tokenizer(["a"], lambda t: [1], dies, "llama.cpp")
    assert (check.status, check.detail) == ("failed", "llama.cpp died.")


def written(chat: Chat) -> Rendered:
    return Rendered("".join(f"<{message['role']}>{message['content']}" for message in chat))


def refusing(*roles: str) -> Callable[[Chat], Rendered]:
    return lambda chat: Rendered(None, "not so") if chat[0]["role"] in roles else written(chat)


def test_a_chat_that_only_one_side_refuses_fails() -> None:
    refused = check_chat_template(PARITY_CHATS, refusing("system"), written, "x")
    assert (refused.status, refused.value) == ("failed", 2)
    assert "6 of 6 chats equal; the template refuses 2 others: not so; 0 of 2 chats that the template" in refused.detail
    check = check_chat_template(PARITY_CHATS, written, refusing("system"), "x")
    assert (check.status, check.value) == ("failed", 2)
    assert "refused: not so" in check.detail


def test_chats_that_both_refuse_are_told_and_no_equality() -> None:
    check = check_chat_template(PARITY_CHATS, refusing("system"), refusing("system"), "x")
    assert (check.status, check.detail) == ("passed", "6 of 6 chats equal; the template refuses 2 others: not so")
    none = check_chat_template(PARITY_CHATS, refusing("system", "user"), refusing("system", "user"), "x")
    assert (none.status, none.detail) == ("not run", "the template refuses all 8 chats: not so")


def test_a_template_is_asked_in_the_form_that_it_takes() -> None:
    first = check_chat_template(PARITY_CHATS, refusing("user"), refusing("user"), "x")
    assert first.status == "passed"
    assert first.detail == (
        "8 of 8 chats equal; the template refuses 6 of them as they are, and takes them with a system message in front"
    )

    def of_parts(chat: Chat) -> Rendered:
        return Rendered("".join(part["text"] for message in chat for part in message["content"] if "text" in part))

    parts = check_chat_template(PARITY_CHATS, of_parts, of_parts, "x")
    assert parts.detail == "8 of 8 chats equal; 7 of them with contents as lists of parts"
    assert check_chat_template(PARITY_CHATS, of_parts, written, "x").value == 8


def test_a_template_that_does_not_end_is_not_run() -> None:
    def endless(_: Chat) -> Rendered:
        raise DeadlineError("the chat template did not answer within 10 s")

    check = check_chat_template(PARITY_CHATS, endless, written, "x")
    assert (check.status, check.detail) == ("not run", "the chat template did not answer within 10 s.")
    assert check_chat_template(PARITY_CHATS, written, endless, "x").status == "failed"


def test_what_writes_the_time_is_rendered_at_the_same_time() -> None:
    ticks = iter(range(10**6))

    def timed(chat: Chat) -> Rendered:
        return Rendered(f"{next(ticks) // 3} {written(chat).text}")

    assert check_chat_template(PARITY_CHATS, timed, timed, "x").status == "failed"
    assert check_chat_template(PARITY_CHATS, timed, timed, "x", clock=True).status == "passed"
