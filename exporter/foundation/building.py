"""Downloads pinned packages and compiles programs from their source."""

import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from exporter.foundation.errors import RequestError

Digests = tuple[str, ...]
TIMEOUT_S = 1800.0
SHOWN_CHARACTERS = 300


def downloaded(packages: Mapping[str, Sequence[str]], folder: Path, *options: str) -> list[Path]:
    """Download packages with pip into a folder, each with one of its digests, and return the files in order."""
    wanted, downloads = folder / "wanted.txt", folder / "downloads"
    lines = [" ".join([name, *(f"--hash=sha256:{one}" for one in digests)]) for name, digests in packages.items()]
    wanted.write_text("\n".join(lines), encoding="ascii")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    run([*pip, *options, "--requirement", wanted, "--dest", downloads])
    return sorted(downloads.iterdir())


def unpacked_source(package: tuple[str, Digests], inside: str, folder: Path) -> Path:
    """Download a package's source into a folder and return the folder in it that a pattern names."""
    (archive,) = downloaded(dict([package]), folder, "--no-binary=:all:")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    (source,) = folder.glob(inside)
    return source


def compiled(title: str, project: Path, build: Path, settings: Mapping[str, object]) -> Path:
    """Compile a CMake project's target of the project's name, and return the program.

    Parts that an earlier call left in the folder `build` are compiled again only if the settings concern them.
    """
    failure, next_step = f"{title} cannot be compiled", "install the versions of Debian 12, or report this"
    options = [f"-D{name}={value}" for name, value in settings.items()]
    run(["cmake", "-S", project, "-B", build, *options], failure, next_step)
    jobs = str(os.cpu_count())
    run(["cmake", "--build", build, "--parallel", jobs, "--target", project.name], failure, next_step)
    return build / project.name


def run(
    command: Sequence[Path | str],
    failure: str = "a package cannot be installed",
    next_step: str = "check the network and try again",
) -> str:
    """Run a program of this machine and return its output, which is quoted if it fails."""
    try:
        done = subprocess.run(
            list(map(str, command)), check=False, capture_output=True, text=True, errors="replace",
            stdin=subprocess.DEVNULL, timeout=TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RequestError(
            "no end of an installation", where=command[0], got=f"{TIMEOUT_S:g} s", next_step=next_step
        ) from None
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())[-SHOWN_CHARACTERS:]
        raise RequestError(failure, where=command[0], got=said, next_step=next_step)
    return done.stdout
