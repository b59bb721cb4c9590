"""Reads a tokenizer.model: SentencePiece's own ids, and conversion to a tokenizer.json."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

from exporter.foundation.errors import InputError
from exporter.model.tokenizer_files import Added, readable, too_many_tokens

UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
MAX_BYTES = 64 << 20
# Longer pieces are rejected: splitting a piece into all pairs of parts takes time quadratic in its length.
MAX_CHARACTERS = 1024
SPACE = "\u2581"


@dataclass(frozen=True)
class Pieces:
    """A SentencePiece model and the tokens added to it.

    Attributes:
        processor: The SentencePiece processor.
        proto: The file's content.
        added: Tokens recognised in a text; the parts between them are tokenised separately.
    """

    processor: Any
    proto: Any
    added: Mapping[str, Added]

    @property
    def texts(self) -> list[str]:
        """Text of each piece in order of ids."""
        return [piece.piece for piece in self.proto.pieces]

    @property
    def types(self) -> list[int]:
        """Kind of each piece; GGUF uses the same numbers."""
        return [piece.type for piece in self.proto.pieces]

    @property
    def scores(self) -> list[float]:
        """Score of each piece; pieces with higher scores are formed first."""
        return [piece.score for piece in self.proto.pieces]

    @property
    def prepends_space(self) -> bool:
        """Whether a space is prepended to a text."""
        return bool(self.proto.normalizer_spec.add_dummy_prefix)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that are not ordinary text: unknown, control, unused and byte pieces, and added special tokens."""
        named = {number for number, kind in enumerate(self.types) if kind not in (NORMAL, USER_DEFINED)}
        return frozenset(named | {token.id for token in self.added.values() if token.special})

    def changes(self, text: str) -> str | None:
        """Return how SentencePiece changes a text beyond marking spaces, which runtimes also do; None if not."""
        parts = [part for part, _ in self._parts(text)]
        if any(self.processor.normalize(part) != self._marked(part) for part in parts):
            kind = self.proto.normalizer_spec.name or "a table of its own"
            return f"SentencePiece normalises such text ({kind}), the runtime does not"
        if SPACE in text and any(SPACE in piece.piece for piece in self.proto.pieces if piece.type == USER_DEFINED):
            return f"runtimes look for spaces that users defined as pieces before {SPACE} stands for a space"
        return None

    def _marked(self, text: str) -> str:
        return (SPACE if self.prepends_space and text else "") + text.replace(" ", SPACE)

    def ids(self, text: str, special: bool = True) -> list[int]:
        """Return the ids of a text; with `special`, added tokens in it are recognised."""
        if not special:
            return list(self.processor.encode(text))
        found: list[int] = []
        for part, token in self._parts(text):
            found += self.processor.encode(part)
            found += [] if token is None else [token.id]
        return found

    def _parts(self, text: str) -> Iterator[tuple[str, Added | None]]:
        """Yield each part of a text with the added token that follows it; None follows the last."""
        end = 0
        for match in self._pattern.finditer(text) if self.added else ():
            yield text[end : match.start()], self._longest_first[(match.lastindex or 1) - 1]
            end = match.end()
        yield text[end:], None

    @cached_property
    def _longest_first(self) -> list[Added]:
        return sorted(self.added.values(), key=lambda token: -len(token.content))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """Pattern of the added tokens and the spaces they strip, longest token first, one group per token."""
        return re.compile("|".join(map(_matching, self._longest_first)))


def _matching(token: Added) -> str:
    before, after = r"\s*" if token.lstrip else "", r"\s*" if token.rstrip else ""
    return f"{before}({re.escape(token.content)}){after}"


def read_pieces(path: Path, added: Mapping[str, Added], rows: int | None) -> Pieces:
    """Read a tokenizer.model.

    Args:
        path: The file.
        added: Tokens added to it; a token with the id of a piece is a name for that piece.
        rows: Rows of the embedding; None for any number.

    Raises:
        InputError: the file is not a SentencePiece model, is of an unsupported kind, or has more pieces than rows.
    """
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path.name} is too large", where=path, expected=f"at most {MAX_BYTES} bytes")
    with readable("tokenizer.model is no SentencePiece model", path):
        data = path.read_bytes()
        proto = sentencepiece_model_pb2.ModelProto.FromString(data)  # type: ignore[attr-defined]
        processor = SentencePieceProcessor(model_proto=data)
    _require_known(proto, path)
    if rows is not None and len(proto.pieces) > rows:
        raise too_many_tokens(proto.pieces[-1].piece, len(proto.pieces) - 1, rows, path)
    return Pieces(processor, proto, added)


def _require_known(proto: Any, path: Path) -> None:
    kind = proto.trainer_spec.model_type
    longest = max((len(piece.piece) for piece in proto.pieces), default=0)
    if kind not in (BPE, UNIGRAM) or proto.trainer_spec.treat_whitespace_as_suffix or longest > MAX_CHARACTERS:
        raise InputError(
            "tokenizer.model is of a kind that is not supported", where=path,
            got=f"model_type {kind}, pieces of up to {longest} characters",
            expected="BPE or Unigram, spaces at the beginning of words",
            next_step="give the model with a tokenizer.json",
        )  # fmt: skip


def as_definition(pieces: Pieces, before: Sequence[str], after: Sequence[str], where: Path) -> dict[str, Any]:
    """Return the same tokenizer as the content of a tokenizer.json.

    Args:
        pieces: The tokenizer.
        before: Tokens prepended to a text.
        after: Tokens appended to a text.
        where: The file, for messages.

    Raises:
        InputError: the pieces do not form a tokenizer.
    """
    with readable("the pieces of tokenizer.model do not make a tokenizer", where):
        backend = Tokenizer(_bpe(pieces) if pieces.proto.trainer_spec.model_type == BPE else _unigram(pieces))
        backend.normalizer = normalizers.Sequence(list(_normalisers(pieces)))
        strip = [decoders.Strip(" ", 1, 0)] if pieces.prepends_space else []
        backend.decoder = decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        for token in sorted(_all_added(pieces), key=lambda token: token.id):
            _add(backend, token)
        ids = [(text, backend.token_to_id(text)) for text in {*before, *after}]
        if ids:
            backend.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=ids)
        definition: dict[str, Any] = json.loads(backend.to_str())
    return definition


def _bpe(pieces: Pieces) -> models.BPE:
    ids = {text: number for number, text in enumerate(pieces.texts)}
    unknown = _unknown(pieces)
    return models.BPE(
        ids, list(_merges(pieces)), unk_token=unknown, fuse_unk=True,
        byte_fallback=bool(pieces.proto.trainer_spec.byte_fallback),
    )  # fmt: skip


def _unigram(pieces: Pieces) -> models.Unigram:
    scored = list(zip(pieces.texts, pieces.scores, strict=True))
    return models.Unigram(scored, pieces.types.index(UNKNOWN), bool(pieces.proto.trainer_spec.byte_fallback))


def _unknown(pieces: Pieces) -> str | None:
    return next((text for text, kind in zip(pieces.texts, pieces.types, strict=True) if kind == UNKNOWN), None)


def _merges(pieces: Pieces) -> Iterator[tuple[str, str]]:
    """Yield all pairs of pieces that form a piece, highest score first."""
    formed = {
        text: score
        for text, kind, score in zip(pieces.texts, pieces.types, pieces.scores, strict=True)
        if kind == NORMAL
    }
    for text in sorted(formed, key=lambda text: -formed[text]):
        for at in range(1, len(text)):
            if text[:at] in formed and text[at:] in formed:
                yield text[:at], text[at:]


def _normalisers(pieces: Pieces) -> Iterator[normalizers.Normalizer]:
    spec = pieces.proto.normalizer_spec
    if spec.precompiled_charsmap:
        yield normalizers.Precompiled(spec.precompiled_charsmap)
    if spec.remove_extra_whitespaces:
        yield normalizers.Strip()
        yield normalizers.Replace(Regex(" {2,}"), " ")
    if pieces.prepends_space:
        yield normalizers.Prepend(SPACE)
    yield normalizers.Replace(" ", SPACE)


def _all_added(pieces: Pieces) -> Iterator[Added]:
    yield from pieces.added.values()
    for number, (text, kind) in enumerate(zip(pieces.texts, pieces.types, strict=True)):
        if kind == USER_DEFINED and text not in pieces.added:
            yield Added(number, text, special=False, normalized=True)


def _add(backend: Tokenizer, token: Added) -> None:
    added = AddedToken(
        token.content, single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip,
        normalized=token.normalized, special=token.special,
    )  # fmt: skip
    (backend.add_special_tokens if token.special else backend.add_tokens)([added])
    if backend.token_to_id(token.content) != token.id:
        raise ValueError(f"the id of the added token {token.content!r:.60} is not free: {token.id}")
