"""The user's own measured runs: parses them from the command line, and stores them in a profile."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from exporter.device.backend import Measured
from exporter.device.profile import DeviceProfile
from exporter.device.profile_writer import profile_toml
from exporter.foundation.cache import replacing
from exporter.foundation.config_files import checked, shown
from exporter.foundation.errors import InputError, RequestError, did_you_mean
from exporter.predict.request import Request
from exporter.predict.workload import backend_name, format_family

# Name in the text -> key of a run, and the type of its value.
KEYS: dict[str, tuple[str, type]] = {
    "decode": ("decode_tokens_per_s", float), "prefill": ("prefill_tokens_per_s", float),
    "file-bytes": ("file_bytes", int), "parameters": ("parameters", int), "params": ("parameters", int),
    "format": ("format", str), "backend": ("backend", str), "context": ("context", int),
    "prompt": ("prompt_tokens", int), "threads": ("threads", int),
    "runtime": ("runtime", str), "model": ("model", str),
}  # fmt: skip
EXPECTED = "decode=TOKENS/S,file-bytes=N and, where it differs, format=Q4_0"
SOURCE = "measured by the user on this device"


def measured_run(text: str, request: Request | None = None) -> Measured:
    """Parse a measured run such as `decode=12.5,file-bytes=1050000000,format=Q4_0`.

    Args:
        text: Pairs of name and value.
        request: Gives defaults for format, backend and context, and for parameters if format and file size are the
            same.

    Raises:
        RequestError: the text is malformed, lacks a speed, the file's bytes or the format, or a number is impossible.
    """
    given = dict(_pair(part, text) for part in text.split(","))
    if not {"decode_tokens_per_s", "prefill_tokens_per_s"} & set(given):
        raise RequestError("a measured run has no speed", got=shown(text), expected=EXPECTED)
    if "file_bytes" not in given:
        raise RequestError("a measured run has no file-bytes", got=shown(text), expected=EXPECTED)
    if request is not None:
        given = {"format": request.format, "backend": request.backend, "context": request.context, **given}
        if given["file_bytes"] == request.file_bytes and given["format"] == request.format:
            given = {"parameters": request.parameters, **given}
    if "format" not in given:
        raise RequestError("a measured run has no format", got=shown(text), expected=EXPECTED)
    given["backend"] = backend_name(str(given.get("backend", "cpu")))
    format_family(str(given["format"]))
    try:
        return checked({**given, "basis": "measured", "source": SOURCE}, Measured, "--measured")
    except InputError as error:
        raise RequestError(str(error)) from error


def _pair(part: str, text: str) -> tuple[str, object]:
    name, sign, value = part.partition("=")
    if not sign or not value.strip():
        raise RequestError("a measured run is not made of name=value", got=shown(text), expected=EXPECTED)
    if name.strip() not in KEYS:
        raise RequestError(f"unknown name {shown(name)} in a measured run", next_step=did_you_mean(name, KEYS))
    key, kind = KEYS[name.strip()]
    try:
        return key, kind(value.strip())
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise RequestError(f"{name.strip()} of a measured run is no number", got=shown(value), expected=what) from None


def calibrated(profile: DeviceProfile, runs: Sequence[Measured], name: str) -> DeviceProfile:
    """Return a profile with more measured runs and a new name.

    Raises:
        RequestError: a run is impossible on this device, since it exceeds the memory bandwidth.
    """
    try:
        return with_runs(profile, [run.model_dump() for run in runs], name, name)
    except InputError as error:
        raise RequestError(str(error)) from error


def with_runs(
    profile: DeviceProfile, runs: Sequence[Mapping[str, object]], name: str, where: Path | str
) -> DeviceProfile:
    """Return a profile with more measured runs, given as unchecked tables, and a new name.

    Raises:
        InputError: a run is invalid or impossible on this device.
    """
    measured = [*(run.model_dump() for run in profile.measured), *runs]
    return checked(profile.model_dump() | {"name": name, "measured": measured}, DeviceProfile, where)


def require_new_profile(output: Path) -> None:
    """Check that a profile can be written to a path.

    Raises:
        RequestError: it does not end with .toml, it exists, or its folder does not.
    """
    if output.suffix != ".toml":
        raise RequestError("a profile's name ends with .toml", got=output.name, next_step=f"use {output.name}.toml")
    if os.path.lexists(output):
        raise RequestError("already exists", where=output, next_step="choose another name or delete it")
    if not output.parent.is_dir():
        raise RequestError("there is no such folder", where=output.parent, next_step="make it, or name another")


def write_profile(profile: DeviceProfile, output: Path) -> None:
    """Write a profile as the TOML file that `load_device` reads.

    Raises:
        RequestError: see `require_new_profile`.
    """
    require_new_profile(output)
    with replacing(output) as partial:
        partial.write_text(profile_toml(profile), encoding="utf-8")
