"""What a child process does with a tokenizer of anybody's, before this one loads it: few imports, little time."""

from pathlib import Path

from exporter.memory_limit import memory_limited
from exporter.model.tokenizer import load_tokenizer

# The largest tokenizers known, of 262,144 tokens, load in 3 s and take 1 GiB.
TRY_BYTES = 8 << 30


def try_to_load(folder: Path, rows: int) -> None:
    """Load the tokenizer of a folder within a limit of memory; for errors see `load_tokenizer`."""
    with memory_limited(TRY_BYTES):
        load_tokenizer(folder, rows)
