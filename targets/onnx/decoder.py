"""The settings and the tokenizer of a decoder folder."""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import onnxruntime

from exporter.foundation.errors import RequestError
from exporter.targets.artifact import Artifact
from exporter.targets.onnx.session import CONFIGURATION, decoder_settings, session_options
from exporter.targets.onnx.tokenize import GenaiTokenizer


class DecoderFolder:
    """A folder for onnxruntime-genai; subclasses run its graph.

    Args:
        artifact: A folder with genai_config.json and the tokenizer.
        sequences: Must be 1.
    """

    def __init__(self, artifact: Artifact, sequences: int) -> None:
        if sequences != 1:
            raise RequestError("ONNX Runtime runs one sequence at a time here", got=sequences, expected=1)
        self._folder: Path = artifact.folder
        settings = json.loads((self._folder / CONFIGURATION).read_text(encoding="utf-8"))["model"]
        decoder = decoder_settings(self._folder)
        self._options: dict[str, str] = decoder["session_options"]
        self._head_width = int(decoder["head_size"])
        self._vocab = int(settings["vocab_size"])
        self._positions = int(settings["context_length"])
        ends = settings["eos_token_id"]
        self._ends = set(ends if isinstance(ends, list) else [ends])

    def tokenize(self, text: str) -> list[int]:
        """Return token ids as the runtime passes them to the model; special tokens in the text are recognised."""
        return self._tokenizer.tokenize(text)

    def text(self, tokens: list[int]) -> str:
        """Return the text of tokens, without special tokens."""
        return self._tokenizer.text(tokens)

    def positions(self) -> int:
        """Return the most tokens that the artifact was made for."""
        return self._positions

    def _session_options(self, threads: int, entries: Mapping[str, str]) -> onnxruntime.SessionOptions:
        """Return session options: those of the folder's settings, with further entries."""
        options: onnxruntime.SessionOptions = session_options(threads, self._options | dict(entries))
        return options

    @cached_property
    def _tokenizer(self) -> GenaiTokenizer:
        return GenaiTokenizer(self._folder)
