"""GGUF files within their limits: those of the largest vocabularies are far below."""

from contextlib import closing
from pathlib import Path

import gguf
import numpy as np
import pytest

from exporter.foundation.errors import InputError
from exporter.model.gguf_reader import MOST_TEXTS, open_gguf

TOKENS, MERGES = 262_144, 515_000


def written(path: Path, tokens: int, merges: int) -> Path:
    with closing(gguf.GGUFWriter(path, "llama")) as writer:
        writer.add_token_list([f"token {i}" for i in range(tokens)])
        writer.add_token_merges(["a token"] * merges)
        writer.add_token_scores([0.5] * tokens)
        writer.add_token_types([1] * tokens)
        writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return path


def test_the_largest_vocabularies_are_read(tmp_path: Path) -> None:
    reader = open_gguf(written(tmp_path / "large.gguf", TOKENS, MERGES))
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert (len(tokens), tokens[-1]) == (TOKENS, f"token {TOKENS - 1}")
    assert len(reader.fields["tokenizer.ggml.merges"].contents()) == MERGES
    assert reader.fields["tokenizer.ggml.scores"].contents() == [0.5] * TOKENS
    assert reader.fields["tokenizer.ggml.token_type"].contents() == [1] * TOKENS
    assert [tensor.name for tensor in reader.tensors] == ["token_embd.weight"]


def test_more_texts_in_all_arrays_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"an array of .* values of type STRING"):
        open_gguf(written(tmp_path / "larger.gguf", MOST_TEXTS // 2, MOST_TEXTS // 2 + 1))


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ((0, 2, 32), (1, 2, 32), "is at the bytes"),
        ((0, 2, 32), (1 << 40, 2, 32), "is at the bytes"),
        ((0, 2, 32), (0, 1 << 33, 1 << 33), "is at the bytes"),
        ((0, 2, 32), (0, 0, 32), "has the shape"),
    ],
)
def test_tensors_that_cannot_be_there_are_refused(
    tmp_path: Path, old: tuple[int, int, int], new: tuple[int, int, int], sentence: str
) -> None:
    path = written(tmp_path / "model.gguf", 3, 3)
    whole = path.read_bytes()
    before, after = (_place(*one) for one in (old, new))
    assert whole.count(before) == 1
    path.write_bytes(whole.replace(before, after))
    with pytest.raises(InputError, match=f"the tensor 'token_embd.weight' {sentence}"):
        open_gguf(path)


def _place(offset: int, rows: int, columns: int) -> bytes:
    """Return shape, type and offset of a tensor in F32, as the file has them."""
    return (
        np.array([columns, rows], "<u8").tobytes()
        + np.array([0], "<u4").tobytes()
        + np.array([offset], "<u8").tobytes()
    )
