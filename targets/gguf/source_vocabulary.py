"""What llama.cpp makes of the vocabulary of a GGUF file that is a source: the yardstick for its tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import llama_cpp

from exporter.targets.gguf.tokenize import Case, Comparison, compare, open_vocabulary


@dataclass(frozen=True)
class VocabularyFacts:
    """What llama.cpp does with a vocabulary that the file need not say.

    Attributes:
        attributes: Bits `LLAMA_TOKEN_ATTR_*` of every token, some of them given by the token's text.
        ends: Ids at which llama.cpp ends a text.
        adds_bos: BOS is put before a text.
        adds_eos: EOS is put after a text.
        bos: Id of BOS, or -1.
        eos: Id of EOS, or -1.
    """

    attributes: tuple[int, ...]
    ends: tuple[int, ...]
    adds_bos: bool
    adds_eos: bool
    bos: int
    eos: int


class SourceVocabulary:
    """The vocabulary of a GGUF file as llama.cpp has it; serves a `Child`."""

    serves = True

    def __init__(self, path: Path) -> None:
        self._opened = open_vocabulary(path)
        self._model = self._opened.__enter__()
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model)

    def facts(self) -> VocabularyFacts:
        """Return what llama.cpp does with the vocabulary."""
        vocabulary = self._vocabulary
        ids = range(llama_cpp.llama_vocab_n_tokens(vocabulary))
        return VocabularyFacts(
            attributes=tuple(int(llama_cpp.llama_vocab_get_attr(vocabulary, i)) for i in ids),
            ends=tuple(i for i in ids if llama_cpp.llama_vocab_is_eog(vocabulary, i)),
            adds_bos=bool(llama_cpp.llama_vocab_get_add_bos(vocabulary)),
            adds_eos=bool(llama_cpp.llama_vocab_get_add_eos(vocabulary)),
            bos=int(llama_cpp.llama_vocab_bos(vocabulary)),
            eos=int(llama_cpp.llama_vocab_eos(vocabulary)),
        )

    def compare(self, cases: Sequence[Case]) -> Comparison:
        """Tokenise all cases and count those whose ids differ."""
        return compare(self._model, None, cases)
