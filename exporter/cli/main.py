"""`edge-exporter`: commands, one function each. Heavy imports wait until a command runs."""

import json
import logging
import os
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Never

import typer

from exporter.cli import bench as benching
from exporter.cli import devices as profiles
from exporter.cli import emulate as emulating
from exporter.cli import families as known_families
from exporter.cli import predict as prediction
from exporter.cli.arguments import BundleArgument, JsonOption, NoCheckOption, fail_on, require_bundle
from exporter.cli.job_options import THREADS, ThreadsOption, takes_job
from exporter.foundation.errors import ExporterError, RequestError, printable

if TYPE_CHECKING:
    from exporter.planning.job import Job

app = typer.Typer(
    name="edge-exporter",
    help="Compress a language model, lower it to an edge runtime, verify it, and pack it for a device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

app.add_typer(profiles.app, name="devices")
app.add_typer(known_families.app)
app.add_typer(prediction.app)
app.add_typer(emulating.app, name="emulate")

INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM)


@app.command(epilog="Example: edge-exporter build demo --device galaxy-s24-ultra -o phone")
@takes_job
def build(
    job: "Job",
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new bundle; must not exist.")],
    threads: ThreadsOption = THREADS,
    save_pruned: Annotated[
        Path | None, typer.Option("--save-pruned", help="New folder for the pruned model, in transformers' format.")
    ] = None,
    emulate: Annotated[
        bool, typer.Option("--emulate", help="Also run the model on this machine under the device's limits.")
    ] = False,
    judge: Annotated[
        bool, typer.Option("--judge", help="Also run the model in a second runtime, OpenVINO, and compare.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Build a verified bundle for a device."""
    from exporter.cli import show
    from exporter.pipeline import build as run_build

    job = replace(job, output=output, threads=threads, save_pruned=save_pruned, emulate=emulate, judge=judge)
    with show.progress(enabled=not as_json) as progress:
        bundle = run_build(job, progress)
    checks = bundle.report.checks + bundle.measurements.checks
    show.document(show.bundle_facts(bundle.path), as_json, lambda: show.bundle(bundle.path))
    fail_on(checks)


@app.command(epilog="Example: edge-exporter plan demo --device raspberry-pi-5 --type Q4_0")
@takes_job
def plan(job: "Job", *, as_json: JsonOption = False) -> None:
    """Show what build would do and need, without reading weights."""
    from exporter.cli import show
    from exporter.pipeline import plan as run_plan

    made = run_plan(job)
    show.document(show.outline_facts(made), as_json, lambda: show.outline(made))
    fail_on(made.checks)


@app.command(epilog='Example: edge-exporter run phone -p "The capital of France is"')
def run(
    bundle: BundleArgument,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")],
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="Maximum tokens to generate.")] = 48,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send the prompt as a chat message, by the model's chat template.")
    ] = False,
    min_decode: Annotated[
        float | None,
        typer.Option(
            "--min-decode", min=1e-3, help="Keep enough weights decoded to reach this speed (coded bundles only)."
        ),
    ] = None,
    no_check: NoCheckOption = False,
    threads: ThreadsOption = THREADS,
    as_json: JsonOption = False,
) -> None:
    """Generate text with a bundle in its own runtime; a coded bundle stays coded in memory."""
    from exporter.bundle.installed import answer
    from exporter.cli import show

    require_bundle(bundle)
    given = answer(bundle, prompt, tokens, chat, threads, min_decode, not no_check)
    show.document(show.answer_facts(prompt, given), as_json, lambda: show.answer(given))


@app.command(epilog="Example: edge-exporter verify phone")
def verify(bundle: BundleArgument, threads: ThreadsOption = THREADS, as_json: JsonOption = False) -> None:
    """Check every byte of a bundle and run its self-test, offline."""
    from exporter.bundle.installed import self_test
    from exporter.bundle.verify import verify_bundle
    from exporter.cli import show

    require_bundle(bundle)
    with show.progress(enabled=not as_json) as progress:
        mib = 1 << 20
        checks = tuple(verify_bundle(bundle, lambda done, total: progress("verify: MiB", done // mib, total // mib)))
    if all(check.status == "passed" for check in checks):
        checks += (self_test(bundle, threads),)
    show.document(show.checks_facts(checks), as_json, lambda: show.checks(checks))
    fail_on(checks)


app.command(epilog="Example: edge-exporter bench phone --on ssh://pi@raspberrypi --device raspberry-pi-5")(
    benching.bench
)


@app.command(epilog="Example: edge-exporter compare phone laptop")
def compare(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Two or more bundles of the same model.")],
    as_json: JsonOption = False,
) -> None:
    """Show bundles side by side, all measured on the same tokens."""
    from exporter.cli import show

    if len(bundles) < 2:
        raise RequestError("there is nothing to compare with", got=bundles[0], next_step="name a second bundle")
    for bundle in bundles:
        require_bundle(bundle)
    facts = [show.bundle_facts(bundle) for bundle in bundles]
    show.document({"bundles": facts}, as_json, lambda: show.comparison(facts))


@app.command(epilog="Example: edge-exporter inspect phone --json")
def inspect(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE_OR_GGUF", help="Folder of a bundle, or a GGUF file.")],
    as_json: JsonOption = False,
) -> None:
    """Show the figures, checks and tensors of a bundle, or the tensors of a GGUF file."""
    from exporter.cli import show

    if path.suffix == ".gguf":
        facts = show.gguf_facts(path)
        show.document(facts, as_json, lambda: show.tensors(facts))
    else:
        require_bundle(path)
        show.document(show.bundle_facts(path), as_json, lambda: show.bundle(path))


@app.command(epilog="Example: edge-exporter unpack shipped -o phone")
def unpack(
    file: Annotated[
        Path, typer.Argument(metavar="BUNDLE_OR_FILE", help="Bundle with coded files, or a single coded file.")
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Folder of the unpacked bundle (must not exist), or of the file."),
    ],
    as_json: JsonOption = False,
) -> None:
    """Restore the original files of a coded bundle, bit by bit, and check them."""
    from exporter.bundle.transport import unpack_bundle
    from exporter.cli import show
    from exporter.coding.container import original_of, restore_file

    if file.is_dir():
        require_bundle(file)
        with show.progress(enabled=not as_json) as progress:
            unpack_bundle(file, output, progress)
        sentence = f"{output}: every byte as its manifest lists it"
        show.document({"bundle": str(output)}, as_json, lambda: show.line(sentence))
        return
    if not file.is_file():
        raise RequestError("there is no such file", where=file)
    restored = output / original_of(file).name
    if os.path.lexists(restored):
        raise RequestError("already exists", where=restored, next_step="choose another -o or delete it")
    output.mkdir(parents=True, exist_ok=True)
    with show.progress(enabled=not as_json) as progress:
        mib = 1 << 20
        original = restore_file(file, restored, lambda done, total: progress("unpack: MiB", done // mib, total // mib))
    facts = {"file": str(restored), "bytes": original.size, "sha256": original.sha256.hex()}
    show.document(facts, as_json, lambda: show.line(f"{restored}: {original.size:,} bytes"))


def main() -> Never:
    """Run the command line; every expected failure is one sentence and its exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("gguf").setLevel(logging.WARNING)
    # Raised as exceptions of our own, so that what is half-written goes first and a sentence is said.
    for number in INTERRUPTIONS:
        signal.signal(number, _interrupt)
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except ExporterError as error:
        _end(str(error), error.exit_code)
    except _Interruption as interruption:
        _end("interrupted; nothing half-written was left", interruption.exit_code)
    except typer.TyperException as error:
        _end(error.format_message(), 2)
    except OSError as error:
        _end(_refused(error), 2)
    except Exception:
        print(printable(traceback.format_exc(), kept="\n"), file=sys.stderr)
        _end("this is a fault of edge-exporter, not of your input: please report it with the lines above", 70)


class _Interruption(BaseException):
    """A signal asked to end: Ctrl-C, or the system."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


def _interrupt(number: int, _: object) -> Never:
    # A second one must not cut short the cleaning up after the first.
    for other in INTERRUPTIONS:
        signal.signal(other, signal.SIG_IGN)
    raise _Interruption(number)


def _refused(error: OSError) -> str:
    """Return what to say of a file that could not be read or written."""
    from exporter.foundation.cache import ELSEWHERE, disk_of, full_disk

    where = error.filename or "a file could not be read or written"
    full = full_disk(error)
    if full is None:
        return f"{where}: {error.strerror or error}; check the path, its permissions and the disk's free space"
    disk = f"; got {disk_of(Path(where))}" if error.filename else ""
    return f"{where}: {full}{disk}; {ELSEWHERE}"


def _end(sentence: str, code: int) -> Never:
    if "--json" in sys.argv:
        print(json.dumps({"error": sentence, "exit_code": code}), file=sys.stderr)
    else:
        print(f"edge-exporter: {printable(sentence)}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
