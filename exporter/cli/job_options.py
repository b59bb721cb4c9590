"""The options of `build` and `plan`: one list, from which both get a job."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from exporter.cli.arguments import RamOption
from exporter.foundation.cpu import available_cores
from exporter.foundation.errors import RequestError

if TYPE_CHECKING:
    from exporter.planning.job import Job

THREADS = min(available_cores(), 8)
ThreadsOption = Annotated[
    int, typer.Option("--threads", min=1, max=1 << 16, help="Threads for the runtimes on this machine.")
]
# Those that a plan decides.
DECIDED = (
    "ram", "backend", "target", "type", "method", "recipe", "transport", "max_file_bytes", "bits", "min_decode",
    "min_prefill", "prefer", "effort", "seed", "context", "adapter",
)  # fmt: skip


def job_of(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder, a hub id, a .gguf file, demo or demo-gemma. A folder may hold a LoRA adapter.",
        ),
    ],
    device: Annotated[
        str | None, typer.Option("--device", "-d", help="Device name, or path of a TOML profile.")
    ] = None,
    ram: RamOption = None,
    backend: Annotated[
        str | None,
        typer.Option(
            "--backend", help="What computes on the device, such as npu:htp: only formats that it computes are chosen."
        ),
    ] = None,
    target: Annotated[
        str, typer.Option("--target", "-t", help="gguf, onnx, onnx-qdq, or auto: the one that the device prefers.")
    ] = "auto",
    type: Annotated[
        str | None, typer.Option("--type", help="Named mix or format for all matrices, such as Q4_K_M or int4.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", help="How weights are quantised: ldlq (error feedback) or rtn (round to nearest)."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Recipe name, such as caldera, or a .toml file.")
    ] = None,
    transport: Annotated[
        Literal["small", "fast"] | None,
        typer.Option("--transport", help="Entropy-code the model files: small, or fast to unpack."),
    ] = None,
    max_file_bytes: Annotated[
        int | None,
        typer.Option(
            "--max-file-bytes", min=1, help="Maximum size of the model files; each matrix gets its best format."
        ),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(
            "--bits", min=0.1, help="The same limit in bits per weight of MODEL, everything in the files counted."
        ),
    ] = None,
    min_decode: Annotated[
        float | None,
        typer.Option("--min-decode", min=1e-3, help="Minimum decode speed in tokens/s (estimated)."),
    ] = None,
    min_prefill: Annotated[
        float | None, typer.Option("--min-prefill", min=1e-3, help="Minimum prefill speed in tokens/s (estimated).")
    ] = None,
    prefer: Annotated[
        str,
        typer.Option(
            "--prefer", help="accuracy; speed: at most twice the loss; or balanced: no slower than the stock tool."
        ),
    ] = "balanced",
    effort: Annotated[
        str | None,
        typer.Option(
            "--effort",
            help="How long to work for a smaller loss: fast, balanced or max. Default: the recipe's, or balanced.",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", help="UTF-8 text to calibrate on; by default the model samples its own."),
    ] = None,
    evaluation: Annotated[Path | None, typer.Option("--evaluation", help="UTF-8 text to measure accuracy on.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=(1 << 63) - 1, help="Random seed.")] = 0,
    context: Annotated[
        int, typer.Option("--context", min=64, help="Context length, in tokens, for speed and memory.")
    ] = 512,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", help="Repeat a bundle's plan.json, on the same model and the same texts."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Folder or hub id of a LoRA adapter's base, if not the one that it names."),
    ] = None,
    adapter: Annotated[
        Literal["merge", "keep"],
        typer.Option(
            "--adapter", help="Merge a LoRA adapter into its base, or keep it beside the base in its own file."
        ),
    ] = "merge",
) -> "Job":
    """Return the job that the options ask for.

    Raises:
        RequestError: an option is named that the plan decides.
        InputError: the plan cannot be read.
    """
    from exporter.planning.job import Job
    from exporter.planning.plan import read_plan

    given = locals()
    defaults = {name: parameter.default for name, parameter in inspect.signature(job_of).parameters.items()}
    if plan is not None:
        named = [f"--{name.replace('_', '-')}" for name in DECIDED if given[name] != defaults[name]]
        if named:
            raise RequestError(
                "the plan decides this already",
                where="--plan",
                got=", ".join(named),
                next_step="leave these options out",
            )
        return Job(model, device, calibration=calibration, evaluation=evaluation, base=base).repeating(read_plan(plan))
    return Job(
        model, device, target, type, method, None, calibration, evaluation, seed, context=context,
        max_file_bytes=max_file_bytes, bits=bits, min_decode_tokens_per_s=min_decode,
        min_prefill_tokens_per_s=min_prefill, prefer=prefer, effort=effort, recipe=recipe, transport=transport,
        base=base, adapter=adapter, ram_bytes=ram, backend=backend,
    )  # fmt: skip


def takes_job(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `job_of`, before its own; it is called with the job in their place."""
    shared = inspect.signature(job_of, eval_str=False).parameters
    own = {name: one for name, one in inspect.signature(command).parameters.items() if name != "job"}

    @functools.wraps(command)
    def run(**given: Any) -> None:
        job = job_of(**{name: given.pop(name) for name in shared})
        command(job, **given)

    parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in (*shared.values(), *own.values())]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    hints = {**_hints(job_of), **_hints(command)}
    run.__annotations__ = {name: hints[name] for name in (*shared, *own)}
    return run


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the types of a function's parameters, without those that are only known to a type checker."""
    kept = {name: hint for name, hint in function.__annotations__.items() if not isinstance(hint, str)}
    return get_type_hints(type("Hints", (), {"__annotations__": kept}), include_extras=True)
