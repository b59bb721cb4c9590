"""A device's profile with a measurement on it, as a user's own TOML file."""

from pathlib import Path
from typing import Any

from exporter.bench.measurement import BenchOutcome
from exporter.device.profile import DeviceProfile, device_names, load_device
from exporter.foundation.config_files import shown
from exporter.foundation.errors import RequestError
from exporter.planning.expected import format_of
from exporter.predict import measured_runs

SOURCE = "edge-exporter bench"


def write_profile(outcome: BenchOutcome, device: str | None, path: Path) -> None:
    """Write the profile of the measured device, with this run added.

    Args:
        outcome: The measurement.
        device: The profile to start from; None takes the bundle's.
        path: The new file; its name without `.toml` becomes the device's name.

    Raises:
        RequestError: there is no profile to start from, or the file cannot be a new one.
        InputError: the run cannot have been on this device.
    """
    measured_runs.write_profile(
        measured_runs.with_runs(base_of(outcome, device), [_run(outcome)], path.stem, path), path
    )


def base_of(outcome: BenchOutcome, device: str | None) -> DeviceProfile:
    """Return the profile to which a measurement is added.

    Raises:
        RequestError: none is named, and the bundle's is not available or is for another processor's instructions.
    """
    name = device or outcome.subject.manifest.device
    verified = any(one.name == "device.instructions" and one.status == "passed" for one in outcome.checks)
    if device is None and (name not in device_names() or not verified):
        raise RequestError(
            "no profile to start from", got=f"a measurement on what is not known to be a {shown(name)}",
            next_step="name the device's profile, or one like it, with --device",
        )  # fmt: skip
    return load_device(name)


def _run(outcome: BenchOutcome) -> dict[str, Any]:
    measured, head, report = outcome.measured, outcome.row_head, outcome.subject.report
    stored = ((one.format, one.stored_bytes) for one in report.tensors)
    row = {
        "backend": "cpu",
        "runtime": measured.runtime,
        "model": report.model.name,
        "format": format_of(report.recipe.scheme, stored),
        "file_bytes": head.size_bytes,
        "parameters": head.parameters,
        "decode_tokens_per_s": measured.decode.tokens_per_s,
        "prefill_tokens_per_s": measured.prefill.tokens_per_s,
        "prompt_tokens": measured.prefill.n_prompt,
        "context": measured.decode.n_depth + max(1, measured.decode.n_gen // 2),
        "threads": measured.n_threads,
        "peak_bytes": measured.peak_bytes,
        "basis": "measured",
        "source": f"{SOURCE}, {measured.prefill.test_time}, {outcome.machine.cpu or outcome.machine.architecture}",
    }
    return {key: value for key, value in row.items() if value is not None}
