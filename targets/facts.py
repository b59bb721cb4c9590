"""What other parts need to know of a target without its libraries: the file `target.toml` of its folder."""

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from exporter.device.provenance import Text
from exporter.foundation.config_files import read_document
from exporter.foundation.errors import RequestError
from exporter.foundation.quantities import Document
from exporter.targets.artifact import part_of, target_names

FILE = "target.toml"
Texts = Annotated[tuple[Text, ...], Field(strict=False)]


class TargetFacts(Document):
    """What is known of a target without its libraries.

    Attributes:
        runtime: The runtime's name, for the user.
        libraries: Packages that decide the bytes of artifacts.
        runtime_libraries: Packages that run them; the manifest states their versions.
        text_libraries: Packages that decide how the runtime handles text.
        settings: Files beside the weights from which the runtime reads how to compute.
        other_settings: Files beside the weights for other programs.
        runtime_words: Words in the names of runtimes that use memory as this one does.
        reference: It is the runtime whose kernels and memory are assumed where none is named.
        session: The target whose `session.py` runs the artifacts on a device; None for its own.
        llama_bench: The program `llama-bench` runs an artifact of one file.
        samples: The runtime continues several texts at once; see `exporter.targets.runtime.SamplingRuntime`.
    """

    schema_version: Literal[1]
    runtime: Text
    libraries: Texts = ()
    runtime_libraries: Texts = ()
    text_libraries: Texts = ()
    settings: Texts = ()
    other_settings: Texts = ()
    runtime_words: Texts = ()
    reference: bool = False
    session: Text | None = None
    llama_bench: bool = False
    samples: bool = False


@cache
def facts_of(target: str) -> TargetFacts:
    """Return the facts of a target: its file, or else `FACTS` in its `target.py`."""
    path = files("exporter.targets") / target.replace("-", "_") / FILE
    if not path.is_file():
        facts: TargetFacts = part_of(target, "target").FACTS
        return facts
    return read_document(path, TargetFacts, "file of a target's facts")


@cache
def libraries() -> tuple[str, ...]:
    """Return the packages that decide the bytes of any target's artifacts."""
    return tuple(dict.fromkeys(name for target in target_names() for name in facts_of(target).libraries))


@cache
def settings_files() -> frozenset[str]:
    """Return the names of all targets' files of settings."""
    facts = [facts_of(target) for target in target_names()]
    return frozenset(name for one in facts for name in (*one.settings, *one.other_settings))


def session_file(target: str) -> Path:
    """Return the standalone file that runs a target's artifacts; see `exporter.bench.probe`.

    Raises:
        RequestError: the target has none.
    """
    owner = facts_of(target).session or target
    path = Path(str(files("exporter.targets"))) / owner.replace("-", "_") / "session.py"
    if not path.is_file():
        raise RequestError(
            f"the target {target} has no program for devices", next_step="build the model for another target"
        )
    return path


def llama_bench_targets() -> list[str]:
    """Return the names of the targets whose artifacts llama-bench runs."""
    return [name for name in target_names() if facts_of(name).llama_bench]


def sampling_targets() -> list[str]:
    """Return the names of the targets whose runtimes sample."""
    return [name for name in target_names() if facts_of(name).samples]
