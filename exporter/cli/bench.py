"""`edge-exporter bench`: time a bundle, or the kernels alone, on this machine or on a device."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from exporter.cli.arguments import NoCheckOption, fail_on, require_bundle
from exporter.foundation.errors import RequestError

if TYPE_CHECKING:
    from exporter.bench.kernels import KernelBench
    from exporter.bench.measurement import BenchOutcome

Format = Literal["text", "json", "llama-bench-json", "llama-bench-md"]
FAR_AWAY = "Needs --on."
# What --kernels may come with.
OF_KERNELS = {
    "kernels", "emulated", "on", "device", "threads", "repeats", "identity", "folder", "profile", "format", "as_json",
}  # fmt: skip


def bench(
    context_: typer.Context,
    bundle: Annotated[
        Path | None, typer.Argument(metavar="BUNDLE", help="Folder of the bundle; none with --kernels.")
    ] = None,
    kernels: Annotated[
        bool,
        typer.Option(
            "--kernels",
            help="Time the products of each GGUF type instead of a bundle, by a program that needs nothing on the "
            "device; it is compiled here.",
        ),
    ] = False,
    emulated: Annotated[
        bool,
        typer.Option(
            "--emulated",
            help="With --kernels: run the program on the emulated Arm core of --device, which shows that it works; "
            "its times are not the device's.",
        ),
    ] = False,
    on: Annotated[
        str | None,
        typer.Option("--on", metavar="ADDRESS", help="Device to measure on: ssh://user@host[:port] or adb://serial."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device", "-d", help="Device profile (name or TOML file); the connected device is checked against it."
        ),
    ] = None,
    prompt: Annotated[
        int, typer.Option("--prompt", "-p", min=1, max=65536, help="Length of the prompt in tokens.")
    ] = 512,
    generate: Annotated[int, typer.Option("--generate", "-n", min=1, max=65536, help="Tokens to generate.")] = 128,
    depth: Annotated[int, typer.Option("--depth", min=0, max=1 << 19, help="Tokens already in the context.")] = 0,
    context: Annotated[int, typer.Option("--context", min=64, help="Minimum context length in tokens.")] = 512,
    repeats: Annotated[
        int, typer.Option("--repeats", "-r", min=1, max=1000, help="Repetitions of each test, after a warm-up.")
    ] = 5,
    sustain: Annotated[
        float,
        typer.Option("--sustain", min=0, max=3600, help="Seconds of further generation, for the sustained speed."),
    ] = 0,
    threads: Annotated[
        int, typer.Option("--threads", min=0, max=256, help="0: the profile's number, or one per core, at most 8.")
    ] = 0,
    identity: Annotated[
        Path | None, typer.Option("--identity", "-i", help=f"Private key to use instead of the agent's. {FAR_AWAY}")
    ] = None,
    python: Annotated[
        str | None, typer.Option("--python", help=f"Python interpreter on the device. {FAR_AWAY}")
    ] = None,
    binary: Annotated[
        Path | None, typer.Option("--binary", help=f"llama-bench, built for the device. {FAR_AWAY}")
    ] = None,
    folder: Annotated[str | None, typer.Option("--folder", help=f"Working folder on the device. {FAR_AWAY}")] = None,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep", help=f"Keep the files on the device, so that next time only changes are sent. {FAR_AWAY}"
        ),
    ] = False,
    profile: Annotated[
        Path | None,
        typer.Option(
            "--profile",
            help="Write a new profile: the device's, with this run as [[measured]], or with the speeds of the kernels.",
        ),
    ] = None,
    no_check: NoCheckOption = False,
    format: Annotated[Format, typer.Option("--format", help="Output format.")] = "text",
    as_json: Annotated[bool, typer.Option("--json", help="Same as --format json.")] = False,
) -> None:
    """Time a bundle on this machine, or on a device: send, check, self-test, time, clean up."""
    from exporter.bench.engine import Settings
    from exporter.bench.measurement import measure_here, measure_on
    from exporter.cli import show
    from exporter.predict.measured_runs import require_new_profile

    if profile is not None:
        require_new_profile(profile)
    if kernels:
        _refuse_with_kernels(context_, format)
        if on is None:
            _refuse_without_on({"--identity": identity, "--folder": folder})
        elif emulated:
            raise RequestError("--on and --emulated contradict each other", next_step="name only one of them")
        remote = None if on is None else _remote(on, **_named({"--identity": identity, "--folder": folder}))
        found = _timed_kernels(remote, emulated, device, threads, repeats, profile)
        _print_kernels(found, as_json or format == "json")
        return
    if emulated:
        raise RequestError("--emulated is for kernels", expected="--kernels with it", next_step="leave it out")
    if bundle is None:
        raise RequestError("no bundle is named", expected="a folder, or --kernels", next_step="name one of them")
    require_bundle(bundle)
    settings = Settings(prompt, generate, depth, context, repeats, sustain, threads)
    remote_options = {
        "--identity": identity, "--python": python, "--binary": binary, "--folder": folder, "--keep": keep or None,
    }  # fmt: skip
    if on is None:
        _refuse_without_on(remote_options)
        outcome = measure_here(bundle, settings, device, not no_check)
    else:
        if no_check:
            raise RequestError(
                "--no-check is for this machine: what is sent to a device is always compared", next_step="leave it out"
            )
        with show.progress(enabled=format == "text" and not as_json) as progress:
            outcome = measure_on(bundle, _remote(on, **_named(remote_options)), settings, device, progress)
    if profile is not None:
        from exporter.bench.profile import write_profile

        write_profile(outcome, device, profile)
    _print(outcome, "json" if as_json else format)
    fail_on(outcome.checks)


def _named(options: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("--"): value for name, value in options.items() if value is not None}


def _refuse_without_on(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if value is not None:
            raise RequestError(
                f"{name} is for a device", expected="--on with it", next_step="name one, or leave it out"
            )


def _remote(on: str, **options: Any) -> Any:
    from exporter.bench.measurement import Remote
    from exporter.device.connect.connection import address_of

    return Remote(address_of(on), **options)


def _refuse_with_kernels(context: typer.Context, format: Format) -> None:
    """Refuse what has no meaning for kernels alone."""
    given = [
        parameter
        for parameter in context.command.params
        if parameter.name not in OF_KERNELS
        and str(getattr(context.get_parameter_source(parameter.name or ""), "name", "DEFAULT")) == "COMMANDLINE"
    ]
    if given:
        named = "a bundle" if given[0].param_type_name == "argument" else max(given[0].opts, key=len)
        raise RequestError(f"{named} does not go with --kernels", next_step="leave one of them out")
    if format.startswith("llama-bench"):
        raise RequestError(f"--format {format} is for a bundle", expected="text or json with --kernels")


def _timed_kernels(
    remote: Any, emulated: bool, device: str | None, threads: int, rounds: int, profile: Path | None
) -> "KernelBench":
    from exporter.bench.kernels import kernels_emulated, kernels_here, kernels_on, require_measured, write_profile

    if profile is not None:
        require_measured("emulated" if emulated else "measured")
    if profile is not None and device is None:
        raise RequestError(
            "no profile to start from", where="--profile", next_step="name the device's, or one like it, with --device"
        )
    if emulated:
        return kernels_emulated(device, threads, rounds)
    found = kernels_here(device, threads, rounds) if remote is None else kernels_on(remote, device, threads, rounds)
    if profile is not None and device is not None:
        write_profile(found, device, profile)
    return found


def _print_kernels(found: "KernelBench", as_json: bool) -> None:
    from dataclasses import asdict

    from rich.table import Table

    from exporter.bench.kernels import MOST_SPREAD
    from exporter.cli import show

    speeds = found.speeds
    facts = {
        "where": found.where,
        "machine": asdict(found.machine) | {"features": sorted(found.machine.features)},
        "runtime": found.program.runtime,
        "threads": found.times.threads,
        "basis": found.basis,
        "kernels": {name: speed.model_dump() for name, speed in speeds.items()},
    }

    def people() -> None:
        machine = found.machine
        show.console.print(
            f"[bold]{show.plain(found.where)}[/], {show.plain(machine.cpu or machine.architecture)}: "
            f"{show.plain(found.program.runtime)}, {found.times.threads} threads, {found.basis}"
        )
        columns = ("type", "one token, 10⁹ weights/s", "GB/s", "µs a product", "many, 10⁹ weights/s", "spread")
        table = Table(*columns, box=None)
        for name, one in speeds.items():
            decode, prefill = one.decode_weights_per_s / 1e9, one.prefill_weights_per_s / 1e9
            table.add_row(
                name, f"{decode:.3g}", f"{decode * one.bits / 8:.3g}", f"{1e6 * one.product_seconds:.2g}",
                f"{prefill:.3g}", f"± {one.spread:.0%}",
            )  # fmt: skip
        show.console.print(table)
        if found.spread > MOST_SPREAD:
            show.line(f"times vary by up to {found.spread:.0%}: end what else runs there, and time them again")

    show.document(facts, as_json, people)


def _print(outcome: "BenchOutcome", format: Format) -> None:
    from exporter.bench import llama_bench
    from exporter.cli import show

    if format == "llama-bench-json":
        show.line(llama_bench.to_json(outcome.row_head, outcome.measured))
    elif format == "llama-bench-md":
        show.line(llama_bench.to_markdown(outcome.row_head, outcome.measured))
    else:
        facts = _facts(outcome)
        show.document(facts, format == "json", lambda: _show(outcome, facts))


def _facts(outcome: "BenchOutcome") -> dict[str, Any]:
    from dataclasses import asdict

    from exporter.bench.measurement import quantities

    machine = asdict(outcome.machine) | {"features": sorted(outcome.machine.features)}
    return {
        **{name: quantity.model_dump(mode="json") for name, quantity in quantities(outcome).items()},
        "where": outcome.where,
        "machine": machine,
        "runtime": outcome.measured.runtime,
        "threads": outcome.measured.n_threads,
        "tests": [test.model_dump(mode="json") for test in outcome.measured.tests],
        "sustained_ns": list(outcome.measured.sustained_ns),
        "checks": [check.model_dump(mode="json") for check in outcome.checks],
    }


def _show(outcome: "BenchOutcome", facts: dict[str, Any]) -> None:
    from exporter.cli import show

    machine = outcome.machine
    names = ", ".join(test.name for test in outcome.measured.tests)
    show.console.print(
        f"[bold]{show.plain(outcome.where)}[/], {show.plain(machine.cpu or machine.architecture)}: "
        f"{show.plain(outcome.measured.runtime)}, {outcome.measured.n_threads} threads, {names}"
    )
    show.quantities({name: value for name, value in facts.items() if isinstance(value, dict) and "basis" in value})
    show.checks(outcome.checks)
