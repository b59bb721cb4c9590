"""`edge-exporter predict` and `devices calibrate`: what a model's file will do on a device, and a device made known."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from exporter.cli.arguments import DeviceOption, JsonOption, RamOption
from exporter.cli.devices import app as devices_app

if TYPE_CHECKING:
    from exporter.predict.estimate import Estimate
    from exporter.predict.prediction import Prediction

MEASURED_HELP = (
    "A run measured on this device: decode=TOKENS/S,file-bytes=N, optionally prefill=TOKENS/S, and what differs from "
    "the request: format=, parameters=, backend=, context=, threads=, runtime=. Can be given several times."
)
app = typer.Typer()
MeasuredOption = Annotated[list[str] | None, typer.Option("--measured", help=MEASURED_HELP)]
EXAMPLE = "--file-bytes 4920000000 --params 8030000000 --format Q4_K_M --backend cpu"


def _whole(text: str) -> int:
    """Return a whole number, which may be written as 1.24e9."""
    try:
        number = int(text) if text.isdecimal() else int(float(text))
        exact = text.isdecimal() or number == float(text)
    except (ValueError, OverflowError):
        exact = False
    if not exact:
        raise typer.BadParameter(f"{text!r} is not a whole number, such as 1240000000 or 1.24e9")
    return number


@app.command(epilog=f"Example: edge-exporter predict --device pixel-9 {EXAMPLE}")
def predict(
    device: DeviceOption,
    file_bytes: Annotated[int, typer.Option("--file-bytes", parser=_whole, help="Size of the model file in bytes.")],
    parameters: Annotated[int, typer.Option("--params", parser=_whole, help="Number of weights, such as 1.24e9.")],
    format: Annotated[str, typer.Option("--format", help="Weight format, such as Q4_0, Q4_K_M, F16 or int4.")],
    backend: Annotated[
        str, typer.Option("--backend", help="cpu, gpu:metal, gpu:opencl, gpu:cuda, gpu:vulkan, npu:htp, ...")
    ] = "cpu",
    context: Annotated[int, typer.Option("--context", help="Tokens in the context.")] = 512,
    prompt: Annotated[
        int | None,
        typer.Option("--prompt", help="Length of the prompt in tokens; by default 512, or the context if less."),
    ] = None,
    ram: RamOption = None,
    runtime: Annotated[str, typer.Option("--runtime", help="Runtime, such as llama.cpp, Ollama or ExecuTorch.")] = "",
    kv_bytes: Annotated[
        int | None,
        typer.Option(
            "--kv-bytes",
            parser=_whole,
            help="Bytes of a token's keys and values in float16: 4 x layers x KV heads x their width. "
            "By default, as models of that size have.",
        ),
    ] = None,
    measured: MeasuredOption = None,
    as_json: JsonOption = False,
) -> None:
    """Predict speed, memory and energy of a model file on a device; no model is needed."""
    from exporter.cli import show
    from exporter.device.memory_size import device_with
    from exporter.predict.measured_runs import calibrated, measured_run
    from exporter.predict.prediction import predict as run_predict
    from exporter.predict.request import Request, checked_request
    from exporter.targets.memory import memory_of

    profile = device_with(device, ram)
    length = min(context, 512) if prompt is None else prompt
    asked = Request(file_bytes, parameters, format, backend, context, length, runtime, kv_bytes_per_token=kv_bytes or 0)
    request = checked_request(asked, profile)
    runs = [measured_run(text, request) for text in measured or []]
    prediction = run_predict(calibrated(profile, runs, profile.name), request, memory_of(runtime, format.strip()))
    show.document(prediction.model_dump(mode="json", exclude_none=True), as_json, lambda: _show(prediction))


@devices_app.command(
    epilog="Example: edge-exporter devices calibrate -d pixel-9 "
    "--measured decode=11.2,file-bytes=1050000000,parameters=1720000000,format=Q4_0 -o my-pixel.toml"
)
def calibrate(
    device: DeviceOption,
    measured: Annotated[list[str], typer.Option("--measured", help=MEASURED_HELP)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Path of the new profile; must not exist.")],
    ram: RamOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a profile of your own device: a named one plus your measurements, which narrow all predictions."""
    from exporter.cli import show
    from exporter.device.memory_size import device_with
    from exporter.predict.measured_runs import calibrated, measured_run, write_profile

    runs = [measured_run(text) for text in measured]
    profile = calibrated(device_with(device, ram), runs, output.name.removesuffix(".toml"))
    write_profile(profile, output)
    facts = {"profile": str(output), "device": profile.name, "measured": len(profile.measured)}
    show.document(
        facts, as_json, lambda: show.line(f"{output}: {len(profile.measured)} timed runs; use it as --device")
    )


def _show(prediction: "Prediction") -> None:
    from rich.table import Table

    from exporter.cli import show
    from exporter.report.figures import ESTIMATES

    title = f"{prediction.format} on {prediction.device}, {prediction.backend}"
    show.console.print(f"[bold]{show.plain(title)}[/]: predicted, each with an interval of 80 %")
    table = Table("", "value", "low", "high", "unit", "basis", "how", box=None)
    for key, name in ESTIMATES.items():
        estimate: Estimate | None = getattr(prediction, key)
        if estimate is not None:
            table.add_row(name, *_numbers(estimate), estimate.basis, f"[dim]{show.plain(estimate.how)}[/]")
    show.console.print(table)
    for line in _sentences(prediction):
        show.console.print(show.plain(line))


def _numbers(estimate: "Estimate") -> list[str]:
    values = (estimate.value, estimate.low, estimate.high)
    if estimate.unit == "bytes":
        return [*(f"{value / 1e9:.2f}" for value in values), "GB"]
    return [*(f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" for value in values), estimate.unit]


def _sentences(prediction: "Prediction") -> list[str]:
    lines = [prediction.residence.sentence]
    slow: Any = prediction.residence.decode_from_storage
    if slow is not None:
        lines.append(f"from storage it decodes {slow.value:.2g} tokens/s ({slow.low:.2g} to {slow.high:.2g})")
    if prediction.threads is not None:
        chosen = prediction.threads
        lines.append(f"threads: {chosen.decode} to decode, {chosen.prefill} for prompts; {chosen.detail}")
    return [*lines, *(f"note: {note}" for note in prediction.notes)]
