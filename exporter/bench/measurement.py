"""The complete measurement of a bundle, on this machine or on a device, with one call per step."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

from exporter.bench.bundle_under_test import BundleUnderTest, subject_of
from exporter.bench.engine import Engine, LlamaBench, Probe, Settings
from exporter.bench.llama_bench import RowHead
from exporter.bench.results import Measurement
from exporter.device.connect.connection import Address, Connection
from exporter.device.connect.local import Local
from exporter.device.connect.machine import (
    Machine,
    is_of_one_architecture,
    lacking,
    read_celsius,
    read_machine,
)
from exporter.device.connect.remote_folder import BUNDLE, RemoteFolder, remote_folder
from exporter.device.profile import device_names, load_device
from exporter.foundation.config_files import shown
from exporter.foundation.errors import RequestError
from exporter.foundation.quantities import Check, Quantity

Progress = Callable[[str, int, int], None]
MIB = 1 << 20
MOST_THREADS = 8
# The sustained speed is that of the last of this many parts of a sustained run.
PARTS = 4


@dataclass(frozen=True)
class Remote:
    """How a device is reached and used.

    Attributes:
        address: Its address.
        identity: A private key; None for the agent's and the default ones.
        python: Its Python interpreter.
        binary: A build of llama-bench to send.
        folder: Place of the exporter's folder there; None for the transport's place.
        keep: Keep the folder there, so that the next run sends only changes.
    """

    address: Address
    identity: Path | None = None
    python: str = "python3"
    binary: Path | None = None
    folder: str | None = None
    keep: bool = False


@dataclass(frozen=True)
class BenchOutcome:
    """The result of measuring a bundle on a machine.

    Attributes:
        where: The device's address, or this machine.
        subject: The bundle.
        machine: The device's description of itself.
        measured: Its timings.
        celsius: The processor's temperature before and after; None where it cannot be read.
        checks: Checks of bytes, self-test and instructions.
        sent_bytes: Number of bytes sent.
        held: Size of the context in tokens.
    """

    where: str
    subject: BundleUnderTest
    machine: Machine
    measured: Measurement
    celsius: tuple[float | None, float | None]
    checks: tuple[Check, ...]
    sent_bytes: int
    held: int

    @property
    def row_head(self) -> RowHead:
        """The measured model and machine, in llama-bench's terms."""
        report, artifact, measured = self.subject.report, self.subject.artifact, self.measured
        return RowHead(
            build=measured.runtime,
            cpu=self.machine.cpu,
            file=artifact.weights[0].name,
            type=measured.model_type or f"{report.model.name} {report.recipe.scheme}",
            size_bytes=artifact.file_bytes,
            parameters=measured.model_n_params or report.model.parameters,
        )


def measure_here(bundle: Path, settings: Settings, device: str | None, check: bool = True) -> BenchOutcome:
    """Measure a bundle on this machine, in separate processes.

    Args:
        bundle: Its folder.
        settings: Settings of the timing; for 0 threads, the profile or the cores decide.
        device: The profile of this machine; None to require no instructions.
        check: Compare the model's files with the manifest first.
    """
    with subject_of(bundle, check) as subject, remote_folder(Local, _name(subject), None, keep=False) as place:
        engine = Probe(subject, sys.executable, subject.loaded.folder.parent.resolve())
        machine = read_machine(place.connection)
        instructions = _instructions(subject, machine, device, strict=device is not None)
        engine.prepare(place)
        settings = _with_threads(settings, machine, device)
        return _outcome(subject, engine, place, machine, settings, (instructions,), 0)


def measure_on(
    bundle: Path, remote: Remote, settings: Settings, device: str | None, progress: Progress
) -> BenchOutcome:
    """Measure a bundle on a device: send missing files, check, test and time the model, and clean up.

    Args:
        bundle: Its folder.
        remote: The device.
        settings: Settings of the timing; for 0 threads, the profile or the cores decide.
        device: The device's profile; None for the bundle's, if the device has its instructions.
        progress: Called with the name of the step, steps done and their total.
    """
    # Bytes are compared as they are sent.
    with subject_of(bundle, check=False) as subject:
        return _measure_on(subject, remote, settings, device, progress)


def _measure_on(
    subject: BundleUnderTest, remote: Remote, settings: Settings, device: str | None, progress: Progress
) -> BenchOutcome:
    engine: Engine = Probe(subject, remote.python)
    if remote.binary is not None or remote.address.scheme == "adb":
        engine = LlamaBench(subject, remote.binary)
    with remote_folder(partial(connect, remote), _name(subject), remote.folder, remote.keep) as place:
        machine = read_machine(place.connection)
        check = _instructions(subject, machine, device, strict=True)
        sent = engine.prepare(place)
        uploads = [replace(upload, name=f"{BUNDLE}/{upload.name}") for upload in subject.uploads()]
        sent += place.fill(uploads, _counted(progress, sum(upload.size for upload in uploads)))
        found = f"{len(uploads)} files on the device have the SHA-256 of those that were sent"
        checks = (Check(name="bytes", status="passed", detail=found), check)
        return _outcome(subject, engine, place, machine, _with_threads(settings, machine, device), checks, sent)


def _name(subject: BundleUnderTest) -> str:
    return f"bench-{subject.manifest.content_digest[:16]}"


def connect(remote: Remote) -> Connection:
    """Connect to a device; the imports of each transport are here."""
    if remote.address.scheme == "adb":
        from exporter.device.connect.adb import Adb

        return Adb(remote.address)
    from exporter.device.connect.ssh import Ssh

    return Ssh(remote.address, remote.identity)


def _outcome(
    subject: BundleUnderTest, engine: Engine, place: RemoteFolder, machine: Machine, settings: Settings,
    checks: tuple[Check, ...], sent: int,
) -> BenchOutcome:  # fmt: skip
    tested = engine.self_test(place, settings)
    before = read_celsius(place.connection)
    measured = engine.measure(place, settings)
    celsius = before, read_celsius(place.connection)
    where = place.connection.where
    return BenchOutcome(where, subject, machine, measured, celsius, (*checks, tested), sent, settings.held)


def _instructions(subject: BundleUnderTest, machine: Machine, device: str | None, strict: bool) -> Check:
    """Compare a machine's instructions with those of its stated profile, or of the bundle's.

    Raises:
        RequestError: it lacks some of them, and `strict` means that it must be the device.
    """
    name = device or subject.manifest.device
    # A bundle may name any profile, or a file of this machine.
    if device is None and name not in device_names():
        return Check(name="device.instructions", status="not run", detail=f"the profile {shown(name)} is not at hand")
    profile = load_device(name)
    missing, alike = lacking(profile, machine), is_of_one_architecture(profile, machine)
    if strict and (missing if alike else device is not None):
        raise RequestError(
            f"the device lacks instructions of the profile {profile.name}",
            got=f"{machine.architecture} without {', '.join(missing)}" if missing else machine.architecture,
            expected=", ".join(profile.isa.features),
            next_step="name the device's own profile with --device, or build the bundle for it",
        )
    has = f"{machine.cpu or 'the processor'} ({machine.architecture})"
    if missing or not machine.features:
        detail = f"measured on {has}, which is not known to be a {profile.name}"
        return Check(name="device.instructions", status="not run", detail=detail)
    detail = f"{has} has all of {profile.name}: {', '.join(profile.isa.features)}"
    return Check(name="device.instructions", status="passed", detail=detail)


def _with_threads(settings: Settings, machine: Machine, device: str | None) -> Settings:
    return replace(settings, threads=threads_for(settings.threads, machine, device))


def threads_for(asked: int, machine: Machine, device: str | None) -> int:
    """Return the threads that are asked for; for 0, the profile's or one for each core of the machine."""
    if asked:
        return asked
    return load_device(device).threads.count if device else min(machine.cores or os.cpu_count() or 1, MOST_THREADS)


def _counted(progress: Progress, total: int) -> Callable[[int], None]:
    done = 0

    def advance(sent: int) -> None:
        nonlocal done
        done += sent
        progress("send: MiB", done // MIB, max(total // MIB, 1))

    return advance


def quantities(outcome: BenchOutcome) -> dict[str, Quantity]:
    """Return the figures of a measurement by name, without those that were not measured."""
    measured, (before, after) = outcome.measured, outcome.celsius
    first_token_ns = median(measured.prefill.samples_ns)
    values: dict[str, tuple[float | None, str]] = {
        "speed.prefill_tokens_per_s": (measured.prefill.tokens_per_s, "tokens/s"),
        "speed.decode_tokens_per_s": (measured.decode.tokens_per_s, "tokens/s"),
        "speed.time_to_first_token_ms": (first_token_ns / 1e6, "ms"),
        "speed.load_ms": (None if measured.load_ns is None else measured.load_ns / 1e6, "ms"),
        "speed.sustained_decode_tokens_per_s": (lasting(measured), "tokens/s"),
        "speed.sustained_share": (sustained_share(measured), "fraction"),
        "memory.peak_bytes": (measured.peak_bytes, "bytes"),
        "memory.interpreter_bytes": (measured.interpreter_bytes, "bytes"),
        "temperature.before_celsius": (before, "°C"),
        "temperature.after_celsius": (after, "°C"),
        "transfer.sent_bytes": (outcome.sent_bytes, "bytes"),
    }
    return {
        name: Quantity(value=float(value), unit=unit, basis="measured")
        for name, (value, unit) in values.items()
        if value is not None
    }


def lasting(measured: Measurement) -> float | None:
    """Return the tokens/s of the last quarter of a sustained run; None without such a run."""
    rounds = measured.sustained_ts
    return median(rounds[-max(1, len(rounds) // PARTS) :]) if rounds else None


def sustained_share(measured: Measurement) -> float | None:
    """Return the sustained speed relative to that of the repeats."""
    last = lasting(measured)
    return None if last is None else last / measured.decode.tokens_per_s
