"""`edge-exporter bench`: time a bundle on this machine or on a device."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from exporter.cli.arguments import BundleArgument, NoCheckOption, fail_on, require_bundle
from exporter.foundation.errors import RequestError

if TYPE_CHECKING:
    from exporter.bench.measurement import BenchOutcome

Format = Literal["text", "json", "llama-bench-json", "llama-bench-md"]
FAR_AWAY = "Needs --on."


def bench(
    bundle: BundleArgument,
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
        Path | None, typer.Option("--profile", help="Write a new profile: the device's, with this run as [[measured]].")
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

    require_bundle(bundle)
    if profile is not None:
        require_new_profile(profile)
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
