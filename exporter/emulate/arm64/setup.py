"""Installs the ARM64 system: Debian's Python, numpy and what the targets' runtimes need, as wheels or compiled.

It goes into the user's cache and changes nothing else on the machine. Each part is built next to its place and renamed
when it is complete, so that an interrupted installation resumes where it stopped; a damaged part is rebuilt.
"""

import hashlib
import shutil
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from exporter.emulate.arm64.core import CORES
from exporter.emulate.arm64.installation import Installation, Needs, Program
from exporter.emulate.arm64.machine import EmulatedMachine, qemu
from exporter.foundation.building import TIMEOUT_S, Digests, compiled, downloaded, run, unpacked_source
from exporter.foundation.cache import cache_folder, require_space, scratch_folder
from exporter.foundation.cache_entries import kept_folder
from exporter.foundation.errors import MissingDependencyError, RequestError
from exporter.foundation.progress import Progress, silent

DEBIAN_PACKAGES = ("python3-minimal", "libpython3-stdlib", "libstdc++6", "libgomp1", "zlib1g")
# Newer releases of Debian trust these keys only if a source names them.
DEBIAN_KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# The version that .ci/constraints.txt also pins for this machine, for the Pythons of Debian's releases: 3.11 to 3.14.
WHEELS = {
    "numpy==2.4.6": (
        "0ab0a9c4ffb1a6d95ef519fe4247dba8eb6b18ad93999f76b7f657039acabd47",
        "5f9fb9157b4ce2971008323afe46053787b526ef624fea915b261468a8421a0f",
        "72fbe16c6fac95aedf5937fa873445cec2110be35d8a4e9433d7501fd98dae6b",
        "40fdc1ae7125e518ea98e53e69a4ebc27e1fd50510c47b7ea130cf21e5e1d42b",
    ),
}
# Wheel platform tags name the oldest glibc that a wheel runs with; Debian 12 has 2.36.
PLATFORMS = tuple(f"manylinux_2_{minor}_aarch64" for minor in (17, 24, 27, 28, 31, 34, 35))
COMPILERS = {"C": "aarch64-linux-gnu-gcc", "CXX": "aarch64-linux-gnu-g++"}
CMAKE_SETTINGS = {
    "BUILD_SHARED_LIBS": "OFF",
    "CMAKE_BUILD_TYPE": "Release",
    "CMAKE_SYSTEM_NAME": "Linux",
    "CMAKE_SYSTEM_PROCESSOR": "aarch64",
    **{f"CMAKE_{language}_COMPILER": program for language, program in COMPILERS.items()},
}
# The system takes 75 MB, the packages 115, the programs 30; the rest is for building them.
NEED_BYTES = 1_000_000_000


def installation(needs: Needs) -> Installation:
    """Return the place of these versions' installation in the cache, whether or not it is complete."""
    wheels, program = {**WHEELS, **needs.wheels}, needs.program
    sources, settings = (dict([program.source]), {**CMAKE_SETTINGS, **program.settings}) if program else ({}, {})
    contents = repr((DEBIAN_PACKAGES, wheels, sources, settings, [core.march for core in CORES])).encode()
    if program is not None:
        contents += b"".join(path.read_bytes() for path in sorted(program.project.iterdir()))
    return Installation(cache_folder("arm64", hashlib.sha256(contents).hexdigest()[:12]))


def install(needs: Needs, progress: Progress = silent) -> Installation:
    """Install the missing parts and return the installation.

    Args:
        needs: What the runtimes need.
        progress: Called with the next part, the parts done and their total.

    Raises:
        MissingDependencyError: a required program is missing; the message says how to install it.
        RuntimeCrashError: the installed Python does not run.
        RequestError: a package cannot be downloaded, or there is too little disk space.
    """
    qemu()
    found = installation(needs)
    require_space(found.folder, NEED_BYTES, "free some space or name another cache in EDGE_EXPORTER_CACHE")
    parts: dict[Path, Callable[[Path], None]] = {
        found.root: _debian,
        found.packages: partial(_wheels, found.root, {**WHEELS, **needs.wheels}),
    }
    if needs.program is not None and not missing_compilers():
        parts[found.programs] = partial(_programs, needs.program)
    for number, (place, make) in enumerate(parts.items()):
        progress(f"set up: {place.name}", number, len(parts))
        kept_folder(place, make)
    progress("set up", len(parts), len(parts))
    return found


def _debian(root: Path) -> None:
    """Unpack Debian's packages for ARM64, and start their Python.

    apt uses a private state, in which this machine has no packages.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise MissingDependencyError(
                f"{tool} is not installed", next_step="set up on Debian, or in a container of it"
            )
    # Kept until everything is unpacked, so that apt can resume with the packages that it has.
    private = root.parent / "apt"
    archives = private / "cache/archives"
    for folder in (private / "state/lists/partial", archives / "partial"):
        folder.mkdir(parents=True, exist_ok=True)
    (private / "status").touch()
    sources = private / "sources.list"
    sources.write_text(_debian_sources(), encoding="utf-8")
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "",
        "Debug::NoLocking": "true",
        "Dir::Cache": private / "cache",
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State": private / "state",
        "Dir::State::status": private / "status",
    }
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in settings.items())]
    run([*apt, "update"])
    run([*apt, "install", "-y", "--download-only", *DEBIAN_PACKAGES])
    for package in sorted(archives.glob("*.deb")):
        run(["dpkg-deb", "-x", package, root])
    EmulatedMachine(CORES[0], root, root).run([root / "usr/bin/python3", "-I", "-c", ""], TIMEOUT_S)
    shutil.rmtree(private)


def _debian_sources() -> str:
    """Return the sources from which this machine gets Debian's packages, one per line."""
    signed = f"[signed-by={DEBIAN_KEYS}] " if DEBIAN_KEYS.is_file() else ""
    line = f"deb {signed}$(REPO_URI) $(RELEASE) $(COMPONENT)"
    lines = run(["apt-get", "indextargets", "--format", line, "Created-By: Packages", "Origin: Debian"])
    if not lines.strip():
        raise RequestError(
            "apt has no list of Debian's packages here",
            next_step="run apt-get update; on other systems use a container",
        )
    return "".join(sorted(set(lines.splitlines(keepends=True))))


def _wheels(root: Path, wheels: Mapping[str, Digests], packages: Path) -> None:
    """Unpack the wheels for the system's Python."""
    python = (root / "usr/bin/python3").readlink().name.removeprefix("python")
    platforms = (f"--platform={platform}" for platform in PLATFORMS)
    with scratch_folder() as scratch:
        for wheel in downloaded(wheels, scratch, "--only-binary=:all:", "--python-version", python, *platforms):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(packages)


def missing_compilers() -> list[str]:
    """Return the programs for compiling that are not installed."""
    return [program for program in ("cmake", *COMPILERS.values()) if shutil.which(program) is None]


def _programs(program: Program, programs: Path) -> None:
    """Compile a program for each kind of core; the package's files are deleted afterwards."""
    with scratch_folder(programs.parent) as scratch:
        source = unpacked_source(program.source, program.inside, scratch)
        settings = {**CMAKE_SETTINGS, **program.settings, program.source_setting: source}
        for core in CORES:
            # Parts that do not depend on the core are compiled once.
            made = compiled(
                program.title, program.project, scratch / "build", {**settings, program.core_setting: core.march}
            )
            shutil.copy(made, programs / core.march)
