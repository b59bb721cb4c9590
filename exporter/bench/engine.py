"""What measures on a device: our program in its Python, or a build of llama-bench."""

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Protocol

from exporter.bench.results import Answers, LlamaBenchRow, Measured, Needs, parsed
from exporter.bench.subject import Subject
from exporter.bundle.manifest import sha256_of
from exporter.device.connect.connection import Answer, Connection
from exporter.device.connect.workplace import Parcel, Workplace
from exporter.errors import ExporterError, InputError, MissingDependencyError, RequestError
from exporter.measures import Check

PROBE = Path(__file__).with_name("probe.py")
JOB = "job.json"
LIMIT_S = 3600
MOST_ROUNDS = 10_000
SIGNALLED = 128
SIGILL, SIGKILL = 4, 9
NOT_FOUND, NOT_EXECUTABLE = 127, 126


@dataclass(frozen=True)
class Settings:
    """How a model is timed.

    Attributes:
        prompt: Tokens read at once.
        generate: Tokens generated one at a time.
        depth: Tokens in the context before either, not timed.
        context: Tokens that the context has at least.
        repeats: Of each test, after a warm-up.
        sustain_s: Seconds to go on generating afterwards, to see what warmth costs.
        threads: Of the runtime.
    """

    prompt: int
    generate: int
    depth: int
    context: int
    repeats: int
    sustain_s: float
    threads: int

    @property
    def held(self) -> int:
        """Tokens that the context must hold."""
        return max(self.context, max(self.depth, 1) + max(self.prompt, self.generate))

    @property
    def limit_s(self) -> float:
        """Seconds after which a device is given up."""
        return LIMIT_S + self.sustain_s


class Engine(Protocol):
    """One way to measure on a device."""

    def require(self, connection: Connection) -> None:
        """Refuse a device that lacks what the engine needs, before anything large is sent.

        Raises:
            MissingDependencyError: it has to be installed first.
            RequestError: this engine cannot measure the bundle at all.
        """

    def parcels(self) -> list[Parcel]:
        """Return what it sends beside the model."""

    def self_test(self, place: Workplace, settings: Settings) -> Check:
        """Ask the model what it answered when the bundle was made."""

    def measure(self, place: Workplace, settings: Settings) -> Measured:
        """Time it."""


class Probe:
    """`probe.py` in a Python of the device.

    Args:
        subject: What to measure.
        python: The interpreter there: a name or path, which may begin with `~/`.
        folder: Where the model's files are there, absolute; None for where they are sent to.
    """

    def __init__(self, subject: Subject, python: str, folder: Path | None = None) -> None:
        self._subject, self._folder = subject, folder
        self._shown = python
        self._python = f'"$HOME"/{shlex.quote(python[2:])}' if python.startswith("~/") else shlex.quote(python)

    def require(self, connection: Connection) -> None:
        """Refuse a device without Python or without the runtime."""
        program = shlex.quote(PROBE.read_text(encoding="utf-8"))
        answer = connection.run(f"{self._python} -c {program} needs {self._subject.artifact.target}", timeout_s=120)
        if answer.code in {NOT_FOUND, NOT_EXECUTABLE}:
            raise MissingDependencyError(
                f"the device has no {self._shown}", where=connection.where, got=answer.last_words,
                next_step="install Python 3 there (Debian: sudo apt-get install python3), or name one with --python",
            )  # fmt: skip
        _require_end(answer, connection)
        missing = parsed(Needs, answer.output, connection.where).missing
        if missing:
            raise MissingDependencyError(
                f"the device's {self._shown} lacks the model's runtime", where=connection.where, got=", ".join(missing),
                next_step=f"install it there: {self._shown} -m pip install {' '.join(missing)}; where the system's "
                "Python is managed, in an environment whose interpreter --python names",
            )  # fmt: skip

    def parcels(self) -> list[Parcel]:
        """Return the program."""
        return [Parcel(PROBE, PROBE.name, *sha256_of(PROBE))]

    def self_test(self, place: Workplace, settings: Settings) -> Check:
        """Compare the model's answers on the device with those of the time when it was made."""
        answer = self._run("selftest", place, settings)
        return self._subject.check(parsed(Answers, answer.output, place.connection.where))

    def measure(self, place: Workplace, settings: Settings) -> Measured:
        """Time it in a process of its own."""
        return parsed(Measured, self._run("measure", place, settings).output, place.connection.where)

    def _run(self, command: str, place: Workplace, settings: Settings) -> Answer:
        job = shlex.quote(json.dumps(self._job(place, settings)))
        place.run(f"printf %s {job} > {JOB}")
        answer = place.work(f"{self._python} {PROBE.name} {command} {JOB}", settings.limit_s)
        # Here a model that cannot be run at all is a bad one; elsewhere it may be the device.
        local = self._folder is not None and command == "selftest"
        _require_end(answer, place.connection, InputError if local else RequestError)
        return answer

    def _job(self, place: Workplace, settings: Settings) -> dict[str, object]:
        test, folder = self._subject.self_test, str(self._folder or place.path)
        return {
            "target": self._subject.artifact.target,
            "folder": f"{folder}/model",
            "files": [f"{folder}/{path}" for path in self._subject.model_files],
            "self_test": {"prompt": test.prompt, "positions": test.positions},
            "prompt": settings.prompt, "generate": settings.generate, "depth": settings.depth,
            "context": settings.held, "repeats": settings.repeats, "threads": settings.threads,
            "sustain_s": settings.sustain_s, "limit_s": math.ceil(settings.limit_s),
        }  # fmt: skip


class LlamaBench:
    """llama.cpp's own `llama-bench`: for phones, which have no Python.

    Args:
        subject: What to measure.
        binary: A build of it for the device; None looks for one there.
    """

    def __init__(self, subject: Subject, binary: Path | None) -> None:
        self._subject, self._binary = subject, binary
        self._command = "./llama-bench"

    def require(self, connection: Connection) -> None:
        """Refuse what llama-bench cannot run, and a device that has none."""
        if self._subject.artifact.target != "gguf" or self._subject.has_adapter:
            kind = "an adapter" if self._subject.has_adapter else f"target {self._subject.artifact.target}"
            raise RequestError(
                "llama-bench cannot run the bundle", where=self._subject.bundle, got=kind,
                expected="one GGUF file", next_step="build one with --target gguf, or measure over ssh",
            )  # fmt: skip
        if self._binary is None:
            self._find(connection)
        elif not self._binary.is_file():
            raise RequestError("there is no such file", where=self._binary, next_step="name a build of llama-bench")

    def _find(self, connection: Connection) -> None:
        places = (
            f'"$(command -v llama-bench)" {connection.parent}/llama-bench {connection.parent}/llama.cpp/llama-bench'
        )
        answer = connection.run(f'for f in {places}; do [ -x "$f" ] && echo "$f" && break; done; true', timeout_s=30)
        path = answer.output.removesuffix("\n")
        if not path.startswith("/") or not path.isprintable():
            raise MissingDependencyError(
                "the device has no llama-bench", where=connection.where,
                next_step="name a static build of it for the device's processor with --binary FILE (llama.cpp: cmake "
                "-DBUILD_SHARED_LIBS=OFF with the NDK's toolchain file, target llama-bench)",
            )  # fmt: skip
        self._command = shlex.quote(path)

    def parcels(self) -> list[Parcel]:
        """Return the program, where the user named one."""
        return [] if self._binary is None else [Parcel(self._binary, "llama-bench", *sha256_of(self._binary))]

    def self_test(self, place: Workplace, settings: Settings) -> Check:
        """Say that llama-bench answers no prompts."""
        del place, settings
        detail = "llama-bench times a model and does not show what it answers; its bytes were checked"
        return Check(name="selftest", status="not run", detail=detail)

    def measure(self, place: Workplace, settings: Settings) -> Measured:
        """Time it."""
        if self._binary is not None:
            place.run("chmod 700 llama-bench")
        asked = [(settings.prompt, 0), (0, settings.generate)]
        rows = self._rows(place, settings, f"-p {settings.prompt} -n {settings.generate} -r {settings.repeats}", asked)
        last = rows[-1]
        return Measured(
            runtime=f"llama.cpp {last.build_commit} ({last.build_number})", model_type=last.model_type,
            model_n_params=last.model_n_params, n_batch=last.n_batch, n_threads=last.n_threads, load_ns=None,
            interpreter_bytes=None, peak_bytes=None, tests=tuple(row.test for row in rows),
            sustained_ns=self._sustained(place, settings, fmean(last.samples_ns)),
        )  # fmt: skip

    def _sustained(self, place: Workplace, settings: Settings, round_ns: float) -> tuple[int, ...]:
        if not settings.sustain_s:
            return ()
        rounds = min(MOST_ROUNDS, math.ceil(1e9 * settings.sustain_s / round_ns))
        asked = [(0, settings.generate)]
        return self._rows(place, settings, f"-p 0 -n {settings.generate} -r {rounds}", asked)[0].samples_ns

    def _rows(
        self, place: Workplace, settings: Settings, tests: str, asked: Sequence[tuple[int, int]]
    ) -> tuple[LlamaBenchRow, ...]:
        depth = f" -d {settings.depth}" if settings.depth else ""
        (model,) = self._subject.model_files
        command = f"{self._command} -m {shlex.quote(model)} {tests}{depth} -t {settings.threads} -o json"
        answer = place.work(command, settings.limit_s)
        _require_end(answer, place.connection)
        rows = parsed(tuple[LlamaBenchRow, ...], answer.output, place.connection.where)
        if [(row.n_prompt, row.n_gen) for row in rows] != list(asked):
            raise InputError(
                "llama-bench measured something else", where=place.connection.where,
                got=[(row.n_prompt, row.n_gen) for row in rows][:4], expected=list(asked),
            )  # fmt: skip
        return rows


def _require_end(answer: Answer, connection: Connection, kind: type[ExporterError] = RequestError) -> None:
    """Refuse a program that did not end well; one that failed by itself with the kind of error that is named."""
    where, code = connection.where, answer.code
    if code == SIGNALLED + SIGILL:
        raise RequestError(
            "the runtime used an instruction that the device's processor lacks", where=where, got="signal SIGILL",
            next_step="install or name a build for this processor (pip install --force-reinstall --no-binary :all: "
            "--no-deps llama-cpp-python compiles one there)",
        )  # fmt: skip
    if code == SIGNALLED + SIGKILL:
        raise RequestError(
            "the device ended the program", where=where, got="signal SIGKILL",
            next_step="its memory was probably full: close other programs there, or build a smaller bundle",
        )  # fmt: skip
    if code:
        raise kind(
            "the measuring program failed on the device", where=where, got=answer.last_words,
            next_step="run the same by hand there with --keep, or see edge-exporter verify here",
        )  # fmt: skip
