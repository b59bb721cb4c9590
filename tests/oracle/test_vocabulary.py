"""The vocabulary of a GGUF file against llama.cpp, with small tokenizers trained here."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from exporter.foundation.errors import InputError, RequestError
from exporter.model.chat import PARITY_CHATS
from exporter.model.corpus import PARITY_CORPUS
from exporter.model.llama_vocabulary import Case, llama_tokenize, open_vocabulary
from exporter.model.tokenizer import (
    WHOLE_WORDS_FIRST,
    load_tokenizer,
    pre_tokenizer,
)
from exporter.prove.parity import check_tokenizer
from exporter.prove.text_checks import check_text
from exporter.targets.artifact import Artifact
from exporter.targets.gguf.pretokenizer import (
    VocabularyProof,
    likely_pre_tokenizers,
    parity_cases,
    prove,
    write_vocabulary,
)
from exporter.targets.gguf.tokenize import LlamaTokenizer, compare_in_child
from exporter.targets.gguf.vocabulary import copy_vocabulary, read_vocabulary, write_vocabulary_file
from exporter.targets.onnx.tokenize import GenaiTokenizer
from exporter.targets.text import open_text

VOCAB = 900
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('order') }}"
    "{% endif %}<|{{ m.role }}|>\n{{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def corpus() -> Iterator[str]:
    chance = random.Random(0)
    words = " ".join(PARITY_CORPUS).split()
    yield from PARITY_CORPUS
    for _ in range(300):
        yield " ".join(chance.choices(words, k=20)) + f" {chance.randrange(10**9)}\n\n"


def byte_level(pre: pre_tokenizers.PreTokenizer, bos: bool = False, whole_words: bool = False) -> Tokenizer:
    backend = Tokenizer(models.BPE(ignore_merges=whole_words))
    backend.pre_tokenizer = pre
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus(), trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


def sentencepiece_like(metaspace: bool) -> Tokenizer:
    trained = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))],
        limit_alphabet=200,
        show_progress=False,
    )
    trained.train_from_iterator(corpus(), trainer)
    backend = Tokenizer(trained.model)
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def save(backend: Tokenizer, folder: Path, **settings: str) -> Path:
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **settings)
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    return folder


def write(folder: Path, file: Path, vocab_size: int, name: str = "tiny") -> VocabularyProof:
    writer = gguf.GGUFWriter(file, "llama")
    proof = write_vocabulary(writer, folder, vocab_size, name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return proof


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(byte_level(pre_tokenizer("llama-bpe"), True, True), tmp_path_factory.mktemp("llama3"))


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    digits = pre_tokenizers.Digits(individual_digits=True)
    pre = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return save(byte_level(pre), tmp_path_factory.mktemp("smollm"))


@pytest.mark.parametrize("name", ["gpt-2", "qwen2", "smaug-bpe"])
def test_the_pretokenizer_is_found_by_its_ids(name: str, tmp_path: Path) -> None:
    folder = save(byte_level(pre_tokenizer(name), whole_words=name in WHOLE_WORDS_FIRST), tmp_path / "hf")
    proof = write(folder, tmp_path / "v.gguf", VOCAB)
    assert proof.pre_tokenizer == name
    assert proof.compared > 150 and proof.set_apart == 0


def test_the_found_name_does_not_hang_on_how_the_splitting_is_written(smollm: Path, tmp_path: Path) -> None:
    assert write(smollm, tmp_path / "v.gguf", VOCAB).pre_tokenizer == "smollm"


def test_bos_is_added_once_as_the_tokenizer_does(llama3: Path, tmp_path: Path) -> None:
    write(llama3, tmp_path / "v.gguf", VOCAB)
    tokenizer = load_tokenizer(llama3)
    with open_vocabulary(tmp_path / "v.gguf") as model:
        got = llama_tokenize(model, "Hello")
        assert got == tokenizer.ids("Hello")
        assert got.count(tokenizer.roles["bos"]) == 1
        assert llama_tokenize(model, "Hello", add_special=False) == got[1:]


def test_normalised_text_is_set_apart(tmp_path: Path) -> None:
    backend = byte_level(pre_tokenizer("qwen2"))
    backend.normalizer = normalizers.NFC()
    proof = write(save(backend, tmp_path / "hf"), tmp_path / "v.gguf", VOCAB)
    assert proof.pre_tokenizer == "qwen2"
    assert 3 <= proof.set_apart < 40


@pytest.mark.parametrize("metaspace", [False, True])
def test_sentencepiece_like_vocabulary(metaspace: bool, tmp_path: Path) -> None:
    folder = save(sentencepiece_like(metaspace), tmp_path / "hf", unk_token="<unk>")
    proof = write(folder, tmp_path / "v.gguf", 1300)
    assert (proof.set_apart > 0) == metaspace
    with open_text(Artifact("gguf", tmp_path, (tmp_path / "v.gguf",))) as child:
        assert {check.status for check in check_text(child, load_tokenizer(folder, 1300))} == {"passed"}
    fields = gguf.GGUFReader(tmp_path / "v.gguf").fields
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert kinds[:3] == [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    assert kinds[3:259] == [gguf.TokenType.BYTE] * 256
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is True


def test_ids_beyond_the_tokenizer_are_padded_as_unused(smollm: Path, tmp_path: Path) -> None:
    write(smollm, tmp_path / "v.gguf", VOCAB + 3)
    fields = gguf.GGUFReader(tmp_path / "v.gguf").fields
    assert fields["tokenizer.ggml.tokens"].contents()[-3:] == ["[PAD900]", "[PAD901]", "[PAD902]"]
    assert fields["tokenizer.ggml.token_type"].contents()[-4:] == [1, 5, 5, 5]


def test_added_tokens_keep_their_kind(smollm: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken("<|end|>", special=True)])
    tokenizer.save_pretrained(tmp_path / "hf")
    write(tmp_path / "hf", tmp_path / "v.gguf", VOCAB + 2)
    kinds = gguf.GGUFReader(tmp_path / "v.gguf").fields["tokenizer.ggml.token_type"].contents()
    assert kinds[-2:] == [gguf.TokenType.USER_DEFINED, gguf.TokenType.CONTROL]


def test_the_oracle_fails_under_a_wrong_pretokenizer(smollm: Path) -> None:
    tokenizer = load_tokenizer(smollm)
    vocabulary = read_vocabulary(tokenizer, smollm, VOCAB)
    cases, _ = parity_cases(tokenizer, "gpt2", {})
    with pytest.raises(
        InputError, match=r"the best, 'gpt-2', differs in \d+ of \d+ cases, such as .*; got \[.*expected \["
    ):
        prove(vocabulary, ["llama-bpe", "gpt-2"], cases, smollm)


@pytest.mark.parametrize("damage", ["swap tokens", "lose a merge"])
def test_the_oracle_fails_on_a_damaged_vocabulary(damage: str, smollm: Path) -> None:
    tokenizer = load_tokenizer(smollm)
    right = read_vocabulary(tokenizer, smollm, VOCAB)
    tokens, merges = list(right.tokens), list(right.merges)
    if damage == "swap tokens":
        tokens[300], tokens[301] = tokens[301], tokens[300]
    else:
        del merges[0]
    cases, _ = parity_cases(tokenizer, "gpt2", {})
    with pytest.raises(InputError, match="BPE pre-tokenizer was not recognized"):
        prove(replace(right, tokens=tokens, merges=merges), ["smollm"], cases, smollm)


def test_a_pretokenizer_that_llama_cpp_does_not_have_is_refused(tmp_path: Path) -> None:
    backend = byte_level(pre_tokenizer("gpt-2"))
    vowels = pre_tokenizers.Split(Regex("[aeiou]"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([vowels, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    folder = save(backend, tmp_path / "hf")
    with pytest.raises(InputError, match=r"was not recognized: under none of 30 .* lower the model to onnx instead"):
        write(folder, tmp_path / "v.gguf", VOCAB)


def test_a_name_that_kills_or_is_refused_does_not_stop_the_search(smollm: Path, tmp_path: Path) -> None:
    vocabulary = read_vocabulary(load_tokenizer(smollm), smollm, VOCAB)
    write_vocabulary_file(tmp_path / "v.gguf", vocabulary)
    case = Case("a", False, True, (vocabulary.tokens.index("a"),))
    found = list(compare_in_child(tmp_path / "v.gguf", ["no-such-name", "smollm"], [case]))
    assert [result.different for result in found] == [None, 0]
    with pytest.raises(InputError, match="loads this tokenizer under no pre-tokenizer"):
        prove(vocabulary, ["no-such-name"], [case], smollm)


def test_a_vocabulary_that_aborts_llama_cpp_is_refused(smollm: Path) -> None:
    vocabulary = read_vocabulary(load_tokenizer(smollm), smollm, VOCAB)
    twice = replace(vocabulary, tokens=[*vocabulary.tokens[:-1], vocabulary.tokens[0]])
    with pytest.raises(InputError, match="loads this tokenizer under no pre-tokenizer"):
        prove(twice, ["smollm", "gpt-2"], [Case("a", False, True, (1,))], smollm)


def test_llama_cpp_refusing_a_file_is_an_input_error(smollm: Path, tmp_path: Path) -> None:
    (tmp_path / "v.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(InputError, match=r"llama[.]cpp refuses the vocabulary"), open_vocabulary(tmp_path / "v.gguf"):
        pass


def test_the_likeliest_name_comes_first(smollm: Path, llama3: Path) -> None:
    assert likely_pre_tokenizers(load_tokenizer(smollm))[0] == "smollm"
    assert likely_pre_tokenizers(load_tokenizer(llama3))[0] == "llama-bpe"


def test_a_tokenizer_larger_than_the_embedding_is_refused(smollm: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"more tokens than the embedding has rows; got id 899, .*expected ids below 899"
    ):
        write(smollm, tmp_path / "v.gguf", VOCAB - 1)


def test_another_kind_of_tokenizer_is_refused(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(InputError, match=r"no such tokenizer is written .* got WordLevel"):
        write(save(backend, tmp_path / "hf"), tmp_path / "v.gguf", VOCAB)


def change_settings(folder: Path, to: Path, change: Callable[[dict[str, object]], None]) -> Path:
    shutil.copytree(folder, to)
    settings = json.loads((to / "tokenizer.json").read_text(encoding="utf-8"))
    change(settings)
    (to / "tokenizer.json").write_text(json.dumps(settings), encoding="utf-8")
    return to


def test_two_tokens_with_one_id_are_refused(smollm: Path, tmp_path: Path) -> None:
    def repeat(settings: dict[str, object]) -> None:
        settings["model"]["vocab"]["[PAD900]"] = 5

    with pytest.raises(InputError, match="two tokens share a text or an id"):
        write(change_settings(smollm, tmp_path / "hf", repeat), tmp_path / "v.gguf", VOCAB + 1)


def test_a_copied_vocabulary_is_the_same_byte_for_byte(llama3: Path, tmp_path: Path) -> None:
    write(llama3, tmp_path / "from.gguf", VOCAB + 5)
    writer = gguf.GGUFWriter(tmp_path / "to.gguf", "llama")
    copy_vocabulary(writer, tmp_path / "from.gguf", "tiny")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert (tmp_path / "to.gguf").read_bytes() == (tmp_path / "from.gguf").read_bytes()


def test_a_file_without_vocabulary_cannot_be_copied(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "empty.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"holds no vocabulary; expected tokenizer\.ggml\.tokens"):
        copy_vocabulary(gguf.GGUFWriter(tmp_path / "x.gguf", "llama"), tmp_path / "empty.gguf", "tiny")


def test_llama_cpp_agrees_through_a_child(llama3: Path, tmp_path: Path) -> None:
    write(llama3, tmp_path / "v.gguf", VOCAB)
    with open_text(Artifact("gguf", tmp_path, (tmp_path / "v.gguf",))) as child:
        ids, chats = check_text(child, load_tokenizer(llama3))
    assert ids.status == chats.status == "passed", (ids.detail, chats.detail)


def test_a_gguf_without_template_cannot_render(smollm: Path, tmp_path: Path) -> None:
    vocabulary = read_vocabulary(load_tokenizer(smollm), smollm, VOCAB)
    special = replace(vocabulary.special, templates={})
    write_vocabulary_file(tmp_path / "v.gguf", replace(vocabulary, pre_tokenizer="smollm", special=special))
    with pytest.raises(RequestError, match="the GGUF file holds no chat template"):
        LlamaTokenizer(tmp_path / "v.gguf").render_chat(PARITY_CHATS[0], True)


def genai_folder(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    settings = {"type": "llama", "vocab_size": VOCAB, "context_length": 512}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    (to / "genai_config.json").write_text(json.dumps({"model": settings | ids}))
    return to


def test_onnxruntime_genai_agrees_through_a_child(llama3: Path, tmp_path: Path) -> None:
    with open_text(Artifact("onnx", genai_folder(llama3, tmp_path / "og"), ())) as child:
        ids, chats = check_text(child, load_tokenizer(llama3))
    assert ids.status == chats.status == "passed", (ids.detail, chats.detail)


def test_onnxruntime_genai_is_caught_with_another_tokenizer(llama3: Path, smollm: Path, tmp_path: Path) -> None:
    tokenizer, other = load_tokenizer(llama3), GenaiTokenizer(genai_folder(smollm, tmp_path / "og"))
    check = check_tokenizer(PARITY_CORPUS, tokenizer.ids, other.tokenize, "og")
    assert check.status == "failed"


def test_onnxruntime_genai_without_files_or_template(smollm: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="onnxruntime-genai cannot read the tokenizer"):
        GenaiTokenizer(tmp_path)
    folder = genai_folder(smollm, tmp_path / "og")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(RequestError, match="the folder holds no chat template"):
        GenaiTokenizer(folder).render_chat(PARITY_CHATS[0], True)
