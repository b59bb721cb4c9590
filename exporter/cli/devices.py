"""`edge-exporter devices`: the profiles, each number with its basis and source."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from typer.core import TyperGroup

from exporter.cli.arguments import JsonOption, RamOption
from exporter.foundation.errors import RequestError, did_you_mean

if TYPE_CHECKING:
    from exporter.device.profile import DeviceProfile
    from exporter.device.provenance import Fact


GIB = 1 << 30


class _Devices(TyperGroup):
    """`devices` alone is `devices list`, and `devices NAME` is `devices show NAME`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] != "--help"):
            args = ["list", *args]
        elif args[0] not in {"--help", *self.commands}:
            args = ["show", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_Devices, help="List the device profiles, or show one with the source of each number.")


@app.command("list", epilog="Example: edge-exporter devices list --class phone")
def list_devices(
    device_class: Annotated[
        str | None, typer.Option("--class", help="Only this class: phone, tablet, laptop or board.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the device profiles."""
    from exporter.cli import show
    from exporter.device.profile import DeviceClass, device_names, load_device

    if device_class not in (None, *get_args(DeviceClass)):
        advice = did_you_mean(str(device_class), get_args(DeviceClass))
        raise RequestError(f"unknown class of devices {device_class!r}", next_step=advice)
    profiles = [load_device(name) for name in device_names()]
    found = [profile for profile in profiles if device_class in (None, profile.device_class)]
    facts = {"devices": [profile.model_dump(mode="json", exclude_none=True) for profile in found]}
    show.document(facts, as_json, lambda: _list(found))


@app.command("show", epilog="Example: edge-exporter devices show my-board.toml --json")
def show_device(
    device: Annotated[str, typer.Argument(metavar="NAME_OR_TOML", help="Device name, or path of a TOML profile.")],
    ram: RamOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show and check a profile; each number has its basis and source."""
    from exporter.cli import show
    from exporter.device.memory_size import device_with

    profile = device_with(device, ram)
    facts = profile.model_dump(mode="json", exclude_none=True)
    show.document(facts, as_json, lambda: _show(profile))


def _list(profiles: "list[DeviceProfile]") -> None:
    from rich.table import Table

    from exporter.cli import show

    table = Table("device", "class", "SoC", "RAM", "an app may use", "CPU reads", "backends", "target", box=None)
    for one in profiles:
        sizes = (figure_of(key, getattr(one, key)) for key in ("ram_bytes", "app_memory_limit_bytes"))
        bandwidth = figure_of("bytes_per_s", one.cpu_bandwidth)
        backends = ", ".join(backend.name for backend in one.backends)
        cells = (one.name, one.device_class, one.soc, *sizes, bandwidth, backends, one.preferred.target)
        table.add_row(*map(show.plain, cells))
    show.console.print(table)


def _show(profile: "DeviceProfile") -> None:
    from rich.table import Table

    from exporter.cli import show

    title, *rest = map(show.plain, (profile.full_title, profile.name, profile.soc, profile.os))
    show.console.print(f"[bold]{title}[/] ({rest[0]}), {', '.join(rest[1:])}")
    table = Table("fact", "value", "basis", "source", box=None)
    for name, value, basis, source in _facts(profile):
        table.add_row(*map(show.plain, (name, value, basis, source)))
    show.console.print(table)


def _facts(profile: "DeviceProfile") -> Iterator[tuple[str, str, str, str]]:
    """Yield what is known: what it is about, the value with its unit, the basis and the source."""
    for cluster in profile.clusters:
        yield _row(f"{cluster.cores} x {cluster.name}", "clock_ghz", cluster.clock_ghz)
    yield "instructions", ", ".join(profile.isa.features), profile.isa.basis, profile.isa.source
    yield from _rows("", profile)
    if (sold := profile.ram_options_bytes) is not None:
        yield "ram_options_bytes", ", ".join(f"{value / GIB:g} GiB" for value in sold.values), sold.basis, sold.source
    yield "preferred target", profile.preferred.target, "", profile.preferred.reason
    yield "threads", str(profile.threads.count), "", profile.threads.reason
    for backend in profile.backends:
        yield backend.name, backend.processor or "", "", ""
        yield from _rows("  ", backend)
        if (npu := backend.npu) is not None:
            yield "  neural processor", f"{npu.vendor} {npu.soc}, {npu.architecture}", "", npu.source
            for place, number in enumerate(npu.soc_numbers):
                yield "  SoC number", f"{number.value}{'' if place else ', used'}", "", number.source
        for kernel in backend.kernels:
            how = {True: " repacked", False: " not repacked", None: ""}[kernel.repacked]
            yield from _rows(f"  {kernel.family}{how} {kernel.feature or ''}".rstrip() + " ", kernel)
        for timed in backend.timed_kernels:
            for name, one in timed.speeds.items():
                figures = f"{one.decode_weights_per_s / 1e9:.3g}, {one.prefill_weights_per_s / 1e9:.3g}"
                yield f"  {timed.target} {name} 10⁹ weights/s, one token, many", figures, timed.basis, timed.source
    for run in profile.measured:
        speeds = ((run.decode_tokens_per_s, "decoded"), (run.prefill_tokens_per_s, "read"))
        figures = ", ".join(f"{speed:g} tokens/s {what}" for speed, what in speeds if speed is not None)
        yield f"{run.format} on {run.backend}, {_size(run.file_bytes)}", figures, run.basis, run.source


def _rows(prefix: str, table: Any) -> Iterator[tuple[str, str, str, str]]:
    from exporter.device.provenance import Fact

    for key, fact in table:
        if isinstance(fact, Fact):
            yield _row(prefix + key, key, fact)


def _row(name: str, key: str, fact: "Fact") -> tuple[str, str, str, str]:
    return name, figure_of(key, fact), fact.basis, fact.source


def figure_of(key: str, fact: "Fact") -> str:
    """Return a fact's value with the unit that its key names."""
    for suffix, size, unit in (
        ("ram_bytes", GIB, "GiB"),
        ("bytes_per_s", 1e9, "GB/s"),
        ("operations_per_s", 1e12, "TOPS"),
        ("clock_ghz", 1, "GHz"),
        ("watts", 1, "W"),
        ("seconds_per_token", 1e-3, "ms"),
    ):
        if key.endswith(suffix):
            return f"{fact.value / size:.4g} {unit}"
    return _size(fact.value) if key.endswith("bytes") else f"{fact.value:g}"


def _size(size_bytes: float) -> str:
    from exporter.report.figures import text

    return text(size_bytes, "bytes")
