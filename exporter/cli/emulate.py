"""`edge-exporter emulate`: a bundle as on a device, on this machine."""

from typing import Annotated

import typer

from exporter.cli.arguments import BundleArgument, DeviceOption, JsonOption, RamOption, fail_on

app = typer.Typer(help="Run a bundle on this machine under a device's limits.", no_args_is_help=True)


@app.command(epilog="Example: edge-exporter emulate run phone --device raspberry-pi-5 --memory-bytes 64000000")
def run(
    bundle: BundleArgument,
    device: DeviceOption,
    ram: RamOption = None,
    memory_bytes: Annotated[
        int | None, typer.Option("--memory-bytes", help="Memory limit; by default what one app may use.")
    ] = None,
    cores: Annotated[int | None, typer.Option("--cores", help="Number of cores; by default the device's.")] = None,
    cpu_share: Annotated[float, typer.Option("--cpu-share", help="Share of the cores' time, at most 1.")] = 1.0,
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", help="Seconds before the run is stopped; by default 300, more for large files."),
    ] = None,
    context: Annotated[int, typer.Option("--context", min=64, help="Context length in tokens.")] = 512,
    as_json: JsonOption = False,
) -> None:
    """Run a bundle under a device's memory and CPU limits, without a network."""
    from exporter.bundle.installed import emulate_bundle
    from exporter.cli import show

    with show.progress(enabled=not as_json) as progress:
        found = emulate_bundle(bundle, device, ram, memory_bytes, cores, cpu_share, timeout, context, progress)
    quantities = {name: quantity.model_dump(mode="json") for name, quantity in found.quantities.items()}
    facts = {"emulation": quantities, **show.checks_facts(found.checks)}

    def people() -> None:
        show.quantities(quantities)
        show.checks(found.checks)

    show.document(facts, as_json, people)
    fail_on(found.checks)


@app.command(epilog="Example: edge-exporter emulate setup")
def setup(
    as_json: JsonOption = False,
) -> None:
    """Install an ARM64 system into the cache, so that bundles run on emulated Arm cores."""
    from exporter.cli import show
    from exporter.emulate.arm64.core import CORES
    from exporter.emulate.arm64.installation import install_compiler
    from exporter.emulate.arm64.setup import install, missing_compilers
    from exporter.targets.emulated import emulation_needs

    needs = emulation_needs()
    with show.progress(enabled=not as_json) as progress:
        found = install(needs, progress)
    names = [core.name for core in CORES]
    lacking = missing_compilers() if not found.programs.is_dir() else []
    facts = {"folder": str(found.folder), "cores": names, "lacking": lacking}

    def people() -> None:
        show.line(f"{found.folder}: ready for {', '.join(names)}")
        if lacking and needs.program is not None:
            missing, advice = ", ".join(lacking), install_compiler(needs.program.title)
            show.line(f"not for {needs.program.files}: {missing} not installed; {advice}; run this again")

    show.document(facts, as_json, people)
