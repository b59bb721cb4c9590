"""A GGUF file in llama.cpp: what runs on this machine, and, sent there beside a program, on a device.

The file stands alone: Python 3.8, numpy and llama-cpp-python.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

# Modules and their packages.
NEEDED = (("numpy", "numpy"), ("llama_cpp", "llama-cpp-python"))
ADAPTER_FILE = "adapter.gguf"
# Prompt tokens processed at once: the physical batch.
BATCH = 512
GGML_TYPE_F32 = 0


class FailedError(RuntimeError):
    """llama.cpp failed to process tokens."""


class NotLoadedError(RuntimeError):
    """llama.cpp cannot load a file; `path` names it."""

    def __init__(self, what: str, path: str) -> None:
        super().__init__(what)
        self.path = path


class Session:
    """A model with its adapter, if it has one, and a context.

    Args:
        files: Paths of the model, of its adapter, which is applied at full strength, and of files that are not used.
        context: Tokens a sequence may have.
        threads: Threads to compute with.
        exact: Keep keys and values in float32; llama.cpp's default is float16.
        sequences: Sequences held at once.
    """

    batch = BATCH

    def __init__(
        self, files: Sequence[str], context: int, threads: int, exact: bool = False, sequences: int = 1
    ) -> None:
        import llama_cpp

        self.api = llama_cpp
        llama_cpp.llama_backend_init()
        adapters = [file for file in files if file.endswith(ADAPTER_FILE)]
        (path,) = (file for file in files if file.endswith(".gguf") and file not in adapters)
        self.model: Any = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise NotLoadedError("llama.cpp cannot load the file", path)
        # Before the context is created: its graphs reserve room for the adapters that the model has by then.
        loaded = [self._adapter(one) for one in adapters]
        parameters = self._parameters(context, threads, exact, sequences)
        self.context: Any = llama_cpp.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise NotLoadedError(f"llama.cpp cannot make a context of {context} tokens", path)
        if loaded:
            self._apply(loaded)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def _adapter(self, path: str) -> Any:
        loaded = self.api.llama_adapter_lora_init(self.model, path.encode())
        if not loaded:
            raise NotLoadedError("llama.cpp cannot load the adapter", path)
        return loaded

    def _parameters(self, context: int, threads: int, exact: bool, sequences: int) -> Any:
        parameters = self.api.llama_context_default_params()
        parameters.n_ctx = context * sequences
        parameters.n_seq_max = sequences
        parameters.n_batch = parameters.n_ubatch = BATCH
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.no_perf = True
        if exact:
            parameters.type_k = parameters.type_v = GGML_TYPE_F32
            parameters.flash_attn_type = 0
        return parameters

    def _apply(self, adapters: list[Any]) -> None:
        """Make the context add the adapters' outputs to those of the matrices that they name."""
        count = len(adapters)
        strengths = (ctypes.c_float * count)(*([1.0] * count))
        pointers = (self.api.llama_adapter_lora_p_ctypes * count)(*adapters)
        # llama.cpp always returns 0.
        self.api.llama_set_adapters_lora(self.context, pointers, count, strengths)

    @property
    def runtime(self) -> str:
        """Package and version."""
        return f"llama-cpp-python {version('llama-cpp-python')}"

    def describe(self) -> dict[str, Any]:
        """Return llama.cpp's own description of the model and its count of weights."""
        text = ctypes.create_string_buffer(128)
        self.api.llama_model_desc(self.model, text, len(text))
        parameters = int(self.api.llama_model_n_params(self.model))
        return {"model_type": text.value.decode(errors="replace"), "model_n_params": parameters}

    def forget(self) -> None:
        """Empty the context."""
        self.api.llama_memory_clear(self.memory, True)

    def start(self, tokens: Sequence[int]) -> None:
        """Empty the context and read tokens."""
        self.forget()
        self.read(tokens)

    def read(self, tokens: Sequence[int]) -> None:
        """Process tokens at once, as many as a batch has, and wait for the end."""
        for at in range(0, len(tokens), BATCH):
            part = tokens[at : at + BATCH]
            array = (self.api.llama_token * len(part))(*part)
            self.check(self.api.llama_decode(self.context, self.api.llama_batch_get_one(array, len(part))))
        self.api.llama_synchronize(self.context)

    def generate(self, tokens: Sequence[int]) -> None:
        """Process tokens one at a time, as in generation."""
        for token in tokens:
            self.read([token])

    def logits(self, tokens: Sequence[int], first: int = 0) -> Any:
        """Return the logits after each token of a text from position `first`, float32 [tokens - first, vocab]."""
        import numpy as np

        self.start(tokens[:first])
        parts = []
        for at in range(first, len(tokens), BATCH):
            part = tokens[at : at + BATCH]
            parts.append(self._rows(part, range(at, at + len(part)), [0] * len(part)).copy())
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def step(self, tokens: Sequence[int], position: int) -> Any:
        """Process one token of each sequence, and return a view of the logits after it, float32 [sequences, vocab]."""
        return self._rows(tokens, [position] * len(tokens), range(len(tokens)))

    def last_row(self) -> Any:
        """Return a view of the logits after the last token that was read, float32 [vocab]."""
        import numpy as np

        pointer = self.api.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(pointer, shape=(self.vocab_size,))

    def _rows(self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int]) -> Any:
        """Process up to a batch of tokens, and return a view of the logits after each, float32 [tokens, vocab]."""
        import numpy as np

        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, positions[i], 1, 1
            batch.seq_id[i][0] = sequences[i]
        self.check(self.api.llama_decode(self.context, batch))
        return np.ctypeslib.as_array(self.api.llama_get_logits(self.context), shape=(len(tokens), self.vocab_size))

    def check(self, status: int) -> None:
        """Raise an error if llama.cpp's status is not 0."""
        if status:
            raise FailedError(f"llama.cpp failed to decode: status {status}")


def opened(job: dict[str, Any], context: int, timed: bool) -> Session:
    """Return the session of a measurement's job; `timed` if its speed is measured."""
    del timed
    return Session(job["files"], context, job["threads"])
