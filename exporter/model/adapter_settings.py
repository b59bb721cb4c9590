"""Reads adapter_config.json of a PEFT adapter: only keys that are merged exactly, and those that change nothing."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from exporter.foundation.config_files import shown
from exporter.foundation.errors import InputError
from exporter.model.json_file import read_json_object
from exporter.model.recognised import ADAPTER

# What becomes of an adapter: it is merged into its base, or kept beside it.
AdapterUse = Literal["merge", "keep"]
# A rank and an alpha for each of 18,000 matrices, by its full name, take 3 MB.
MAX_CONFIG_BYTES = 4 << 20
MAX_RANK = 1 << 16
MAX_ALPHA = 1e9
MOST_NAMES = 1000
# Keys that say how an adapter was trained, or whose effect shows in the names of its tensors.
NEUTRAL = frozenset(
    {
        "auto_mapping", "base_model_class", "corda_config", "eva_config", "exclude_modules", "inference_mode",
        "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
        "modules_to_save", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules",
        "task_type",
    }
)  # fmt: skip
# Keys that this module reads.
READ = frozenset(
    {
        "alpha_pattern", "base_model_name_or_path", "bias", "ensure_weight_tying", "init_lora_weights", "lora_alpha",
        "peft_type", "r", "rank_pattern", "use_rslora",
    }
)  # fmt: skip
# Ways to start a training that leave the base as it is; the others subtract from it what they start with.
STARTS = ("gaussian", "eva", "orthogonal")
# The name of one or more modules: parts of a path, of which the first may be left out unless there is a caret.
PATTERN = re.compile(r"(\^?[\w.]+)\$?")
MERGE = "merge it with PEFT (merge_and_unload, save_pretrained) and give what that saves"


@dataclass(frozen=True)
class AdapterSettings:
    """What adapter_config.json says, checked.

    Attributes:
        path: The file.
        base: `base_model_name_or_path`: a path or a hub id; empty for none.
        revision: The base's revision on the hub; None for the usual one.
        rank: Rank of each matrix that `ranks` does not name.
        alpha: Alpha of each matrix that `alphas` does not name.
        stabilised: The scaling is alpha / sqrt(rank) instead of alpha / rank.
        ranks: Pattern -> rank.
        alphas: Pattern -> alpha.
        saved: Names of the modules whose tensors are replaced as a whole.
        targets: Names of the modules with factors; None if a regular expression names them.
        keeps_tied: What replaces a tied embedding replaces the head too.
    """

    path: Path
    base: str
    revision: str | None
    rank: int
    alpha: float
    stabilised: bool
    ranks: "Patterns"
    alphas: "Patterns"
    saved: tuple[str, ...]
    targets: tuple[str, ...] | None
    keeps_tied: bool

    def rank_of(self, module: str) -> int:
        """Return the rank of a module."""
        return int(self.ranks.value(module, self.rank))

    def scaling_of(self, module: str) -> float:
        """Return the factor of B A for a module."""
        rank, alpha = self.rank_of(module), self.alphas.value(module, self.alpha)
        return alpha / (math.sqrt(rank) if self.stabilised else rank)

    def saves(self, module: str) -> bool:
        """Return whether a module is replaced as a whole."""
        return _is_named(module, self.saved)

    def adapts(self, module: str) -> bool:
        """Return whether a module has factors; PEFT reads no others."""
        return not self.saves(module) and (self.targets is None or _is_named(module, self.targets))


def _is_named(module: str, names: Sequence[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


class Patterns:
    """Values by the names of modules; of several that match a module, the first one counts, as in PEFT.

    Args:
        values: Name -> value; a name may leave out the first parts of a module's path unless it begins with a caret.
    """

    def __init__(self, values: Mapping[str, float]) -> None:
        self._values = {name: (place, value) for place, (name, value) in enumerate(values.items())}

    def value(self, module: str, default: float) -> float:
        """Return the value for a module."""
        parts = module.split(".")
        names = [f"^{module}", *(".".join(parts[first:]) for first in range(len(parts)))]
        found = [self._values[name] for name in names if name in self._values]
        return min(found)[1] if found else default


def read_adapter_settings(folder: Path) -> AdapterSettings:
    """Return what the adapter_config.json of a folder says.

    Raises:
        InputError: the file is damaged, or asks for something that is not merged exactly.
    """
    path = folder / ADAPTER
    raw = read_json_object(path, MAX_CONFIG_BYTES)
    if raw.get("peft_type") != "LORA":
        raise InputError(
            "the adapter is of a kind that is not read", where=path, got=f"peft_type {shown(raw.get('peft_type'))}",
            expected="LORA", next_step=MERGE,
        )  # fmt: skip
    _refuse_others(raw, path)
    base, revision = raw.get("base_model_name_or_path") or "", raw.get("revision")
    _require(isinstance(base, str) and "\0" not in base, path, "base_model_name_or_path", base, "a path or a hub id")
    _require(revision is None or _is_revision(revision), path, "revision", revision, "the name of a revision")
    stabilised, keeps_tied = _flag(raw, "use_rslora", path), _flag(raw, "ensure_weight_tying", path)
    saved, targets = _names(raw, "modules_to_save", path), raw.get("target_modules")
    return AdapterSettings(
        path, base, revision, _rank(raw.get("r"), path, "r"), _alpha(raw.get("lora_alpha"), path, "lora_alpha"),
        stabilised, _patterns(raw, "rank_pattern", path, _rank), _patterns(raw, "alpha_pattern", path, _alpha),
        saved, None if isinstance(targets, str) else _names(raw, "target_modules", path), keeps_tied,
    )  # fmt: skip


def _flag(raw: Mapping[str, Any], key: str, path: Path) -> bool:
    flag = raw.get(key) or False
    _require(isinstance(flag, bool), path, key, flag, "true or false")
    return bool(flag)


def _names(raw: Mapping[str, Any], key: str, path: Path) -> tuple[str, ...]:
    names = raw.get(key) or []
    fits = isinstance(names, list) and len(names) <= MOST_NAMES and all(isinstance(name, str) for name in names)
    _require(fits, path, key, names, f"a list of at most {MOST_NAMES} names of modules")
    return tuple(names)


def _is_revision(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w./-]{1,200}", value) is not None and ".." not in value


def _refuse_others(raw: Mapping[str, Any], path: Path) -> None:
    """Reject keys that change what the adapter computes; a key that is null, false or empty switches nothing on."""
    bias, start = raw.get("bias", "none"), raw.get("init_lora_weights", True)
    if bias not in ("none", None):
        raise _unread("bias", bias, "none", path)
    if not (start is None or isinstance(start, bool)) and str(start).lower() not in STARTS:
        raise _unread("init_lora_weights", start, "true or one of " + ", ".join(STARTS), path)
    for key, value in raw.items():
        if key not in NEUTRAL | READ and value not in (None, False, "", [], {}):
            raise _unread(key, value, "a plain LoRA adapter", path)


def _unread(key: str, value: object, expected: str, path: Path) -> InputError:
    return InputError(
        f"{ADAPTER} sets {shown(key)}, which would change the model and is not read", where=path, got=shown(value),
        expected=expected, next_step=MERGE,
    )  # fmt: skip


def _require(fits: bool, path: Path, key: str, got: object, expected: str) -> None:
    if not fits:
        raise InputError(f"{ADAPTER} has no usable {key!r}", where=path, got=shown(got), expected=expected)


def _rank(value: object, path: Path, key: str) -> int:
    fits = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_RANK
    _require(fits, path, key, value, f"a whole number from 1 to {MAX_RANK}")
    assert isinstance(value, int)
    return value


def _alpha(value: object, path: Path, key: str) -> float:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and -MAX_ALPHA < value < MAX_ALPHA
    _require(fits, path, key, value, "a finite number")
    assert isinstance(value, int | float)
    return float(value)


def _patterns(raw: Mapping[str, Any], key: str, path: Path, read: Callable[[object, Path, str], float]) -> Patterns:
    """Return the values of a `rank_pattern` or `alpha_pattern`, whose keys PEFT takes as regular expressions.

    One that is more than a name is refused: it could take for ever.
    """
    values = raw.get(key) or {}
    _require(isinstance(values, dict), path, key, values, "a table")
    found: dict[str, float] = {}
    for pattern, value in values.items():
        name = PATTERN.fullmatch(pattern.replace(r"\.", "."))
        if name is None:
            raise InputError(
                f"{ADAPTER} has a pattern in {key!r} that is no name of modules", where=path, got=shown(pattern),
                expected="a name such as q_proj or model.layers.0.self_attn.q_proj", next_step=MERGE,
            )  # fmt: skip
        found.setdefault(name[1], read(value, path, f"{key}.{pattern:.80}"))
    return Patterns(found)
