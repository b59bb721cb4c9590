"""The interface through which a target's artifacts run in a second runtime, which shares no code with their own."""

from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from exporter.formats.format import Float32
from exporter.foundation.errors import MissingDependencyError, RequestError
from exporter.foundation.registry import folders, load
from exporter.targets.artifact import Artifact


class Judge(Protocol):
    """An artifact in another runtime, in a child process; the target's module `judge` exports the class as `JUDGE`.

    It computes in float32, with as little rounding of its own as the runtime allows.

    Attributes:
        name: The runtime's name in the name of the check, such as `openvino`.
        title: Its name for the user.
        modules: Modules that it needs, which an optional extra of the same name installs.
    """

    name: str
    title: str
    modules: tuple[str, ...]

    def __init__(self, artifact: Artifact, folder: Path, threads: int) -> None:
        """Load an artifact.

        Args:
            artifact: The artifact; its files are not changed.
            folder: An empty folder on its disk, for files that the runtime needs while it runs.
            threads: Threads to compute with.

        Raises:
            InputError: the runtime does not read it, or does not keep its weights.
        """

    def version(self) -> str:
        """Return the runtime's version."""

    def most_kl(self) -> float:
        """Return the largest mean KL, in nats, from the float model with the artifact's weights."""

    def logits(self, tokens: list[int], first: int = 0) -> Float32:
        """Return the logits after each token from position `first`, float32 [tokens - first, vocab]."""


def judge_of(target: str) -> type[Judge]:
    """Return the class of a target's judge.

    Raises:
        RequestError: the target has none.
        MissingDependencyError: what it needs is not installed.
    """
    known = folders("exporter.targets", "judge.py")
    if target not in known:
        raise RequestError(
            f"no second runtime reads artifacts of the target {target}", expected=", ".join(known),
            next_step="leave out --judge",
        )  # fmt: skip
    found: type[Judge] = load("exporter.targets.{}.judge", target, known, "target").JUDGE
    missing = [module for module in found.modules if find_spec(module) is None]
    if missing:
        raise MissingDependencyError(
            f"{found.title} is not installed", got=f"no module {missing[0]}",
            next_step=f"pip install 'edge-exporter[{found.name}]', or leave out --judge",
        )  # fmt: skip
    return found
