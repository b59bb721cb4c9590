"""Opens a bundle for use: all that runtimes get from it is checked first, or rewritten.

No part of a bundle is code. A runtime gets only files with numbers and text, under fixed names. Settings can make
onnxruntime-genai load a library or write a file, so this exporter rewrites them. See `exporter.targets.intake`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from exporter.bundle.digests import read_listed, require_listed, require_sizes
from exporter.bundle.manifest import FileEntry, Manifest, places_of, standing_for
from exporter.bundle.reading import read_manifest, unreadable
from exporter.coding.container import original_of
from exporter.foundation.cache import scratch_folder
from exporter.foundation.errors import ExporterError, InputError, RequestError, RuntimeCrashError
from exporter.targets.artifact import Artifact, runs_coded
from exporter.targets.intake import Read, intake_of

MODEL = "model"
UNPACK = "restore it with edge-exporter unpack"


@dataclass(frozen=True)
class Shipped:
    """A file that a manifest lists, and the file that is present for it: itself or its coded form."""

    entry: FileEntry
    standing: FileEntry

    @property
    def coded(self) -> bool:
        """Whether the coded form is present."""
        return self.standing is not self.entry


@contextmanager
def opened_bundle(bundle: Path, may_be_coded: bool = False, check: bool = True) -> Iterator[Artifact]:
    """Yield the artifact of a bundle, safe to load, as long as the block lasts.

    Args:
        bundle: The bundle's folder.
        may_be_coded: Accept coded files as they are, if the target can run them.
        check: Compare the model's files with the SHA-256 that the manifest lists, not only their sizes.

    Raises:
        InputError: a file is missing, is not as listed, or asks a runtime for something that no bundle of this exporter
            asks for; or the block finds fault with the bundle, or crashes a runtime.
        RequestError: a file is coded.
    """
    manifest = read_manifest(bundle)
    files = shipped(bundle, manifest)
    coded = [file.standing.path for file in files if file.coded]
    if coded and not (may_be_coded and runs_coded(manifest.target)):
        raise RequestError("the bundle's model is coded", where=bundle / coded[0], next_step=UNPACK)
    require_sizes(bundle, (file.standing for file in files))
    if check:
        require_listed(bundle, (file.standing for file in files if _name(file.entry) is not None))
    with admitted(bundle, manifest, files) as artifact:
        try:
            yield artifact
        except ExporterError as error:
            raise _of_the_bundle(error, artifact, bundle) from error


def _of_the_bundle(error: ExporterError, artifact: Artifact, bundle: Path) -> ExporterError:
    """Return an error with the bundle's own paths. A runtime crash is the bundle's fault, since it ran once."""
    said = str(error).replace(str(artifact.folder), str(bundle / MODEL))
    if not isinstance(error, RuntimeCrashError):
        return type(error)(said)
    next_step = "see edge-exporter verify, and get the bundle again"
    return InputError("the bundle's model cannot be run", where=bundle, got=said, next_step=next_step)


def shipped(bundle: Path, manifest: Manifest) -> list[Shipped]:
    """Return every file of a bundle with the file that is present for it."""
    try:
        places = (place for entry in manifest.files for place in places_of(entry))
        present = {place for place in places if (bundle / place).is_file()}
    except OSError as error:
        raise unreadable(bundle, error) from error
    return [Shipped(entry, standing_for(entry, present)) for entry in manifest.files]


@contextmanager
def admitted(bundle: Path, manifest: Manifest, files: list[Shipped]) -> Iterator[Artifact]:
    """Yield the artifact of a bundle after the checks of its target; its files have the listed sizes already.

    Raises:
        InputError: see `exporter.targets.intake.Intake`.
        RequestError: only some of the model's files are coded.
    """
    intake = intake_of(manifest.target)
    named = {name: file for file in files if (name := _name(file.entry)) is not None}
    missing = [name for name in intake.weights[: intake.required] if name not in named]
    if missing:
        raise InputError(
            "the manifest lists no such model file", where=bundle, got=f"none named {missing[0]}",
            next_step="get the bundle again",
        )  # fmt: skip
    weights = [named[name] for name in intake.weights if name in named]
    coded = [file for file in weights if file.coded]
    if coded and len(coded) < len(weights):
        listed = ", ".join(file.standing.path for file in coded)
        raise RequestError("only some of the model's files are coded", where=bundle, got=listed, next_step=UNPACK)
    for file in coded:
        require_original(bundle, file)
    artifact = Artifact(
        manifest.target, bundle / MODEL, tuple(bundle / file.standing.path for file in weights), bool(coded)
    )
    with scratch_folder() as folder:
        (folder / MODEL).mkdir()
        yield intake.admit(artifact, named, _reader(bundle, named), folder / MODEL)


def require_original(bundle: Path, file: Shipped) -> None:
    """Refuse a coded file of another name or size than the manifest lists, before it is decoded.

    Raises:
        InputError: the file is refused.
    """
    path = bundle / file.standing.path
    try:
        stated = original_of(path)
    except OSError as error:
        raise unreadable(path, error) from error
    expected = (file.entry.path.rpartition("/")[2], file.entry.size)
    if (stated.name, stated.size) != expected:
        raise InputError(
            "the coded file is that of another than the manifest lists", where=path,
            got=f"{stated.name!r}, {stated.size:,} bytes", expected=f"{expected[0]!r}, {expected[1]:,} bytes",
            next_step="get the bundle again",
        )  # fmt: skip


def _name(entry: FileEntry) -> str | None:
    """Return the path of a file below the model's folder; None if it is not in there."""
    folder, _, name = entry.path.partition("/")
    return name if folder == MODEL and name else None


def _reader(bundle: Path, named: Mapping[str, Shipped]) -> Read:
    def read(name: str, most_bytes: int) -> bytes:
        if name not in named or named[name].coded:
            raise InputError("the manifest lists no such file", where=bundle / MODEL / name)
        return read_listed(bundle, named[name].entry, most_bytes)

    return read
