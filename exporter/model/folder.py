"""Writes a model as a Hugging Face folder that plain `from_pretrained` loads."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors.numpy import save_file

from exporter.foundation.cache import scratch_folder
from exporter.foundation.errors import RequestError
from exporter.model.licences import licence_files
from exporter.model.model import Model, metadata_files
from exporter.model.tensors import INDEX, SINGLE
from exporter.model.widths import padded

# The whole shard is in memory while it is written.
SHARD_BYTES = 2 << 30


def save_folder(model: Model, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write config, float32 weights and tokenizer files; unequal feed-forward widths are padded with zeros.

    Args:
        model: The model, original or pruned.
        folder: A folder that does not exist; it appears under this name only when complete.
        shard_bytes: Maximum bytes of one file, unless a single tensor has more.

    Raises:
        RequestError: the folder exists, its parent does not, or it cannot be written.
        InputError: the source changed while it was read.
    """
    require_new(folder)
    even = model if model.decoder.even else padded(model)
    try:
        with scratch_folder(folder.parent, folder.name, 0o777) as made:
            _write_weights(even, made, shard_bytes)
            _write_companions(even, made)
            model.require_unchanged()
            made.rename(folder)
    except OSError as error:
        raise RequestError("the folder cannot be written", where=folder, got=error.strerror) from error


def require_new(folder: Path) -> None:
    """Reject a folder that exists or whose parent does not.

    Raises:
        RequestError: see above.
    """
    if folder.exists():
        raise RequestError("the folder exists already", where=folder, next_step="name another")
    if not folder.parent.is_dir():
        raise RequestError("there is no such folder", where=folder.parent, next_step="make it, or name another")


def _write_weights(model: Model, folder: Path, shard_bytes: int) -> None:
    shards = list(_shards(model, shard_bytes))
    files = [SINGLE] if len(shards) == 1 else [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]  # fmt: skip
    for file, names in zip(files, shards, strict=True):
        save_file({name: model.read_stored(name) for name in names}, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": 4 * model.decoder.parameters}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(model: Model, shard_bytes: int) -> Iterator[list[str]]:
    """Yield the tensor names of each file."""
    sizes = {name: 4 * math.prod(shape) for name, shape in model.decoder.stored_tensors().items()}
    shard: list[str] = []
    held = 0
    for name, size in sizes.items():
        if shard and held + size > shard_bytes:
            yield shard
            shard, held = [], 0
        shard.append(name)
        held += size
    yield shard


def _write_companions(model: Model, folder: Path) -> None:
    for path in (*metadata_files(model.folder), *licence_files(model.folder)):
        place = folder / path.relative_to(model.folder)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, place)
    config = model.own_config()
    config.architectures = [model.decoder.family.architecture]
    config.dtype = "float32"
    config.save_pretrained(folder)
