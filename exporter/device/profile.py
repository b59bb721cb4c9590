"""Device profiles: the properties of a named device, each number with its basis and source.

A profile is one TOML file, in the package `exporter.devices` or the user's own. Its file name is its name. Files are
untrusted: their size is bounded, and impossible numbers are rejected.

The schema has version 2. Unknown values are absent. Profiles of version 1, whose only number about backends was the
CPU's `effective_bandwidth_bytes_per_s`, are rejected with advice on what to change.
"""

import hashlib
import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from exporter.device.backend import Backend, BackendName, InstructionSet, Measured, TimedKernels
from exporter.device.provenance import (
    GIB,
    AppMemory,
    Bandwidth,
    Clock,
    Fact,
    Ram,
    RamOptions,
    Share,
    StorageRead,
    Text,
    Watts,
)
from exporter.foundation.config_files import impossible, named_file, read_document, shown
from exporter.foundation.errors import InputError, RequestError
from exporter.foundation.quantities import Document
from exporter.foundation.registry import names

PACKAGE = "exporter.devices"
SCHEMA_VERSION = 2
LEAST_OF_PEAK, MOST_OF_PEAK = 0.02, 2.0
# Qualcomm's SoCs, and their part numbers.
SNAPDRAGON, PART_NUMBER = "Snapdragon", re.compile(r"\b(SM[0-9]{4}|SC[0-9]{4}XP)\b")

DeviceClass = Literal["phone", "tablet", "laptop", "board"]


class Cluster(Document):
    """Cores of one kind."""

    name: Text
    cores: int = Field(ge=1, le=256)
    clock_ghz: Clock


class PreferredTarget(Document):
    """The target that `auto` selects on this device, why, and the backend that computes unless another is named."""

    target: Annotated[str, Field(pattern="^[a-z0-9]+(-[a-z0-9]+)*$", max_length=32)]
    backend: BackendName = "cpu"
    reason: Text


class Threads(Document):
    """The number of threads for decoding, and why."""

    count: int = Field(ge=1, le=256)
    reason: Text


class DeviceProfile(Document):
    """The properties of a device.

    Attributes:
        name: File name without `.toml`: the name on the command line.
        clusters: Cores by kind, fastest first.
        title: What people call it, without its memory.
        ram_bytes: Installed memory: the size that is most common, where several are sold.
        ram_options_bytes: The memory sizes it is sold with; `ram_bytes` is one of them.
        app_memory_limit_bytes: Memory limit of one app; on laptops and boards, the usable share of the memory.
        app_memory_limit_with_entitlement_bytes: The same for an app with the system's entitlement for more.
        peak_bandwidth_bytes_per_s: Memory bandwidth from the data sheet.
        storage_read_bytes_per_s: Speed of sequential reads.
        sustained_factor: Speed after minutes of load over that of the first run.
        idle_watts: Power at rest.
        power_limit_watts: Maximum power, from its data sheet or power mode.
        preferred: The target that `auto` selects.
        threads: CPU threads for decoding, on the fastest cores.
        backends: Compute backends; the CPU is always included, with its usable bandwidth.
        measured: Runs timed on this device.
    """

    schema_version: Literal[2]
    name: Text
    title: Text
    device_class: DeviceClass
    soc: Text
    os: Text
    clusters: tuple[Cluster, ...] = Field(strict=False, min_length=1, max_length=16)
    isa: InstructionSet
    ram_bytes: Ram
    ram_options_bytes: RamOptions | None = None
    app_memory_limit_bytes: AppMemory
    app_memory_limit_with_entitlement_bytes: AppMemory | None = None
    peak_bandwidth_bytes_per_s: Bandwidth
    storage_read_bytes_per_s: StorageRead | None = None
    sustained_factor: Share | None = None
    idle_watts: Watts | None = None
    power_limit_watts: Watts | None = None
    preferred: PreferredTarget
    threads: Threads
    backends: tuple[Backend, ...] = Field(strict=False, min_length=1, max_length=16)
    measured: tuple[Measured, ...] = Field(default=(), strict=False, max_length=1000)

    @property
    def digest(self) -> str:
        """SHA-256 over all that the profile says."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @property
    def full_title(self) -> str:
        """The title and the memory, such as `Raspberry Pi 5 (8 GB)`."""
        size = f"{self.ram_bytes.value / GIB:g} GB"
        return f"{self.title[:-1]}, {size})" if self.title.endswith(")") else f"{self.title} ({size})"

    @property
    def cores(self) -> int:
        """Number of cores in all clusters."""
        return sum(cluster.cores for cluster in self.clusters)

    @property
    def cpu_bandwidth(self) -> Fact:
        """Memory bandwidth reached when decoding on the CPU, in bytes/s."""
        usable = self.backend("cpu").usable_bandwidth_bytes_per_s
        assert usable is not None, "checked as the profile was made"
        return usable

    def timed_kernels(self, target: str) -> TimedKernels | None:
        """Return the speeds of a target's kernels that were timed on this device; None if they were not."""
        return next((one for one in self.backend("cpu").timed_kernels if one.target == target), None)

    def backend(self, name: str) -> Backend:
        """Return a backend of the device.

        Raises:
            RequestError: it has none of that name.
        """
        for one in self.backends:
            if one.name == name:
                return one
        known = ", ".join(one.name for one in self.backends)
        raise RequestError(f"the device has no backend {shown(name)}", where=self.name, next_step=f"known: {known}")

    @model_validator(mode="before")
    @classmethod
    def _is_of_this_version(cls, table: Any) -> Any:
        version = table.get("schema_version") if isinstance(table, dict) else SCHEMA_VERSION
        if type(version) is int and version < SCHEMA_VERSION:
            raise impossible(
                "the profile is of an earlier schema",
                f"schema_version {shown(version)}",
                SCHEMA_VERSION,
                "set schema_version = 2 and move effective_bandwidth_bytes_per_s to a [[backends]] table with "
                'name = "cpu", as usable_bandwidth_bytes_per_s',
            )
        if type(version) is int and version > SCHEMA_VERSION:
            raise impossible(
                "the profile is of a later schema",
                f"schema_version {shown(version)}",
                SCHEMA_VERSION,
                "update edge-exporter",
            )
        return table

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.cores > 256:
            raise impossible("the clusters have too many cores", self.cores, "at most 256")
        if self.threads.count > self.cores:
            raise impossible("threads.count exceeds the cores", self.threads.count, f"at most {self.cores}")
        self._require_order("app_memory_limit_bytes", "ram_bytes")
        self._require_order("app_memory_limit_with_entitlement_bytes", "ram_bytes")
        self._require_order("app_memory_limit_bytes", "app_memory_limit_with_entitlement_bytes")
        self._require_order("storage_read_bytes_per_s", "peak_bandwidth_bytes_per_s")
        self._require_order("idle_watts", "power_limit_watts")
        self._require_sold_size()
        self._require_possible_backends()
        self._require_possible_runs()
        return self

    def _require_order(self, lower: str, upper: str) -> None:
        low, high = getattr(self, lower), getattr(self, upper)
        if low is not None and high is not None and low.value > high.value:
            raise impossible(f"{lower} exceeds {upper}", f"{low.value:,.13g}", f"at most {high.value:,.13g}")

    def _require_sold_size(self) -> None:
        options = self.ram_options_bytes
        if options is not None and self.ram_bytes.value not in options.values:
            sold = ", ".join(f"{value:,.13g}" for value in options.values)
            raise impossible(
                "ram_bytes is none of ram_options_bytes", f"{self.ram_bytes.value:,.13g}", f"one of {sold}"
            )

    def _require_possible_backends(self) -> None:
        given = [backend.name for backend in self.backends]
        if len(set(given)) < len(given):
            raise impossible("a backend is listed twice", ", ".join(given), "each backend once")
        cpu = next((backend for backend in self.backends if backend.name == "cpu"), None)
        if cpu is None or cpu.usable_bandwidth_bytes_per_s is None:
            raise impossible(
                "no backend named cpu has a usable_bandwidth_bytes_per_s",
                ", ".join(given),
                'a [[backends]] table with name = "cpu" and what decoding draws on it',
            )
        for kernel in cpu.kernels:
            if kernel.feature is not None and kernel.feature not in self.isa.features:
                raise impossible(
                    "a kernel of the CPU uses what isa lacks", kernel.feature, f"one of {', '.join(self.isa.features)}"
                )
        for timed in cpu.timed_kernels:
            self._require_possible_kernels(timed)
        if self.preferred.backend not in given:
            raise impossible(
                "preferred.backend is none of the backends", self.preferred.backend, f"one of {', '.join(given)}"
            )
        for backend in self.backends:
            self._require_possible_bandwidth(backend)
            self._require_own_soc(backend)

    def _require_own_soc(self, backend: Backend) -> None:
        if backend.npu is None:
            return
        part = PART_NUMBER.search(self.soc)
        if SNAPDRAGON not in self.soc or (part is not None and part[0] != backend.npu.soc):
            raise impossible(f"{backend.name} contradicts soc: npu.soc is another", backend.npu.soc, shown(self.soc))

    def _require_possible_bandwidth(self, backend: Backend) -> None:
        peak = (backend.peak_bandwidth_bytes_per_s or self.peak_bandwidth_bytes_per_s).value
        usable = backend.usable_bandwidth_bytes_per_s
        if usable is not None and not LEAST_OF_PEAK * peak <= usable.value <= peak:
            raise impossible(
                f"usable_bandwidth_bytes_per_s of {backend.name} does not go with the peak bandwidth",
                f"{usable.value:,.13g}",
                f"{LEAST_OF_PEAK * peak:,.13g} to {peak:,.13g}",
                "check that both are in bytes/s",
            )

    def _require_possible_kernels(self, timed: TimedKernels) -> None:
        if timed.threads > self.cores:
            raise impossible("timed_kernels have more threads than cores", timed.threads, f"at most {self.cores}")
        most = MOST_OF_PEAK * self.peak_bandwidth_bytes_per_s.value
        for name, one in timed.speeds.items():
            drawn = one.bits / 8 * one.decode_weights_per_s
            if drawn > most:
                raise impossible(
                    f"the timed kernel of {name} reads more than the memory gives",
                    f"{drawn:,.4g} bytes/s",
                    f"at most {most:,.4g}",
                    "check that the profile is the timed device's and that decode_weights_per_s is in weights/s",
                )

    def _require_possible_runs(self) -> None:
        for run in self.measured:
            own = next((one.peak_bandwidth_bytes_per_s for one in self.backends if one.name == run.backend), None)
            most = MOST_OF_PEAK * (own or self.peak_bandwidth_bytes_per_s).value
            if run.drawn_bytes_per_s > most:
                raise impossible(
                    f"a measured run of {run.format} on {run.backend} reads more than the memory gives",
                    f"{run.drawn_bytes_per_s:,.4g} bytes/s",
                    f"at most {most:,.4g}",
                    "check file_bytes and decode_tokens_per_s, or give read_bytes where a token reads less",
                )


def device_names() -> list[str]:
    """Return the sorted names of the bundled profiles."""
    return names(PACKAGE, suffix=".toml")


def load_device(name_or_path: str) -> DeviceProfile:
    """Return the profile of a named device, or of the user's own TOML file.

    Args:
        name_or_path: A name of `device_names()`, or a path: it ends with `.toml` or contains a separator.

    Raises:
        RequestError: there is no such device or file.
        InputError: the file is not a profile: it is too large or not TOML, or has an unknown or missing key, a wrong
            type, or an impossible number.
    """
    file = named_file(name_or_path, PACKAGE, "device")
    profile = read_document(file, DeviceProfile, "device profile")
    stem = file.name.removesuffix(".toml")
    if profile.name != stem:
        raise InputError(
            "the name of the device is not the name of its file",
            where=f"{file}: name",
            got=shown(profile.name),
            expected=shown(stem),
            next_step="rename one of the two",
        )
    return profile
