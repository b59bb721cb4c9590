"""The safetensors files that transformers loads from a folder, with tensors named as in transformers."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from exporter.formats.format import Float32
from exporter.foundation.config_files import shown
from exporter.foundation.errors import InputError
from exporter.model.decoder import EMBEDDING, HEAD
from exporter.model.family import Multimodal
from exporter.model.json_file import read_json_object
from exporter.model.recognised import FLOATS, no_weights
from exporter.model.tensors import INDEX, SINGLE, require_finite

PREFIX = "model."
# Ranks of a training run write such files. transformers prefers them to all others.
RANKS = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
COARSE = ("F8_E4M3", "F8_E5M2")
ROWS_AT_ONCE = 4096
# The header entry of a tensor takes about 100 bytes.
MOST_HEADER_BYTES = 16 << 20


@dataclass(frozen=True)
class Held:
    """A tensor in a file.

    Attributes:
        file: The file.
        name: Its name in the file.
        shape: Its dimensions.
        dtype: Its type as named by safetensors.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a folder by name, read one at a time: a `TensorSource`.

    Attributes:
        folder: The folder.
        files: The files.
        tensors: Name -> tensor.
        notes: Sentences for the report on which files were used and which were not.
    """

    folder: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, Held]
    notes: tuple[str, ...] = ()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by name; reads no weights."""
        return {name: held.shape for name, held in self.tensors.items()}

    def read(self, name: str) -> Float32:
        """Return one tensor as float32, finite."""
        held = self._floats(name)
        with safe_open(held.file, framework="pt") as file:
            return require_finite(file.get_tensor(held.name).float().numpy(), name)

    def read_rows(self, name: str, rows: NDArray[np.int64]) -> Float32:
        """Return some rows of a matrix as float32, finite."""
        held = self._floats(name)
        with safe_open(held.file, framework="pt") as file:
            matrix = file.get_slice(held.name)
            some = torch.cat([matrix[first:last] for first, last in _runs(rows)])
        return require_finite(some.float().numpy(), name)

    def _floats(self, name: str) -> Held:
        held = self.tensors[name]
        if held.dtype not in FLOATS:
            raise InputError(
                "the tensor is not of a floating-point type",
                where=name,
                got=held.dtype,
                expected="float32, float16 or bfloat16",
                next_step="give the model before quantisation",
            )
        return held

    def named_for(self, known: Collection[str]) -> "Checkpoint":
        """Return the tensors under the names that transformers gives them.

        transformers adds or removes the base model's prefix if the result is the name of a tensor of the model.

        Args:
            known: Names of all tensors of the model.

        Raises:
            InputError: two tensors would have one name.
        """
        return self._renamed({name: _name_in(name, known) for name in self.tensors})

    def decoder_of(self, form: Multimodal) -> "Checkpoint":
        """Return the tensors of the decoder in a multimodal model, under the names that they have in a decoder alone.

        Raises:
            InputError: a tensor is neither the decoder's nor known to be of what is left out, or two have one name.
        """
        left = set(filter(form.leaves_out, self.tensors))
        names = {name: _name_by(name, form.prefixes) for name in self.tensors if name not in left}
        strange = sorted(name for name, given in names.items() if given is None)
        if strange:
            raise InputError(
                f"the model holds a tensor that a {form.architecture} is not known to use: {strange[0]}",
                where=self.folder, got=f"{len(strange)} such tensors",
                expected="tensors of the decoder, or of the encoder of images, which is left out",
            )  # fmt: skip
        note = (
            f"the model is a {form.architecture}: only its decoder is built, for texts alone; "
            f"not used: {len(left)} tensors of its encoder of images"
        )
        noted = replace(self, notes=(*self.notes, note))
        return noted._renamed({name: given for name, given in names.items() if given is not None})

    def _renamed(self, names: Mapping[str, str]) -> "Checkpoint":
        """Return tensors under other names: name -> other name."""
        named: dict[str, Held] = {}
        for name, given in names.items():
            held = self.tensors[name]
            if given in named:
                raise InputError(
                    f"two tensors of the folder are {given}",
                    where=self.folder,
                    got=f"{named[given].name} and {held.name}",
                    expected="one",
                    next_step="remove the one that is not the model's",
                )
            named[given] = held
        return replace(self, tensors=named)

    def has_own_head(self) -> bool:
        """Return whether embedding and head are both stored and differ; transformers does not tie these."""
        stored = EMBEDDING in self.tensors and HEAD in self.tensors
        return stored and not _equal(self.tensors[EMBEDDING], self.tensors[HEAD])

    def tied(self) -> "Checkpoint":
        """Return the tensors with a single matrix for embedding and head, whichever is stored."""
        tensors = dict(self.tensors)
        head = tensors.pop(HEAD, None)
        if head is not None:
            tensors.setdefault(EMBEDDING, head)
        return replace(self, tensors=tensors)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Return the tensors that transformers loads from a folder, by their names in the files; reads only headers.

    Raises:
        InputError: there are no safetensors files, or they are damaged.
    """
    single, index = folder / SINGLE, folder / INDEX
    if any(RANKS.fullmatch(path.name) for path in folder.glob("shard-*.safetensors")):
        raise InputError(
            "the folder holds a distributed checkpoint of a training run",
            where=folder,
            expected=f"{SINGLE} or {INDEX}",
            next_step="load it with from_pretrained and save it with save_pretrained",
        )
    if single.is_file():
        return _of_files(folder, (single,))
    if not index.is_file():
        raise no_weights(folder)
    places = _places(index)
    checkpoint = _of_files(folder, tuple(sorted({folder / file for file in places.values()})))
    missing = sorted(set(places) - set(checkpoint.tensors))
    if missing:
        raise InputError(
            f"the index names a tensor that its shard does not hold: {missing[0]}",
            where=folder / places[missing[0]],
            next_step="fetch the model again",
        )
    return checkpoint


def open_file(file: Path) -> Checkpoint:
    """Return the tensors of one file, by their names in it; reads only the header.

    Raises:
        InputError: it is damaged.
    """
    return Checkpoint(file.parent, (file,), _header(file))


def _of_files(folder: Path, files: tuple[Path, ...]) -> Checkpoint:
    tensors: dict[str, Held] = {}
    twice = set()
    for file in files:
        held = _header(file)
        twice |= tensors.keys() & held.keys()
        tensors |= held
    notes = list(_notes(folder, files, twice))
    coarse = sorted({held.dtype for held in tensors.values()} & set(COARSE))
    if coarse:
        notes.append(
            f"weights are stored as {' and '.join(coarse)} without scales: they are read as the numbers that they are, "
            "on a coarse grid, so formats of as many bits look lossless against them"
        )
    return Checkpoint(folder, files, tensors, tuple(notes))


def _notes(folder: Path, files: tuple[Path, ...], twice: Collection[str]) -> Iterator[str]:
    """Yield sentences on which files or tensors were used if the folder leaves a choice."""
    patterns = ("*.safetensors", "*.safetensors.index.json", "*.gguf", "pytorch_model*.bin", "consolidated*.pth")
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    taken = {*files, *([] if files == (folder / SINGLE,) else [folder / INDEX])}
    left = sorted(path.name for path in found - taken)
    if left:
        name = files[0].name if len(files) == 1 else f"the {len(files)} files of {INDEX}"
        yield f"the weights are those of {name}, which transformers loads; not used: {_listed(left)}"
    if twice:
        yield f"several shards hold {_listed(sorted(twice))}: the last in order of names counts, as in transformers"


def _listed(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _places(index: Path) -> dict[str, str]:
    """Return tensor name -> file from the index of shards."""
    places = read_json_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError("the index of shards cannot be read", where=index, got=shown(places), expected="a weight_map")
    for file in places.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors") or "\0" in file:
            raise InputError(
                "the index names a file outside the folder",
                where=index,
                got=shown(file),
                expected="the name of a .safetensors file beside it",
                next_step="do not use this model",
            )
        if not index.with_name(file).is_file():
            raise InputError("a shard is missing", where=index.with_name(file), next_step="fetch the model again")
    return places


def _header(file: Path) -> dict[str, Held]:
    """Return the tensors of one safetensors file; the library checks offsets against the file size."""
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
        if size > MOST_HEADER_BYTES:
            raise ValueError(f"a header of {size:,} bytes, more than {MOST_HEADER_BYTES:,}")
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  (not a dict)
            return {name: Held(file, name, tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()}
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise InputError(
            "the safetensors file is truncated or damaged",
            where=file,
            got=" ".join(str(error).split())[:300],
            next_step="fetch this file again",
        ) from error


def _runs(rows: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield first and end of each run of consecutive rows."""
    ends = np.flatnonzero(np.diff(rows) != 1) + 1
    for run in np.split(rows, ends):
        yield int(run[0]), int(run[-1]) + 1


def _name_in(name: str, known: Collection[str]) -> str:
    bare = name.removeprefix(PREFIX)
    if bare != name and bare in known:
        return bare
    return PREFIX + name if PREFIX + name in known else name


def _name_by(name: str, prefixes: Mapping[str, str]) -> str | None:
    """Return a name with another prefix; None if it begins with none of them."""
    found = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
    return None if found is None else prefixes[found] + name.removeprefix(found)


def _equal(one: Held, other: Held) -> bool:
    """Return whether two tensors hold the same values; reads them in blocks of rows."""
    if one.shape != other.shape or not one.shape:
        return False
    with safe_open(one.file, framework="pt") as first, safe_open(other.file, framework="pt") as second:
        left, right = first.get_slice(one.name), second.get_slice(other.name)
        parts = [slice(start, start + ROWS_AT_ONCE) for start in range(0, one.shape[0], ROWS_AT_ONCE)]
        return all(torch.equal(left[part].float(), right[part].float()) for part in parts)
