"""Device profiles: what a named device is and can do, each number with its basis and source.

A profile is one TOML file, in the package `exporter.devices` or the user's own, and its file name is its
name. Files are hostile until checked: their size is bounded, and impossible numbers are refused.
"""

from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, Field, model_validator

from exporter.errors import InputError
from exporter.measures import Basis, Document
from exporter.registry import names
from exporter.toml import impossible, named_file, read_document, shown

PACKAGE = "exporter.devices"
MAX_TEXT = 1000
MIB, TIB = 1 << 20, 1 << 40

ArmFeature = Literal["neon", "dotprod", "i8mm", "bf16", "sve", "sve2", "sme", "sme2"]
X86Feature = Literal["avx", "avx2", "fma", "f16c", "avx-vnni", "avx512", "avx512-bf16", "avx512-vnni", "amx-int8"]
Feature = Literal[ArmFeature, X86Feature]
DeviceClass = Literal["phone", "tablet", "laptop", "board"]


def _readable(text: str) -> str:
    # Control characters would reach terminals and reports.
    if not text.strip() or len(text) > MAX_TEXT or not text.isprintable():
        raise impossible("the text cannot be shown", shown(text), f"1 to {MAX_TEXT} printable characters on one line")
    return text


Text = Annotated[str, AfterValidator(_readable)]


class Fact(Document):
    """A number about a device, in the unit that its key names.

    Attributes:
        value: The number.
        basis: `published` where it was read or follows by arithmetic from what was read about this device,
            `estimated` where any part of it is recalled, planned or carried over from a related device.
        source: Where it is from, and how it follows from there.
    """

    value: float
    basis: Basis
    source: Text


def _within(low: float, high: float, words: str) -> AfterValidator:
    def check(fact: Fact) -> Fact:
        if not low <= fact.value <= high:
            raise impossible("the number is impossible", f"{fact.value:,.13g}", words)
        return fact

    return AfterValidator(check)


Clock = Annotated[Fact, _within(0.1, 7, "0.1 to 7 GHz")]
Ram = Annotated[Fact, _within(64 * MIB, TIB, "64 MiB to 1 TiB, in bytes")]
AppMemory = Annotated[Fact, _within(MIB, TIB, "1 MiB to 1 TiB, in bytes")]
Bandwidth = Annotated[Fact, _within(0.1e9, 5e12, "0.1e9 to 5e12 bytes/s")]
StorageRead = Annotated[Fact, _within(1e6, 1e11, "1e6 to 1e11 bytes/s")]


class Cluster(Document):
    """Cores of one kind."""

    name: Text
    cores: int = Field(ge=1, le=256)
    clock_ghz: Clock


class InstructionSet(Document):
    """The instructions that matter to the kernels of language models, of one architecture."""

    features: tuple[Feature, ...] = Field(strict=False, min_length=1)
    basis: Basis
    source: Text

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        features = set(self.features)
        if len(features) < len(self.features):
            raise impossible("a feature is listed twice", ", ".join(self.features), "each feature once")
        if features & set(get_args(ArmFeature)) and features & set(get_args(X86Feature)):
            raise impossible("no core has both Arm and x86 features", ", ".join(self.features), "one architecture")
        return self


class PreferredTarget(Document):
    """The target that `auto` means on this device, and why."""

    target: Literal["gguf", "onnx"]
    reason: Text


class Threads(Document):
    """The number of threads to decode with, and why."""

    count: int = Field(ge=1, le=256)
    reason: Text


class DeviceProfile(Document):
    """What a device is and can do.

    Attributes:
        name: File name without `.toml`: the name on the command line.
        clusters: Cores by kind, the fastest first.
        ram_bytes: Installed memory.
        app_memory_limit_bytes: What one app may use; on laptops and boards the usable share of the memory.
        app_memory_limit_with_entitlement_bytes: The same for an app with the system's entitlement for more.
        peak_bandwidth_bytes_per_s: Of the memory, by its data sheet.
        effective_bandwidth_bytes_per_s: What decoding on the CPU draws of it.
        storage_read_bytes_per_s: Sequential reads.
    """

    schema_version: Literal[1]
    name: Text
    title: Text
    device_class: DeviceClass
    soc: Text
    os: Text
    clusters: tuple[Cluster, ...] = Field(strict=False, min_length=1, max_length=16)
    isa: InstructionSet
    ram_bytes: Ram
    app_memory_limit_bytes: AppMemory
    app_memory_limit_with_entitlement_bytes: AppMemory | None = None
    peak_bandwidth_bytes_per_s: Bandwidth
    effective_bandwidth_bytes_per_s: Bandwidth
    storage_read_bytes_per_s: StorageRead | None = None
    preferred: PreferredTarget
    threads: Threads

    @property
    def cores(self) -> int:
        """Cores of all clusters."""
        return sum(cluster.cores for cluster in self.clusters)

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.cores > 256:
            raise impossible("the clusters have too many cores", self.cores, "at most 256")
        if self.threads.count > self.cores:
            raise impossible("threads.count exceeds the cores", self.threads.count, f"at most {self.cores}")
        self._require_order("effective_bandwidth_bytes_per_s", "peak_bandwidth_bytes_per_s")
        self._require_order("app_memory_limit_bytes", "ram_bytes")
        if self.app_memory_limit_with_entitlement_bytes is not None:
            self._require_order("app_memory_limit_with_entitlement_bytes", "ram_bytes")
            self._require_order("app_memory_limit_bytes", "app_memory_limit_with_entitlement_bytes")
        return self

    def _require_order(self, lower: str, upper: str) -> None:
        low, high = getattr(self, lower).value, getattr(self, upper).value
        if low > high:
            raise impossible(f"{lower} exceeds {upper}", f"{low:,.13g}", f"at most {high:,.13g}")


def device_names() -> list[str]:
    """Return the names of the profiles that come with the exporter, sorted."""
    return names(PACKAGE, suffix=".toml")


def load_device(name_or_path: str) -> DeviceProfile:
    """Return the profile of a named device, or the one in the user's own TOML file.

    Args:
        name_or_path: A name of `device_names()`, or a path: it ends with `.toml` or contains a separator.

    Raises:
        RequestError: no such device, or no such file.
        InputError: the file is not a profile: too large, not TOML, an unknown or missing key, a wrong type,
            or an impossible number.
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
