"""Programs that measure on a device: the probe in its Python, or a build of llama-bench."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Protocol

from exporter.bench.bundle_under_test import BundleUnderTest
from exporter.bench.results import Answers, LlamaBenchRow, LlamaBenchRows, Measurement, Needs, parsed
from exporter.bundle.manifest import sha256_of
from exporter.device.connect.connection import Connection, ShellResult, ignored
from exporter.device.connect.remote_folder import BUNDLE, PROGRAM, RemoteFolder, Upload
from exporter.device.connect.shell import Line, line
from exporter.foundation.errors import ExporterError, InputError, MissingDependencyError, RequestError
from exporter.foundation.quantities import Check
from exporter.targets.facts import facts_of, llama_bench_targets, session_file

PROBE = Path(__file__).with_name("probe.py")
JOB = f"{PROGRAM}/job.json"
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
        depth: Tokens already in the context, not timed.
        context: Least size of the context in tokens.
        repeats: Repeats of each test, after a warm-up.
        sustain_s: Seconds of further generation, to measure the effect of heat.
        threads: Threads of the runtime.
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

    def prepare(self, place: RemoteFolder) -> int:
        """Send the program, and refuse a device that lacks requirements before the model is sent.

        Returns:
            The number of bytes sent.

        Raises:
            MissingDependencyError: something has to be installed first.
            RequestError: this engine cannot measure the bundle at all.
        """

    def self_test(self, place: RemoteFolder, settings: Settings) -> Check:
        """Compare the model's answers with those from when the bundle was made."""

    def measure(self, place: RemoteFolder, settings: Settings) -> Measurement:
        """Time the model."""


class Probe:
    """`probe.py` in a Python of the device, isolated so that no file of the bundle can replace one of its modules.

    Args:
        subject: The bundle to measure.
        python: The device's interpreter: a name or path, which may begin with `~/`.
        bundle: The bundle's folder there, absolute; None for the folder to which its files are sent.
    """

    def __init__(self, subject: BundleUnderTest, python: str, bundle: Path | None = None) -> None:
        self._subject, self._bundle = subject, bundle
        self._shown = python
        self._python = line('"$HOME"/%s', python[2:]) if python.startswith("~/") else line("%s", python)

    def prepare(self, place: RemoteFolder) -> int:
        """Send the program, and refuse a device without Python or without the runtime."""
        programs = {PROBE.name: PROBE, "session.py": session_file(self._subject.artifact.target)}
        uploads = [Upload(path, f"{PROGRAM}/{name}", *sha256_of(path)) for name, path in programs.items()]
        sent = place.fill(uploads, ignored)
        where = place.connection.where
        answer = place.run(self._command(place, "needs"), timeout_s=120)
        if answer.code in {NOT_FOUND, NOT_EXECUTABLE}:
            raise MissingDependencyError(
                f"there is no {self._shown}", where=where, got=answer.last_words,
                next_step="install Python 3 there (Debian: sudo apt-get install python3), or name one with --python",
            )  # fmt: skip
        require_end(answer, place.connection)
        needs = parsed(Needs, answer.output, where)
        if needs.hidden:
            raise MissingDependencyError(
                f"{self._shown} finds the model's runtime only where isolated programs do not look", where=where,
                got=", ".join(needs.hidden), expected="packages of the interpreter's own",
                next_step=f"make an environment there ({self._shown} -m venv edge; edge/bin/pip install "
                f"{' '.join(needs.missing)}) and name its interpreter with --python '~/edge/bin/python'",
            )  # fmt: skip
        if needs.missing:
            raise MissingDependencyError(
                f"{self._shown} lacks the model's runtime", where=where, got=", ".join(needs.missing),
                next_step=f"install it there: {self._shown} -m pip install {' '.join(needs.missing)}; where the "
                "system's Python is managed, in an environment whose interpreter --python names",
            )  # fmt: skip
        return sent

    def self_test(self, place: RemoteFolder, settings: Settings) -> Check:
        """Compare the model's answers on the device with those from when it was made."""
        answer = self._run("selftest", place, settings)
        return self._subject.check(parsed(Answers, answer.output, place.connection.where))

    def measure(self, place: RemoteFolder, settings: Settings) -> Measurement:
        """Time the model in a separate process."""
        return parsed(Measurement, self._run("measure", place, settings).output, place.connection.where)

    def _run(self, command: str, place: RemoteFolder, settings: Settings) -> ShellResult:
        job = place.write(JOB, json.dumps(self._job(place, settings)).encode())
        answer = place.work(self._command(place, command, job), settings.limit_s)
        # On this machine, a model that cannot be run at all is a bad one; on a device, the device may be the cause.
        local = self._bundle is not None and command == "selftest"
        require_end(answer, place.connection, InputError if local else RequestError)
        return answer

    def _command(self, place: RemoteFolder, *arguments: str) -> Line:
        return line("%s -I %s %s", self._python, f"{place.path}/{PROGRAM}/{PROBE.name}", list(arguments))

    def _job(self, place: RemoteFolder, settings: Settings) -> dict[str, object]:
        test, folder = self._subject.self_test, str(self._bundle or f"{place.path}/{BUNDLE}")
        return {
            "folder": f"{folder}/model",
            "files": [f"{folder}/{path}" for path in self._subject.model_files],
            "self_test": {"prompt": test.prompt, "positions": test.positions},
            "prompt": settings.prompt, "generate": settings.generate, "depth": settings.depth,
            "context": settings.held, "repeats": settings.repeats, "threads": settings.threads,
            "sustain_s": settings.sustain_s, "limit_s": math.ceil(settings.limit_s),
        }  # fmt: skip


class LlamaBench:
    """The program `llama-bench` of llama.cpp: for phones, which have no Python.

    Args:
        subject: The bundle to measure.
        binary: A build of llama-bench for the device; None to look for one there.
    """

    def __init__(self, subject: BundleUnderTest, binary: Path | None) -> None:
        self._subject, self._binary = subject, binary
        self._program = ""

    def prepare(self, place: RemoteFolder) -> int:
        """Refuse a bundle that llama-bench cannot run or a device without it, or send the build named by the user."""
        artifact = self._subject.artifact
        able = llama_bench_targets()
        if artifact.target not in able or len(artifact.weights) > 1:
            kind = "an adapter" if artifact.target in able else f"target {artifact.target}"
            raise RequestError(
                "llama-bench cannot run the bundle", where=self._subject.bundle, got=kind,
                expected="one model file", next_step=f"build one with --target {able[0]}, or measure over ssh",
            )  # fmt: skip
        if self._binary is None:
            self._program = _found(place.connection)
            return 0
        if not self._binary.is_file():
            raise RequestError("there is no such file", where=self._binary, next_step="name a build of llama-bench")
        name = f"{PROGRAM}/llama-bench"
        self._program = f"{place.path}/{name}"
        sent = place.fill([Upload(self._binary, name, *sha256_of(self._binary))], ignored)
        place.run(line("chmod 700 %s", self._program))
        return sent

    def self_test(self, place: RemoteFolder, settings: Settings) -> Check:
        """Return that the test is not run: llama-bench does not answer prompts."""
        del place, settings
        detail = "llama-bench times a model and does not show what it answers; its bytes were checked"
        return Check(name="selftest", status="not run", detail=detail)

    def measure(self, place: RemoteFolder, settings: Settings) -> Measurement:
        """Time the model."""
        rows = self._rows(place, settings, settings.repeats, [(settings.prompt, 0), (0, settings.generate)])
        last, runtime = rows[-1], facts_of(self._subject.artifact.target).runtime
        return Measurement(
            runtime=f"{runtime} {last.build_commit} ({last.build_number})", model_type=last.model_type,
            model_n_params=last.model_n_params, n_batch=last.n_batch, n_threads=last.n_threads, load_ns=None,
            interpreter_bytes=None, peak_bytes=None, tests=tuple(row.test for row in rows),
            sustained_ns=self._sustained(place, settings, fmean(last.samples_ns)),
        )  # fmt: skip

    def _sustained(self, place: RemoteFolder, settings: Settings, round_ns: float) -> tuple[int, ...]:
        if not settings.sustain_s:
            return ()
        rounds = min(MOST_ROUNDS, math.ceil(1e9 * settings.sustain_s / round_ns))
        return self._rows(place, settings, rounds, [(0, settings.generate)])[0].samples_ns

    def _rows(
        self, place: RemoteFolder, settings: Settings, repeats: int, asked: Sequence[tuple[int, int]]
    ) -> tuple[LlamaBenchRow, ...]:
        """Run llama-bench for tests of some tokens read and generated each, and return a row for each test."""
        (model,) = self._subject.model_files
        prompt, generate = map(max, zip(*asked, strict=True))
        options = ["-m", f"{place.path}/{BUNDLE}/{model}", "-p", prompt, "-n", generate, "-r", repeats]
        options += ["-d", settings.depth] if settings.depth else []
        options += ["-t", settings.threads, "-o", "json"]
        answer = place.work(line("%s %s", self._program, list(map(str, options))), settings.limit_s)
        require_end(answer, place.connection)
        rows = parsed(LlamaBenchRows, answer.output, place.connection.where)
        if [(row.n_prompt, row.n_gen) for row in rows] != list(asked):
            raise InputError(
                "llama-bench measured something else", where=place.connection.where,
                got=[(row.n_prompt, row.n_gen) for row in rows][:4], expected=list(asked),
            )  # fmt: skip
        return rows


def _found(connection: Connection) -> str:
    """Return the path of the device's own llama-bench."""
    above = connection.parent
    command = line(
        'for file in "$(command -v llama-bench)" %s/llama-bench %s/llama.cpp/llama-bench; '
        'do [ -x "$file" ] && echo "$file" && break; done; true', above, above,
    )  # fmt: skip
    path = connection.run(command, timeout_s=30).output.removesuffix("\n")
    if not path.startswith("/") or not path.isprintable():
        raise MissingDependencyError(
            "the device has no llama-bench", where=connection.where,
            next_step="name a static build of it for the device's processor with --binary FILE (llama.cpp: cmake "
            "-DBUILD_SHARED_LIBS=OFF with the NDK's toolchain file, target llama-bench)",
        )  # fmt: skip
    return path


def require_end(answer: ShellResult, connection: Connection, kind: type[ExporterError] = RequestError) -> None:
    """Refuse a program that did not end well; use the given kind of error if it failed by itself."""
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
