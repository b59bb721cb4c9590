"""Finds the pre-tokenizer of llama.cpp that a vocabulary needs, and verifies it before it is written.

llama.cpp implements the pre-tokenizers of BPE models in code and selects one by name. The right name is found by
trial, not by a model's identity: a name is accepted if llama.cpp then gives the same ids as the tokenizer.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import llama_cpp
from gguf import GGUFWriter

from exporter.child.process import Child
from exporter.foundation.cache import cache_folder, scratch_folder
from exporter.foundation.cache_entries import JSON, kept
from exporter.foundation.errors import InputError, RuntimeCrashError
from exporter.model.chat import LOAD_S, TEXT_BYTES
from exporter.model.corpus import PARITY_CORPUS
from exporter.model.known_differences import Reason, first_of, matching
from exporter.model.llama_vocabulary import Case, Comparison
from exporter.model.sentencepiece_file import SPACE
from exporter.model.tokenizer import (
    PRE_TOKENIZERS,
    WHOLE_WORDS_FIRST,
    ModelTokenizer,
    known_difference,
    load_tokenizer,
    parity_texts,
    pre_tokenizer,
)
from exporter.model.tokenizer_files import components
from exporter.targets.gguf.text_differences import DIFFERENCES
from exporter.targets.gguf.tokenize import LlamaTokenizer, compare_in_child
from exporter.targets.gguf.vocabulary import (
    Vocabulary,
    add_name,
    add_vocabulary,
    read_vocabulary,
    stripping,
    write_vocabulary_file,
)

# Raised when the proof of an unchanged vocabulary changes.
VERSION = 3

# Names known to llama.cpp in addition to those of PRE_TOKENIZERS, one for each way of splitting.
OTHER_PRE_TOKENIZERS = (
    "deepseek-v3", "deepseek-llm", "deepseek-coder", "qwen35", "minicpm5", "tiny_aya", "granite-embed-multi-97m",
    "falcon", "default", "bailingmoe", "seed-coder", "exaone-moe", "jais-2", "youtu", "spark2_5", "afmoe", "laguna",
    "chameleon", "superbpe", "ufakzeka", "poro-chat", "viking", "kimi-k2",
)  # fmt: skip


@dataclass(frozen=True)
class VocabularyProof:
    """The result of verifying a written vocabulary.

    Attributes:
        pre_tokenizer: The name that gave equal ids.
        compared: Number of cases (a text with a way of handling special tokens); the ids of all were equal.
        set_apart: Number of cases not compared, since llama.cpp is known to treat their texts differently: it does not
            normalise text, and see `exporter.targets.gguf.text_differences`.
        more_ends: Role -> id of end-of-text tokens, in addition to those at which llama.cpp would stop by itself.
        ends: Ids of all end-of-text tokens.
    """

    pre_tokenizer: str
    compared: int
    set_apart: int
    more_ends: dict[str, int]
    ends: list[int]


def write_vocabulary(writer: GGUFWriter, folder: Path, vocab_size: int, name: str) -> VocabularyProof:
    """Add a Hugging Face tokenizer's vocabulary to a GGUF file, after verifying that llama.cpp tokenises alike.

    Args:
        writer: Receives the keys `tokenizer.*`, the name, and the known differences.
        folder: Holds the tokenizer.
        vocab_size: Rows of the embedding; ids that the tokenizer does not use become `[PADn]`.
        name: The model's name, which llama.cpp takes for its tokenizer's; see `add_name`.

    Raises:
        InputError: llama.cpp does not have this kind of tokenizer, the tokenizer does not fit the embedding, or no
            pre-tokenizer of llama.cpp gives the same ids.
    """
    tokenizer = load_tokenizer(folder, vocab_size)
    vocabulary = read_vocabulary(tokenizer, folder, vocab_size)
    written = by_definition(tokenizer, vocabulary)
    cases, set_apart = parity_cases(tokenizer, vocabulary.model, written)
    names = likely_pre_tokenizers(tokenizer) if vocabulary.model == "gpt2" else [vocabulary.pre_tokenizer]

    def found() -> dict[str, Any]:
        known, differences = in_llama_cpp(vocabulary)
        alike = [case for case in cases if not differences[case.parse_special](case.text)]
        equal = prove(vocabulary, names, alike, folder)
        apart = set_apart + len(cases) - len(alike) + equal.set_apart
        compared = len(alike) - equal.set_apart
        ends = vocabulary.special.ends
        return vars(VocabularyProof(str(equal.pre_tokenizer), compared, apart, ends_by_keys(ends, known), list(ends)))

    proof = VocabularyProof(**kept(_kept_proof(vocabulary, cases), JSON, found))
    special = replace(vocabulary.special, ids={**vocabulary.special.ids, **proof.more_ends})
    add_vocabulary(writer, replace(vocabulary, pre_tokenizer=proof.pre_tokenizer, special=special))
    add_name(writer, name, strips=vocabulary.strips)
    if written:
        writer.add_string(DIFFERENCES, json.dumps(written))
    return proof


def by_definition(tokenizer: ModelTokenizer, vocabulary: Vocabulary) -> dict[str, str]:
    """Return pattern -> reason of the texts that no vocabulary of this kind treats as the tokenizer does.

    A SentencePiece vocabulary whose special tokens take white space gives other ids to all that follows them, so it is
    written only if llama.cpp can be told of it.
    """
    found = {}
    metaspace = any(part["type"] == "Metaspace" for part in components(tokenizer.definition.get("pre_tokenizer")))
    if metaspace and vocabulary.add_space_prefix:
        anywhere = [re.escape(token.content) for token in tokenizer.added().values()]
        pattern = "|".join((rf"\A[ {SPACE}]", *anywhere))
        found[pattern] = "llama.cpp puts a space before every part of a text"
    if strips := _any_of(stripping(tokenizer)):
        if vocabulary.strips:
            found[rf"{strips}\s*[\s&&[^\t-\r ]]"] = (
                "llama.cpp knows no white space outside of ASCII after special tokens"
            )
        elif vocabulary.model == "gpt2":
            found[rf"{strips}\s"] = "llama.cpp keeps the white space after special tokens that the tokenizer removes"
    return found


def _any_of(texts: Iterable[str]) -> str:
    """Return a pattern of any of some texts; empty if there are none."""
    alternatives = "|".join(map(re.escape, texts))
    return f"(?:{alternatives})" if alternatives else ""


def _kept_proof(vocabulary: Vocabulary, cases: list[Case]) -> Path:
    """Return the cache file of a vocabulary's proof, named by everything that the proof depends on."""
    decisive = (VERSION, llama_cpp.__version__, asdict(vocabulary), [asdict(case) for case in cases])
    key = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:32]
    return cache_folder("vocabularies") / f"{key}.json"


def in_llama_cpp(vocabulary: Vocabulary) -> tuple[list[int], dict[bool, Reason]]:
    """Return the tokens at which llama.cpp ends a text, and the reasons it has to treat texts differently.

    The reasons are those with special tokens in texts, and without.

    Raises:
        InputError: llama.cpp refuses the vocabulary, or crashes on it.
    """
    with scratch_folder() as scratch:
        file = scratch / "vocabulary.gguf"
        write_vocabulary_file(file, vocabulary)
        with Child("llama.cpp", TEXT_BYTES) as child:
            child.make(LlamaTokenizer, LOAD_S, file)
            try:
                ends = child.call(LlamaTokenizer.ends, LOAD_S)
                reasons = {one: child.call(LlamaTokenizer.known_differences, LOAD_S, one) for one in (True, False)}
            except RuntimeCrashError as error:
                raise InputError("llama.cpp crashes on the vocabulary", got=error) from error
    return ends, {special: matching(found) for special, found in reasons.items()}


def ends_by_keys(ends: Sequence[int], known: Sequence[int]) -> dict[str, int]:
    """Return keys for end-of-text tokens at which llama.cpp would continue; it has two keys in addition to EOS."""
    left = [number for number in ends if number not in known]
    return dict(zip(("eot", "eom"), left, strict=False))


def parity_cases(tokenizer: ModelTokenizer, model: str, written: Mapping[str, str]) -> tuple[list[Case], int]:
    """Return the cases for llama.cpp, and the number of texts that it is known to treat differently.

    Args:
        tokenizer: The tokenizer.
        model: llama.cpp's kind of tokenizer.
        written: Pattern -> reason of texts that the file's vocabulary cannot treat as the tokenizer does.
    """
    texts = parity_texts(tokenizer)
    known = first_of(known_difference(tokenizer), matching(written))
    alike = [text for text in texts if not known(text)]
    cases = [Case(text, True, True, tuple(tokenizer.ids(text))) for text in alike]
    if model == "gpt2":  # the other kind forms special tokens from plain text wherever their pieces are tokens
        cases += [Case(text, False, False, tuple(tokenizer.literal_ids(text))) for text in alike]
    return cases, len(texts) - len(alike)


def likely_pre_tokenizers(tokenizer: ModelTokenizer) -> list[str]:
    """Return llama.cpp's names, likeliest first: those whose known form splits the corpus most like the tokenizer."""
    backend: Any = tokenizer.backend
    whole_words = bool(backend.model.ignore_merges)
    own = [backend.pre_tokenizer.pre_tokenize_str(text) for text in PARITY_CORPUS]

    def unlikeness(name: str) -> tuple[int, bool]:
        form = pre_tokenizer(name)
        splits = [form.pre_tokenize_str(text) for text in PARITY_CORPUS]
        different = sum(a != b for a, b in zip(own, splits, strict=True))
        return different, (name in WHOLE_WORDS_FIRST) != whole_words

    return [*sorted(PRE_TOKENIZERS, key=unlikeness), *OTHER_PRE_TOKENIZERS]


def prove(vocabulary: Vocabulary, names: list[str], cases: list[Case], where: Path) -> Comparison:
    """Return the comparison of the first pre-tokenizer under which llama.cpp gives the expected ids in all cases.

    Raises:
        InputError: there is none.
    """
    tried: list[Comparison] = []
    with scratch_folder() as scratch:
        file = scratch / "vocabulary.gguf"
        write_vocabulary_file(file, vocabulary)
        for result in compare_in_child(file, names, cases):
            if result.different == 0:
                return result
            tried.append(result)
    raise _no_equal(tried, len(cases), where)


def _no_equal(tried: list[Comparison], cases: int, where: Path) -> InputError:
    best = min(tried, key=lambda result: cases + 1 if result.different is None else result.different)
    if best.example is None:
        return InputError(
            "llama.cpp loads this tokenizer under no pre-tokenizer",
            where=where,
            next_step="lower the model to onnx instead",
        )
    case, got = best.example
    return InputError(
        f"BPE pre-tokenizer was not recognized: under none of {len(tried)} does llama.cpp give this tokenizer's ids; "
        f"the best, {best.pre_tokenizer!r}, differs in {best.different} of {cases} cases, such as {case.text[:60]!r}",
        where=where,
        got=list(got[:16]),
        expected=list(case.ids[:16]),
        next_step="lower the model to onnx instead, or restore the tokenizer of the model it was made from",
    )
