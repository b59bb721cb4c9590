"""LoRA adapters in PEFT's format: which matrices of a base they change, and the tensors of both merged on reading.

An adapter folder holds adapter_config.json and adapter_model.safetensors. For a matrix W of the base, the latter holds
A, [rank, columns], and B, [rows, rank]; the merged matrix is W + scaling * B A, where scaling is alpha / rank, or
alpha / sqrt(rank) if it is rank-stabilised. For a table of embeddings, whose layer looks up rows instead of multiplying
by them, A is [rank, rows], B is [columns, rank], and the product is transposed. An adapter may also hold whole tensors
that take the place of the base's. All formulas are PEFT's (`peft.tuners.lora`, 0.21).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporter.formats.format import Float32
from exporter.foundation.errors import InputError, RequestError
from exporter.model.adapter_settings import AdapterSettings
from exporter.model.checkpoint import Checkpoint, open_file
from exporter.model.decoder import EMBEDDING, HEAD, Decoder
from exporter.model.recognised import ADAPTER
from exporter.model.tensors import TensorSource, require_finite

WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
PREFIX = "base_model.model."
# Ending of a name -> which factor it is, and whether it is one of a table of embeddings.
FACTORS = {
    ".lora_A.weight": ("A", False),
    ".lora_B.weight": ("B", False),
    ".lora_embedding_A": ("A", True),
    ".lora_embedding_B": ("B", True),
}
WEIGHT = ".weight"
BASE_LAYER = ".base_layer.weight"
ENDS = {EMBEDDING, HEAD}
OTHER_BASE = "check that the adapter belongs to this base"
# What to do where an adapter cannot be kept beside its base.
MERGE_INSTEAD = "merge it: --adapter merge"


@dataclass(frozen=True)
class Factors:
    """The factors of one matrix.

    Attributes:
        a: Name of A in the adapter's file.
        b: Name of B.
        scaling: Factor of their product.
        embedding: The matrix is a table of embeddings, so the product is transposed.
    """

    a: str
    b: str
    scaling: float
    embedding: bool

    def read(self, tensors: TensorSource) -> tuple[Float32, Float32]:
        """Return L, [rows, rank], and R, [rank, columns]; L R is what is added to the matrix."""
        a, b = tensors.read(self.a), tensors.read(self.b)
        left, right = (a.T, b.T) if self.embedding else (b, a)
        return np.float32(self.scaling) * left, right


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on a base.

    Attributes:
        settings: What its adapter_config.json says.
        tensors: The tensors of its file, by their names there.
        factors: Name of a tensor of the base -> its factors.
        copies: Name of a tensor of the base -> name of the tensor that takes its place.
        decoder: The merged model's: with the adapter's vocabulary, and tied only if the merged model is.
    """

    settings: AdapterSettings
    tensors: Checkpoint
    factors: Mapping[str, Factors]
    copies: Mapping[str, str]
    decoder: Decoder

    @property
    def files(self) -> tuple[Path, ...]:
        """Its files."""
        return self.settings.path, *self.tensors.files

    @property
    def merged_note(self) -> str:
        """A sentence for the report on what it changes, merged."""
        copied = f", and {len(self.copies)} tensors are its own" if self.copies else ""
        return f"a LoRA adapter is merged into the base in float32: it changes {len(self.factors)} matrices{copied}"

    @property
    def kept_note(self) -> str:
        """A sentence for the report on what it changes, kept beside the base."""
        return (
            f"a LoRA adapter is kept beside the base, whose matrices are encoded without it: it changes "
            f"{len(self.factors)} matrices, and accuracy is that of both together against the merged model"
        )


def open_adapter(settings: AdapterSettings, decoder: Decoder) -> Adapter:
    """Return the adapter of a folder for a base; reads only headers, and embeddings to see whether they are tied.

    Args:
        settings: From `read_adapter_settings`.
        decoder: The base's.

    Raises:
        InputError: there is no adapter file, it is damaged, a tensor of it belongs to nothing in the base or has the
            wrong shape, or what the merged model would be depends on who merges.
    """
    path = settings.path.with_name(WEIGHTS)
    if not path.is_file():
        raise _no_weights(path)
    tensors = open_file(path)
    factors, copies = _assigned(settings, tensors, decoder)
    tied = decoder.tied
    if tied:
        tied = not _renamed(tensors, copies).has_own_head()
        _refuse_ambiguous(settings, path, ENDS & factors.keys(), ENDS & copies.keys(), tied)
        if tied and HEAD in copies:
            copies = {EMBEDDING: copies[HEAD]} | {name: one for name, one in copies.items() if name != HEAD}
    rows = tensors.shapes()[copies[EMBEDDING]][:1] if EMBEDDING in copies else ()
    merged = replace(decoder, tied=tied, vocab=rows[0] if rows else decoder.vocab)
    if merged.vocab != decoder.vocab and not tied and HEAD not in copies:
        raise InputError(
            "the adapter has an embedding for another vocabulary, but no head for it", where=path,
            got=f"{merged.vocab} rows", expected=f"{decoder.vocab} rows, as the base has, or a head as well",
            next_step="save the adapter with save_embedding_layers=True",
        )  # fmt: skip
    adapter = Adapter(settings, tensors, factors, copies, merged)
    _check_shapes(adapter)
    return adapter


def _assigned(
    settings: AdapterSettings, tensors: Checkpoint, decoder: Decoder
) -> tuple[dict[str, Factors], dict[str, str]]:
    """Return the factors, and the names of whole tensors, by the base's tensors that they belong to."""
    path = tensors.files[0]
    # A tied head is no tensor of its own, but an adapter may hold one.
    known = {*decoder.stored_tensors(), HEAD}
    pairs: dict[str, dict[str, str]] = {}
    copies: dict[str, str] = {}
    for name in tensors.tensors:
        target, kind = _split(name)
        if not name.startswith(PREFIX) or target not in known:
            raise InputError(
                f"the adapter holds a tensor that belongs to nothing in the base: {name:.200}", where=path,
                expected=f"LoRA factors or whole tensors of a {decoder.family.architecture}", next_step=OTHER_BASE,
            )  # fmt: skip
        if kind is None:
            if target in copies:
                raise InputError(f"the adapter holds {target} twice", where=path, got=f"{copies[target]} and {name}")
            copies[target] = name
            continue
        if not settings.adapts(target.removesuffix(WEIGHT)):
            raise InputError(
                f"the adapter holds factors of a module that {ADAPTER} does not name: {name:.200}", where=path,
                expected="factors of target_modules alone", next_step="fetch or save the adapter again",
            )  # fmt: skip
        if kind[1] != (target == EMBEDDING):
            raise _wrong_kind(name, path)
        pairs.setdefault(target, {})[kind[0]] = name
    if not pairs and not copies:
        raise InputError("the adapter holds no tensors", where=path, next_step="fetch or save the adapter again")
    return {target: _factors(settings, target, pair, path) for target, pair in pairs.items()}, copies


def _factors(settings: AdapterSettings, target: str, pair: Mapping[str, str], path: Path) -> Factors:
    if len(pair) < 2:
        raise InputError(
            f"the adapter holds only one factor of {target}", where=path, got=next(iter(pair.values())),
            expected="A and B", next_step="fetch or save the adapter again",
        )  # fmt: skip
    return Factors(pair["A"], pair["B"], settings.scaling_of(target.removesuffix(WEIGHT)), target == EMBEDDING)


def _refuse_ambiguous(settings: AdapterSettings, path: Path, factors: set[str], copies: set[str], equal: bool) -> None:
    """Reject changes to one of embedding and head if they are tied in the base.

    PEFT computes with two matrices while the adapter is beside the base, and with one after merging.

    Args:
        settings: The adapter's.
        path: Its file, for messages.
        factors: Which of the two have factors.
        copies: Which of the two are replaced.
        equal: They are replaced by the same, or not both replaced.
    """
    listed = {target for target in copies if not settings.keeps_tied and settings.saves(target.removesuffix(WEIGHT))}
    if factors or (listed and len(copies) == 1) or not (equal or listed == ENDS):
        raise InputError(
            "the base ties embedding and head, and the adapter changes one of them: before and after merging, PEFT "
            "computes different models",
            where=path, got=", ".join(sorted(factors or copies)), expected="both in modules_to_save, or neither",
            next_step="merge it with PEFT, check the result, and give what that saves",
        )  # fmt: skip


def _renamed(tensors: Checkpoint, copies: Mapping[str, str]) -> Checkpoint:
    return replace(tensors, tensors={target: tensors.tensors[name] for target, name in copies.items()})


def _split(name: str) -> tuple[str, tuple[str, bool] | None]:
    """Return the base's tensor that a name in an adapter's file is about, and which factor it is; None for a copy."""
    bare = name.removeprefix(PREFIX)
    for ending, kind in FACTORS.items():
        if bare.endswith(ending):
            return bare.removesuffix(ending) + WEIGHT, kind
    return (bare.removesuffix(BASE_LAYER) + WEIGHT if bare.endswith(BASE_LAYER) else bare), None


def _no_weights(path: Path) -> InputError:
    pickled = path.with_name(PICKLED)
    if pickled.exists():
        return InputError(
            "the folder holds an adapter in a pickle, which may run code and is not read", where=pickled,
            expected=WEIGHTS, next_step="load it with PEFT where you trust it, and save it with save_pretrained",
        )  # fmt: skip
    return InputError(f"the folder holds an adapter's settings, but no {WEIGHTS}", where=path.parent)


def _wrong_kind(name: str, path: Path) -> InputError:
    return InputError(
        f"the adapter's factor is of another kind than its module: {name:.200}", where=path,
        expected="lora_embedding_A and lora_embedding_B for the embedding, lora_A.weight and lora_B.weight for others",
        next_step=OTHER_BASE,
    )  # fmt: skip


def _check_shapes(adapter: Adapter) -> None:
    path, held, needed = adapter.tensors.files[0], adapter.tensors.shapes(), adapter.decoder.stored_tensors()
    for target, name in adapter.copies.items():
        _require_shape(held[name], needed[target], name, path)
    for target, factors in adapter.factors.items():
        if len(needed[target]) != 2:
            raise _wrong_kind(factors.a, path)
        rows, columns = reversed(needed[target]) if factors.embedding else needed[target]
        rank = adapter.settings.rank_of(target.removesuffix(WEIGHT))
        _require_shape(held[factors.a], (rank, columns), factors.a, path)
        _require_shape(held[factors.b], (rows, rank), factors.b, path)


def _require_shape(got: Sequence[int], expected: Sequence[int], name: str, path: Path) -> None:
    if tuple(got) != tuple(expected):
        raise InputError(
            f"the adapter's tensor has the wrong shape: {name:.200}", where=path, got=list(got),
            expected=list(expected), next_step=f"{OTHER_BASE}, and that {ADAPTER} belongs to {WEIGHTS}",
        )  # fmt: skip


class Merged:
    """The tensors of a base with an adapter merged into them: a `TensorSource`.

    Args:
        base: The base, with tensors as they are stored.
        adapter: The adapter.
    """

    def __init__(self, base: TensorSource, adapter: Adapter) -> None:
        self._base, self._adapter = base, adapter
        self.files = [*base.files, *adapter.files]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by name; reads no weights."""
        held = self._adapter.tensors.shapes()
        return self._base.shapes() | {target: held[name] for target, name in self._adapter.copies.items()}

    def read(self, name: str) -> Float32:
        """Return one tensor as float32, finite."""
        source, place = self._unadapted(name)
        factors = self._adapter.factors.get(name)
        if factors is None:
            return source.read(place)
        left, right = factors.read(self._adapter.tensors)
        merged: Float32 = left @ right
        merged += source.read(place)
        return require_finite(merged, name)

    def read_rows(self, name: str, rows: NDArray[np.int64]) -> Float32:
        """Return some rows of a matrix as float32, finite."""
        source, place = self._unadapted(name)
        values = source.read_rows(place, rows)
        factors = self._adapter.factors.get(name)
        if factors is None:
            return values
        left, right = factors.read(self._adapter.tensors)
        return require_finite(values + left[rows] @ right, name)

    def _unadapted(self, name: str) -> tuple[TensorSource, str]:
        """Return where a tensor without its factors is, and its name there."""
        copy = self._adapter.copies.get(name)
        return (self._base, name) if copy is None else (self._adapter.tensors, copy)


class Kept:
    """The tensors of a base with an adapter's factors beside them: a `TensorSource` that `HoldsFactors`.

    Args:
        base: The base, with single matrices in place of the tensors that hold several.
        adapter: The adapter; see `require_factors_alone`.
    """

    def __init__(self, base: TensorSource, adapter: Adapter) -> None:
        self._base, self._adapter = base, adapter
        self.files = base.files

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of the base by name; reads no weights."""
        return self._base.shapes()

    def read(self, name: str) -> Float32:
        """Return one tensor of the base as float32, finite."""
        return self._base.read(name)

    def read_rows(self, name: str, rows: NDArray[np.int64]) -> Float32:
        """Return some rows of a matrix of the base as float32, finite."""
        return self._base.read_rows(name, rows)

    def ranks(self) -> Mapping[str, int]:
        """Return the rank of the factors of each matrix that has some, by its name."""
        settings = self._adapter.settings
        return {name: settings.rank_of(name.removesuffix(WEIGHT)) for name in self._adapter.factors}

    def factors(self, name: str) -> tuple[Float32, Float32]:
        """Return L, float32 [rows, rank], and R, float32 [rank, columns], of a matrix; the scaling is in L."""
        left, right = self._adapter.factors[name].read(self._adapter.tensors)
        return require_finite(left, name), right


def require_factors_alone(adapter: Adapter) -> None:
    """Refuse an adapter that cannot be kept beside its base: it has more than factors of single matrices.

    Raises:
        RequestError: see above.
    """
    path = adapter.tensors.files[0]
    if adapter.copies:
        raise RequestError(
            "the adapter replaces whole tensors of the base, so it cannot be kept beside it", where=path,
            got=_some(adapter.copies), expected="factors of matrices alone", next_step=MERGE_INSTEAD,
        )  # fmt: skip
    single = {group.name for group in adapter.decoder.groups()}
    others = [name for name in adapter.factors if name not in single]
    if others:
        raise RequestError(
            "the adapter has factors of a tensor that is not one matrix here, so it cannot be kept beside the base",
            where=path, got=_some(others), expected="factors of single matrices", next_step=MERGE_INSTEAD,
        )  # fmt: skip


def _some(names: Collection[str]) -> str:
    first = sorted(names)
    return first[0] + (f" and {len(first) - 1} more" if len(first) > 1 else "")
