"""Using a finished bundle: talking to it and testing it."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from exporter.bundle.manifest import Manifest
from exporter.bundle.verify import read_manifest
from exporter.coding.container import SUFFIX
from exporter.confinement.limits import Limits, device_limits
from exporter.device.profile import load_device
from exporter.errors import InputError, RequestError
from exporter.job import Progress, silent
from exporter.measures import Check
from exporter.report.data import from_json
from exporter.targets.artifact import Artifact, open_artifact
from exporter.validate.emulation import Emulation, emulate
from exporter.validate.selftest import SelfTest, run_self_test

if TYPE_CHECKING:  # it brings transformers along
    from exporter.calibrate.text import Tokens

UNPACK = "restore it with edge-exporter unpack"


def open_bundle(bundle: Path) -> Artifact:
    """Return the artifact of a bundle whose files have the sizes that its manifest states.

    Raises:
        InputError: a file is missing or truncated.
        RequestError: one is coded.
    """
    manifest = read_manifest(bundle)
    coded = _coded_file(bundle, manifest)
    if coded is not None:
        raise RequestError("the bundle's model is coded", where=coded, next_step=UNPACK)
    for entry in manifest.files:
        path = bundle / entry.path
        size = path.stat().st_size if path.is_file() else None
        if size != entry.size:
            raise InputError("a file of the bundle is missing or truncated", where=path, got=size, expected=entry.size)
    weights = tuple(bundle / entry.path for entry in manifest.files if entry.role == "model")
    return Artifact(manifest.target, bundle / "model", weights)


def _coded_file(bundle: Path, manifest: Manifest) -> Path | None:
    """Return a coded file that stands in the place of one that the runtime loads; None where there is none."""
    coded = [bundle / (entry.path + SUFFIX) for entry in manifest.files if entry.coded is not None]
    return next((path for path in coded if path.is_file() and not path.with_suffix("").is_file()), None)


def answer(bundle: Path, prompt: str, tokens: int, chat: bool, threads: int) -> str:
    """Return the bundle's greedy continuation of a prompt.

    Args:
        bundle: The bundle's folder.
        prompt: Text to continue, or what the user says in a chat.
        tokens: Most tokens to answer with.
        chat: Put the prompt into the model's chat template.
        threads: Threads of the runtime.

    Raises:
        RequestError: a chat is asked of a model without a chat template.
    """
    artifact = open_bundle(bundle)
    with open_artifact(artifact, 2048, threads) as child:
        text = child.call("render_chat", [{"role": "user", "content": prompt}], True) if chat else prompt
        if text is None:
            raise RequestError("the model's chat template refuses the prompt", next_step="leave out --chat")
        given = child.call("tokenize", text)
        made: str = child.call("text", child.call("generate", given, tokens))
        return made.strip()


def self_test(bundle: Path, threads: int) -> Check:
    """Run the bundle's self-test in its own runtime; a coded bundle has to be unpacked for that."""
    if _coded_file(bundle, read_manifest(bundle)) is not None:
        return Check(name="selftest", status="not run", detail=f"the bundle's model is coded: {UNPACK}")
    artifact = open_bundle(bundle)
    path = bundle / "selftest.json"
    test = from_json(SelfTest, path.read_bytes(), path)
    with open_artifact(artifact, max(64, len(test.prompt)), threads) as child:
        return run_self_test(test, partial(child.call, "logits"))


def emulate_bundle(
    bundle: Path,
    device: str,
    memory_bytes: int | None,
    cores: int | None,
    cpu_share: float,
    timeout_s: float | None,
    context: int,
    progress: Progress = silent,
) -> Emulation:
    """Run a bundle as on a device, on this machine.

    Args:
        bundle: The bundle's folder.
        device: A profile's name, or the path of a user's own TOML.
        memory_bytes: Most memory, in place of what one app may use there.
        cores: Cores, in place of the device's.
        cpu_share: Share of the time of these cores.
        timeout_s: Seconds after which the run is ended; None for what the model's size suggests.
        context: Tokens of context to run at.
        progress: Called with what is done, steps done and their total.

    Raises:
        RequestError: a limit is impossible.
    """
    profile = load_device(device)
    artifact = open_bundle(bundle)
    granted = device_limits(profile, artifact.file_bytes)
    limits = Limits(
        granted.memory_bytes if memory_bytes is None else memory_bytes,
        granted.cores if cores is None else cores,
        cpu_share,
        granted.timeout_s if timeout_s is None else timeout_s,
    )
    return emulate(artifact, profile, _some_ids(context)[None], context, progress, limits)


def _some_ids(count: int) -> "Tokens":
    """Return token ids that exist in every vocabulary, int64 [count]; speed does not depend on which they are."""
    return np.random.default_rng(0).integers(100, 300, count)
