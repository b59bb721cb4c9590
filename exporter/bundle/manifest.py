"""manifest.json: every file of a bundle with size and SHA-256, and one digest over all that a job must reproduce."""

import hashlib
import os
import unicodedata
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, Self

from pydantic import AfterValidator, FailFast, Field, field_validator, model_validator

from exporter.coding.container import SUFFIX
from exporter.foundation.quantities import Count, Document, Sha256
from exporter.report.data import RecipeFacts, canonical_json
from exporter.targets.facts import settings_files

LICENCES = "licences"
MANIFEST = "manifest.json"
REPORT = "report.json"
REPORT_PAGE = "report.html"
MEASUREMENTS = "measurements.json"
PLAN = "plan.json"
SELFTEST = "selftest.json"

# The manifest cannot list itself, nor anything computed from it.
UNLISTED = frozenset({MANIFEST})
# These differ from run to run: they are listed with their hashes, but are not in the content digest.
VOLATILE = frozenset({MEASUREMENTS, REPORT_PAGE})

Role = Literal["model", "tokenizer", "config", "plan", "report", "measurements", "selftest", "licence", "other"]
TOP_ROLES: dict[str, Role] = {
    PLAN: "plan",
    REPORT: "report",
    REPORT_PAGE: "report",
    MEASUREMENTS: "measurements",
    SELFTEST: "selftest",
}
# Files of tokenizers and models as transformers names them; each target names its own files of settings.
MODEL_ROLES: dict[str, Role] = {
    "config.json": "config",
    "generation_config.json": "config",
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


MOST_FILES = 1000
MOST_PART_BYTES, MOST_PATH_BYTES, MOST_PARTS = 255, 1024, 16
MOST_NAME = 255
# Windows reserves these for devices, whatever follows a dot.
WINDOWS_DEVICES = frozenset(
    {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"}
    | {f"{name}{n}" for name in ("COM", "LPT") for n in "0123456789¹²³"}
)
UNPORTABLE = frozenset('\\:<>"|?*')


def _portable(path: str) -> str:
    """Return a path if it names the same file below the bundle on every system and cannot be a program's option.

    Raises:
        ValueError: it does not; pydantic turns it into its own error.
    """
    if not path.isprintable() or UNPORTABLE & set(path):
        raise ValueError(f"a path must be printable, without any of {' '.join(sorted(UNPORTABLE))}")
    parts = path.split("/")
    for part in parts:
        # Windows drops a dot or space at the end of a name, so such a name can mean another file.
        if part in {"", ".", ".."} or part[-1] in ". ":
            raise ValueError("a path must be relative, without '.', '..' or empty parts")
        if part.startswith("-"):
            raise ValueError("a path must have no part that begins with a hyphen")
        if part.partition(".")[0].rstrip(" ").upper() in WINDOWS_DEVICES:
            raise ValueError(f"a path must have no part that Windows keeps for a device, such as {part[:20]!r}")
        if len(part.encode()) > MOST_PART_BYTES:
            raise ValueError(f"a path must have parts of at most {MOST_PART_BYTES} bytes")
    if len(path.encode()) > MOST_PATH_BYTES or len(parts) > MOST_PARTS:
        raise ValueError(f"a path must have at most {MOST_PATH_BYTES:,} bytes and {MOST_PARTS} parts")
    return path


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it must be printable text on one line")
    return text


def presentable(name: str) -> str:
    """Return the name of a folder, which may be any, in a form that is valid as a bundle's title."""
    return "".join(sign if sign.isprintable() else "?" for sign in name)[:MOST_NAME] or "?"


def _no_path(name: str) -> str:
    if "/" in name or "\\" in name:
        raise ValueError("it must be a name, not a path")
    return name


PortablePath = Annotated[str, AfterValidator(_portable)]
Title = Annotated[str, Field(min_length=1, max_length=MOST_NAME), AfterValidator(_printable)]
TargetName = Annotated[str, Field(pattern="^[a-z0-9]+(-[a-z0-9]+)*$", max_length=32)]
# A user's own profile is named by its file.
DeviceName = Annotated[Title, AfterValidator(_no_path)]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9._+-]*$", max_length=64)]
Versions = Annotated[dict[Word, Word], Field(max_length=64)]


class CodedForm(Document):
    """Size and SHA-256 in hex of the coded file that is shipped in place of a file; see `places_of`."""

    size: Count
    sha256: Sha256


class FileEntry(Document):
    """One file of a bundle.

    Attributes:
        path: Path below the bundle, with `/` between parts.
        role: Its role; it follows from the path.
        size: Size in bytes.
        sha256: SHA-256 in hex.
        coded: The coded form that may replace it until the bundle is unpacked; None if it is shipped as it is.
    """

    path: PortablePath
    role: Role
    size: Count
    sha256: Sha256
    coded: CodedForm | None = None

    @model_validator(mode="after")
    def _of_its_place(self) -> Self:
        if self.role != role_of(self.path):
            raise ValueError(f"its place makes it a file of the role {role_of(self.path)}, not {self.role}")
        if self.coded is not None:
            _portable(self.path + SUFFIX)
        return self

    @classmethod
    def of(cls, path: str, size: int, sha256: str, coded: CodedForm | None = None) -> Self:
        """Return the entry of a file with the role of its path."""
        return cls(path=path, role=role_of(path), size=size, sha256=sha256, coded=coded)


class Provenance(Document):
    """How the bundle was made.

    Attributes:
        exporter: Version of this tool.
        versions: Library name -> version, of those that decide the bytes.
        model_digest: SHA-256 over the source's files.
        instruction_set: CPU instruction set with which the codes were computed.
        threads: Number of threads with which they were computed.
    """

    exporter: Word
    versions: Versions
    model_digest: Word
    instruction_set: Word
    threads: Annotated[int, Field(ge=1, le=1 << 16)]


class ManifestHeader(Document):
    """The content of a manifest apart from its files.

    Attributes:
        name: Name of the bundle.
        target: Name of the target.
        device: Name of the device profile.
        runtime: Runtime -> version with which the artifact was proved, such as `{"llama.cpp": "b6000"}`.
        recipe: The recipe that was requested.
        provenance: How the bundle was made.
    """

    name: Title
    target: TargetName
    device: DeviceName
    runtime: Versions
    recipe: RecipeFacts
    provenance: Provenance


class Manifest(ManifestHeader):
    """manifest.json: the header, every other file of the bundle, and the digests.

    Attributes:
        schema_version: 1 is the schema of version 0.1.0, which has no `evidence_digest`.
        files: Every other file, in order of their paths.
        content_digest: See `content_digest`.
        evidence_digest: See `evidence_digest`.
    """

    schema_version: Literal[1, 2] = 2
    files: Annotated[tuple[FileEntry, ...], Field(max_length=MOST_FILES), FailFast()]
    content_digest: Sha256
    evidence_digest: Annotated[Sha256 | None, Field(exclude_if=lambda digest: digest is None)] = None

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

    @model_validator(mode="after")
    def _of_its_version(self) -> Self:
        if (self.evidence_digest is None) != (self.schema_version == 1):
            raise ValueError("a manifest has an evidence digest from schema version 2 on")
        return self

    @classmethod
    def of(cls, header: ManifestHeader, files: Iterable[FileEntry]) -> "Manifest":
        """Return the manifest of a header and files, in order of their paths, with its digests."""
        ordered = tuple(sorted(files, key=lambda entry: entry.path))
        facts = {name: getattr(header, name) for name in ManifestHeader.model_fields}
        return cls(
            **facts, files=ordered, content_digest=content_digest(header, ordered),
            evidence_digest=evidence_digest(ordered),
        )  # fmt: skip


def places_of(entry: FileEntry) -> list[str]:
    """Return the possible paths of a file: its own, and that of its coded form if it has one."""
    return [entry.path] if entry.coded is None else [entry.path, entry.path + SUFFIX]


def standing_for(entry: FileEntry, present: Collection[str]) -> FileEntry:
    """Return the entry of the file that is present for one: itself, or its coded form until it is unpacked.

    Args:
        entry: The file.
        present: Paths of the files that are present.
    """
    path = entry.path + SUFFIX
    if entry.coded is None or entry.path in present or path not in present:
        return entry
    return FileEntry.of(path, entry.coded.size, entry.coded.sha256)


def _folded(path: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def content_digest(header: ManifestHeader, files: Iterable[FileEntry], schema_version: int = 2) -> str:
    """Return the SHA-256, in hex, over all that the same job reproduces.

    That is the header and the entries of all files but measurements.json and report.html.
    """
    content = {
        "header": header.model_dump(mode="json", include=set(ManifestHeader.model_fields)),
        "files": [
            entry.model_dump() for entry in sorted(files, key=lambda entry: entry.path) if entry.path not in VOLATILE
        ],
        "schema_version": schema_version,
    }
    return _digest(content)


def evidence_digest(files: Iterable[FileEntry]) -> str:
    """Return the SHA-256, in hex, over the entries of measurements.json and report.html, which differ between jobs."""
    return _digest(
        [
            {"path": entry.path, "size": entry.size, "sha256": entry.sha256}
            for entry in sorted(files, key=lambda entry: entry.path)
            if entry.path in VOLATILE
        ]
    )


def _digest(content: object) -> str:
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def role_of(path: str) -> Role:
    """Return the role of a file of the bundle, from its path."""
    folder, _, name = path.rpartition("/")
    if folder.split("/")[0] == "model":
        return "config" if name in settings_files() else MODEL_ROLES.get(name, "model")
    if folder.split("/")[0] == LICENCES:
        return "licence"
    return TOP_ROLES.get(path, "other")


def files_below(folder: Path) -> tuple[list[str], list[str]]:
    """Return the paths of the regular files below a folder, and of everything else that is not a folder.

    The second list holds links, sockets and devices, which are neither followed nor opened. Both are sorted, with
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
    with path.open("rb") as file:
        return sha256_read(file, advance)


def sha256_read(file: BinaryIO, advance: Callable[[int], None] | None = None) -> tuple[int, str]:
    """Return the size and the SHA-256 of the rest of an open file; see `sha256_of`."""
    size, digest = 0, hashlib.sha256()
    while piece := file.read(CHUNK_BYTES):
        digest.update(piece)
        size += len(piece)
        if advance is not None:
            advance(len(piece))
    return size, digest.hexdigest()
