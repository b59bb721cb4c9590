"""manifest.json: every file of a bundle with size and SHA-256, and one digest over what a job must reproduce."""

import hashlib
import os
import unicodedata
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from exporter.coding.container import SUFFIX
from exporter.measures import Document
from exporter.report.data import Recipe, canonical_json

MANIFEST = "manifest.json"
REPORT = "report.json"
REPORT_PAGE = "report.html"
MEASUREMENTS = "measurements.json"
SELFTEST = "selftest.json"

# The manifest cannot list itself, nor what will be computed over it.
UNLISTED = frozenset({MANIFEST})
# These differ from run to run: they are listed with their hashes, but stay out of the content digest.
VOLATILE = frozenset({MEASUREMENTS, REPORT_PAGE})

Role = Literal["model", "tokenizer", "config", "report", "measurements", "selftest", "licence", "other"]
TOP_ROLES: dict[str, Role] = {
    REPORT: "report",
    REPORT_PAGE: "report",
    MEASUREMENTS: "measurements",
    SELFTEST: "selftest",
}
MODEL_ROLES: dict[str, Role] = {
    "Modelfile": "config",
    "config.json": "config",
    "generation_config.json": "config",
    "genai_config.json": "config",
    "tokenizer.json": "tokenizer",
    "tokenizer.model": "tokenizer",
    "tokenizer_config.json": "tokenizer",
    "special_tokens_map.json": "tokenizer",
    "added_tokens.json": "tokenizer",
    "vocab.json": "tokenizer",
    "merges.txt": "tokenizer",
    "chat_template.jinja": "tokenizer",
    "chat_template.json": "tokenizer",
}
CHUNK_BYTES = 1 << 20


def _portable(path: str) -> str:
    """Return a path if it names the same file below the bundle on every system.

    Raises:
        ValueError: it does not; pydantic turns it into its own error.
    """
    if not path or any(character in path for character in "\\:") or not path.isprintable():
        raise ValueError("a path must be printable, without backslash or colon")
    for part in path.split("/"):
        # Windows drops a dot or space at the end of a name, so such a name can stand for another file.
        if part in {"", ".", ".."} or part[-1] in ". ":
            raise ValueError("a path must be relative, without '.', '..' or empty parts")
    return path


class CodedForm(Document):
    """Size and SHA-256 in hex of the coded file that a bundle is shipped with in place of a file; see `places_of`."""

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class FileEntry(Document):
    """One file of a bundle.

    Attributes:
        path: Below the bundle, with `/` between parts.
        role: What it serves.
        size: Its bytes.
        sha256: In hex.
        coded: What may stand in its place until the bundle is unpacked; None where it is shipped as it is.
    """

    path: Annotated[str, AfterValidator(_portable)]
    role: Role
    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    coded: CodedForm | None = None


class Provenance(Document):
    """What made the bundle.

    Attributes:
        exporter: Version of this tool.
        versions: Library name -> version, of those that decide the bytes.
        model_digest: SHA-256 over the source's files.
        instruction_set: CPU instruction set that the codes were computed with.
        threads: Number of threads that they were computed with.
    """

    exporter: str
    versions: dict[str, str]
    model_digest: str
    instruction_set: str
    threads: Annotated[int, Field(ge=1)]


class Header(Document):
    """What a manifest says besides its files.

    Attributes:
        name: What the bundle is called.
        target: Name of the target.
        device: Name of the device profile.
        runtime: Runtime -> version that the artifact was proved with, such as `{"llama.cpp": "b6000"}`.
        recipe: What was asked for.
        provenance: What made the bundle.
    """

    name: str
    target: str
    device: str
    runtime: dict[str, str]
    recipe: Recipe
    provenance: Provenance


class Manifest(Header):
    """manifest.json: the header, every other file of the bundle, and the content digest."""

    schema_version: Literal[1] = 1
    files: tuple[FileEntry, ...]
    content_digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

    @field_validator("files")
    @classmethod
    def _distinct(cls, files: tuple[FileEntry, ...]) -> tuple[FileEntry, ...]:
        seen = {_folded(name): name for name in UNLISTED}
        for path in [place for entry in files for place in places_of(entry)]:
            folded = _folded(path)
            if folded in seen:
                raise ValueError(f"{path!r} is listed beside {seen[folded]!r}: some systems hold one file for both")
            seen[folded] = path
        return files

    @classmethod
    def of(cls, header: Header, files: Iterable[FileEntry]) -> "Manifest":
        """Return the manifest of a header and files, in order of their paths, with its content digest."""
        ordered = tuple(sorted(files, key=lambda entry: entry.path))
        facts = {name: getattr(header, name) for name in Header.model_fields}
        return cls(**facts, files=ordered, content_digest=content_digest(header, ordered))


def places_of(entry: FileEntry) -> list[str]:
    """Return where a file may stand: its path, and that of its coded form if it has one."""
    return [entry.path] if entry.coded is None else [entry.path, entry.path + SUFFIX]


def standing_for(entry: FileEntry, present: Collection[str]) -> FileEntry:
    """Return the entry of the file that stands for one in a bundle: itself, or its coded form until it is unpacked.

    Args:
        entry: The file.
        present: Paths of the files that are there.
    """
    path = entry.path + SUFFIX
    if entry.coded is None or entry.path in present or path not in present:
        return entry
    return FileEntry(path=path, role=entry.role, size=entry.coded.size, sha256=entry.coded.sha256)


def _folded(path: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def content_digest(header: Header, files: Iterable[FileEntry]) -> str:
    """Return the SHA-256, in hex, over what the same job gives again.

    That is the header and the entries of all files but measurements.json and report.html.
    """
    content = {
        "header": header.model_dump(mode="json", include=set(Header.model_fields)),
        "files": [
            entry.model_dump() for entry in sorted(files, key=lambda entry: entry.path) if entry.path not in VOLATILE
        ],
        "schema_version": 1,
    }
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def role_of(path: str) -> Role:
    """Return what a file of the bundle serves, from its place."""
    folder, _, name = path.rpartition("/")
    if folder.split("/")[0] == "model":
        return MODEL_ROLES.get(name, "model")
    if folder.split("/")[0] == "licences":
        return "licence"
    return TOP_ROLES.get(path, "other")


def files_below(folder: Path) -> tuple[list[str], list[str]]:
    """Return the paths of the regular files below a folder, and of all else that is not a folder.

    The second list holds links, sockets, devices: nothing of it is followed or opened. Both are sorted, with
    `/` between parts.

    Raises:
        OSError: a folder cannot be listed.
    """
    regular: list[str] = []
    strange: list[str] = []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        for name in (*names, *folders):
            path = Path(parent, name)
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                strange.append(path.relative_to(folder).as_posix())
            elif path.is_file():
                regular.append(path.relative_to(folder).as_posix())
    return sorted(regular), sorted(strange)


def _raise(error: OSError) -> None:
    raise error


def sha256_of(path: Path, advance: Callable[[int], None] | None = None) -> tuple[int, str]:
    """Return the size and the SHA-256 of a file, read in pieces.

    Args:
        path: A regular file.
        advance: Called with the number of bytes of each piece.
    """
    size, digest = 0, hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            digest.update(piece)
            size += len(piece)
            if advance is not None:
                advance(len(piece))
    return size, digest.hexdigest()
