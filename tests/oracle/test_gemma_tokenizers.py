"""Small tokenizers of the kinds of Gemma 3 and Phi-3 in both runtimes, against their own definitions."""

import ctypes
import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import gguf
import llama_cpp
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as splitters

from exporter.foundation.errors import InputError
from exporter.model.known_differences import first_of, matching
from exporter.model.llama_vocabulary import llama_tokenize, open_vocabulary
from exporter.model.tokenizer import ModelTokenizer, known_difference, load_tokenizer, pre_tokenizer
from exporter.targets.gguf.text_differences import by_pre_tokenizer
from exporter.targets.gguf.tokenize import LlamaTokenizer
from exporter.targets.gguf.vocabulary import copy_vocabulary, read_vocabulary, write_vocabulary_file
from exporter.targets.onnx.companions import write_text_files
from exporter.targets.onnx.tokenize import GenaiTokenizer
from tests.oracle.test_vocabulary import corpus, genai_folder, save, sentencepiece_like, write
from tests.texts import generated_texts

ROWS, PIECES, COUNT = 1300, 1200, 600
CODE = Path(__file__).read_text("utf-8")


def gemma_like() -> Tokenizer:
    """Train a BPE with byte fallback, no prefix, and added tokens for runs of spaces, the longest merged first."""
    spaces = ["\u2581" * length for length in range(2, 9)]
    trained = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    trained.pre_tokenizer = splitters.Metaspace(prepend_scheme="never")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *spaces]
    trained.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(vocab_size=PIECES, special_tokens=special, limit_alphabet=200, show_progress=False),
    )
    model = json.loads(trained.to_str())["model"]
    runs = [(run[:at], run[at:]) for run in spaces for at in range(1, len(run))]
    merges = [*runs, *map(tuple, model["merges"])]
    backend = Tokenizer(models.BPE(model["vocab"], merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.add_tokens([AddedToken(run, normalized=False) for run in spaces])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of such a tokenizer with one special token beyond 1,300 rows, and 99 rows without a token."""
    backend = gemma_like()
    filler = [AddedToken(f"<unused{i}>", special=False) for i in range(ROWS - PIECES)]
    backend.add_tokens(filler)
    backend.add_special_tokens(["<image>"])
    assert backend.token_to_id("<image>") >= ROWS
    return save(backend, tmp_path_factory.mktemp("gemma"), unk_token="<unk>")


def in_llama_cpp(folder: Path, path: Path) -> LlamaTokenizer:
    write(folder, path, ROWS)
    return LlamaTokenizer(path)


def in_genai(tokenizer: ModelTokenizer, folder: Path, to: Path) -> GenaiTokenizer:
    write_text_files(tokenizer, 512, genai_folder(folder, to))
    return GenaiTokenizer(to)


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_generated_texts_get_equal_ids(gemma: Path, tmp_path: Path, target: str) -> None:
    tokenizer = load_tokenizer(gemma, ROWS)
    runtime: LlamaTokenizer | GenaiTokenizer
    runtime = (
        in_llama_cpp(gemma, tmp_path / "v.gguf") if target == "gguf" else in_genai(tokenizer, gemma, tmp_path / "o")
    )
    reason = first_of(known_difference(tokenizer), matching(runtime.known_differences()))
    texts = generated_texts(tokenizer, CODE, COUNT, 0)
    alike = [text for text in texts if not reason(text)]
    assert len(alike) > 0.8 * COUNT
    assert [text for text in alike if runtime.tokenize(text) != tokenizer.ids(text)] == []


def test_every_token_has_its_text_in_llama_cpp(gemma: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(gemma, ROWS)
    write(gemma, tmp_path / "v.gguf", ROWS)
    fields = gguf.GGUFReader(tmp_path / "v.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.pre"].contents() == "default"
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is False
    run = tokenizer.backend.token_to_id("\u2581" * 4)
    assert fields["tokenizer.ggml.token_type"].contents()[run] == gguf.TokenType.NORMAL
    with open_vocabulary(tmp_path / "v.gguf") as model:
        assert llama_tokenize(model, "    ", add_special=False) == [run]
        assert piece(model, run) == b"    "


def piece(model: object, token: int) -> bytes:
    room = ctypes.create_string_buffer(64)
    length = llama_cpp.llama_token_to_piece(llama_cpp.llama_model_get_vocab(model), token, room, 64, 0, True)
    return room.raw[:length]


def test_a_token_beyond_the_rows_is_left_out_and_reported(gemma: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(gemma, ROWS)
    assert max(tokenizer.ids("an <image> here")) < ROWS
    assert any("the embedding has no rows for are left out" in note and "<image>" in note for note in tokenizer.notes)
    assert in_llama_cpp(gemma, tmp_path / "v.gguf").tokenize("an <image>") == tokenizer.ids("an <image>")


def test_rows_without_a_token_are_padding(gemma: Path, tmp_path: Path) -> None:
    more = ROWS + 64
    write(gemma, tmp_path / "v.gguf", more)
    fields = gguf.GGUFReader(tmp_path / "v.gguf").fields
    assert fields["tokenizer.ggml.tokens"].contents()[-1] == f"[PAD{more - 1}]"
    assert load_tokenizer(gemma, more).ids("<image>")[-1] == load_tokenizer(gemma).backend.token_to_id("<image>")


def phi_like(folder: Path, rstrip: bool, end_of_text: bool = True) -> Path:
    """Save a tokenizer whose special tokens take the white space after them, but for those of which Phi-3's do not."""
    backend = sentencepiece_like(False)
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    if end_of_text:
        backend.add_special_tokens(["<|endoftext|>"])
    backend.add_special_tokens([AddedToken(token, rstrip=rstrip, special=True) for token in ("</s>", "<|end|>")])
    return save(backend, folder, unk_token="<unk>")


@pytest.mark.parametrize("name", ["Phi-3.5-mini", "mine", "phi3", "Phi 3"])
@pytest.mark.parametrize("rstrip", [True, False])
def test_llama_cpp_strips_spaces_as_the_tokenizer_does_whatever_the_model_s_name(
    tmp_path: Path, rstrip: bool, name: str
) -> None:
    folder = phi_like(tmp_path / "hf", rstrip)
    proof = write(folder, tmp_path / "v.gguf", ROWS, name)
    assert (proof.set_apart, proof.compared > 150) == (0, True)
    tokenizer, runtime = load_tokenizer(folder, ROWS), LlamaTokenizer(tmp_path / "v.gguf")
    texts = [
        "<|end|>  x",
        "a <|end|>\n\nb",
        "<|end|>\t\r\n\x0b\x0cb",
        "</s>  x",
        "<s>  x",
        "<|endoftext|> x",
        "<unk>  x",
    ]
    assert [text for text in texts if runtime.tokenize(text) != tokenizer.ids(text)] == []
    reason = matching(runtime.known_differences())
    assert not any(map(reason, texts))
    wide = ["<|end|>\u00a0x", "</s> \u3000x", "<|end|>\x85x"]
    assert [bool(reason(text)) for text in wide] == [rstrip] * 3
    assert [runtime.tokenize(text) == tokenizer.ids(text) for text in wide] == [not rstrip] * 3


def test_tokens_that_strip_spaces_are_refused_where_llama_cpp_cannot_be_told(tmp_path: Path) -> None:
    # Under a name like Phi-3's, it does not load a vocabulary without <|endoftext|>.
    write(phi_like(tmp_path / "plain", False, False), tmp_path / "plain.gguf", ROWS, "phi-3")
    with pytest.raises(InputError, match=r"does llama\.cpp give this tokenizer's ids; .* such as"):
        write(phi_like(tmp_path / "strips", True, False), tmp_path / "strips.gguf", ROWS, "phi-3")


def byte_level_in(folder: Path, splitting: str, texts: tuple[str, ...], tokens: list[AddedToken]) -> Path:
    """Save a byte-level BPE that merges each of some texts into one token, so that every split shows in the ids."""
    as_bytes = splitters.ByteLevel(add_prefix_space=False, use_regex=False)
    merges = dict.fromkeys(
        (word[:at], word[at])
        for text in texts
        for word, _ in as_bytes.pre_tokenize_str(text)
        for at in range(1, len(word))
    )
    listed = dict.fromkeys(("<s>", "</s>", *sorted(splitters.ByteLevel.alphabet()), *map("".join, merges)))
    ids = {token: number for number, token in enumerate(listed)}
    backend = Tokenizer(models.BPE(ids, list(merges), ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizer(splitting)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(tokens)
    return save(backend, folder)


def test_byte_level_tokens_that_strip_spaces_are_set_apart(tmp_path: Path) -> None:
    folder = byte_level_in(tmp_path / "hf", "gpt-2", ("the",), [AddedToken("<|end|>", rstrip=True, special=True)])
    write(folder, tmp_path / "v.gguf", ROWS)
    tokenizer, runtime = load_tokenizer(folder, ROWS), LlamaTokenizer(tmp_path / "v.gguf")
    reason = matching(runtime.known_differences())
    assert reason("a<|end|> b") == "llama.cpp keeps the white space after special tokens that the tokenizer removes"
    assert runtime.tokenize("a<|end|> b") != tokenizer.ids("a<|end|> b")
    assert reason("a <|end|>b") is None and runtime.tokenize("a <|end|>b") == tokenizer.ids("a <|end|>b")


def test_a_file_made_of_a_gguf_file_strips_as_that_one_does(tmp_path: Path) -> None:
    write(phi_like(tmp_path / "strips", True), tmp_path / "strips.gguf", ROWS, "mine")
    write(phi_like(tmp_path / "plain", False), tmp_path / "plain.gguf", ROWS, "mine")
    texts = ["<|end|>  x", "</s>\nx"]
    ids = []
    for kind in ("strips", "plain"):
        for name in ("Phi-3", "mine"):
            with closing(gguf.GGUFWriter(tmp_path / "copy.gguf", "llama")) as writer:
                copy_vocabulary(writer, tmp_path / f"{kind}.gguf", name)
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
            copied = LlamaTokenizer(tmp_path / "copy.gguf")
            ids.append([copied.tokenize(text) for text in texts])
            assert ids[-1] == [LlamaTokenizer(tmp_path / f"{kind}.gguf").tokenize(text) for text in texts]
    assert ids[0] == ids[1] != ids[2] == ids[3]


def test_tokens_that_strip_spaces_in_onnxruntime_genai(tmp_path: Path) -> None:
    folder = phi_like(tmp_path / "strips", True)
    tokenizer = load_tokenizer(folder, ROWS)
    runtime = in_genai(tokenizer, folder, tmp_path / "o")
    texts = ["<|end|>  x", "a <|end|>\n\nb", "<|end|>x", "<|end|> <|end|>", "a<|end|>"]
    assert [text for text in texts if runtime.tokenize(text) != tokenizer.ids(text)] == []


SPLIT_BY_CASE = ("IÓN", "танҳоЕ", "éAb", "aÉ", "\u11e0\u10c5", "ფ\u11e0\u10c5\u1196")
NOT_SPLIT = ("École", "Abc", "привет", "ПРИВЕТ", "camelCase", "\u11e0\u10c5\u1196", "\u20e3\u208c")


def test_words_with_capitals_outside_of_ascii_are_known_to_differ(tmp_path: Path) -> None:
    folder = byte_level_in(tmp_path / "hf", "gpt-4o", (*SPLIT_BY_CASE, *NOT_SPLIT), [])
    tokenizer = load_tokenizer(folder, ROWS)
    vocabulary = read_vocabulary(tokenizer, folder, ROWS)
    write_vocabulary_file(tmp_path / "v.gguf", replace(vocabulary, pre_tokenizer="granite-embed-multi-97m"))
    runtime = LlamaTokenizer(tmp_path / "v.gguf")
    reason = matching(runtime.known_differences())
    assert [text for text in SPLIT_BY_CASE if not reason(text)] == []
    assert [text for text in NOT_SPLIT if reason(text) or runtime.tokenize(text) != tokenizer.ids(text)] == []
    assert [text for text in SPLIT_BY_CASE if runtime.tokenize(text) == tokenizer.ids(text)] == []
    assert by_pre_tokenizer("qwen2") == {}
