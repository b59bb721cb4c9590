"""Use of a finished bundle: answering prompts and testing."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from exporter.bundle.manifest import SELFTEST
from exporter.bundle.opening import UNPACK, opened_bundle, shipped
from exporter.bundle.reading import read_document, read_manifest
from exporter.device.memory_size import device_with
from exporter.emulate.sandbox.limits import ProcessLimits, device_limits
from exporter.foundation.errors import RequestError, RuntimeCrashError
from exporter.foundation.progress import Progress, silent
from exporter.foundation.quantities import Check
from exporter.model.chat import as_taken, render
from exporter.prove.emulation import Emulation, emulate
from exporter.prove.self_test import SelfTest, run_self_test
from exporter.targets.artifact import Artifact, runs_coded
from exporter.targets.opened import OpenedArtifact
from exporter.targets.runtime import CodedResidence
from exporter.targets.text import open_text

if TYPE_CHECKING:  # it imports transformers
    from exporter.calibrate.windows import Tokens

WITHOUT_CHAT = "leave out --chat"

# Tokens of context to run with; a longer prompt gets a longer one.
USUAL_CONTEXT, TOKENS_AT_ENDS = 2048, 16


@dataclass(frozen=True)
class Answer:
    """The answer of a bundle.

    Attributes:
        text: The continuation.
        residence: Memory use of its weights; None if they are plain.
    """

    text: str
    residence: CodedResidence | None


def answer(
    bundle: Path,
    prompt: str,
    tokens: int,
    chat: bool,
    threads: int,
    tokens_per_s: float | None = None,
    check: bool = True,
) -> Answer:
    """Return the bundle's greedy continuation of a prompt; a coded one is decoded as it runs, if its target can.

    Args:
        bundle: The bundle's folder.
        prompt: Text to continue, or the user's message in a chat.
        tokens: Most tokens to answer with.
        chat: Put the prompt into the model's chat template.
        threads: Threads of the runtime.
        tokens_per_s: Keep enough weights plain to generate at this speed (coded bundles only).
        check: Compare the model's files with the manifest first.

    Raises:
        InputError: a file of the bundle is not as its manifest lists it, or no runtime accepts it.
        RequestError: the model has no chat template that accepts the prompt, the bundle is not coded although a speed
            is requested, or the machine cannot reach that speed.
    """
    with opened_bundle(bundle, may_be_coded=True, check=check) as artifact:
        if tokens_per_s is not None and not artifact.coded:
            raise RequestError(
                "the bundle's weights are plain, so none are decoded", next_step="leave out --min-decode"
            )
        text = as_chat(artifact, prompt) if chat else prompt
        # No tokenizer makes more tokens of a text than it has bytes, but for those at its ends.
        context = max(USUAL_CONTEXT, len(text.encode()) + tokens + TOKENS_AT_ENDS)
        with OpenedArtifact(artifact, context, threads) as opened:
            given = opened.tokenize(text)
            if len(given) + tokens > opened.positions():
                raise RequestError(
                    "the prompt and its answer are longer than the model's context",
                    got=f"{len(given):,} and {tokens:,} tokens", expected=f"at most {opened.positions():,} together",
                    next_step="shorten the prompt, or ask for a shorter answer with --tokens",
                )  # fmt: skip
            if tokens_per_s is not None:
                opened.keep_up(tokens_per_s)
            made = opened.text(opened.generate(given, tokens))
            return Answer(made.strip(), opened.residence() if artifact.coded else None)


def as_chat(artifact: Artifact, prompt: str) -> str:
    """Render a user's message with the artifact's template, apart from the model, since the template is untrusted.

    Raises:
        RequestError: there is no template, or it refuses the prompt.
    """
    with open_text(artifact) as child:
        try:
            taken = as_taken(lambda form: render(child, form, True), [{"role": "user", "content": prompt}], False)
        except RuntimeCrashError as error:
            raise RequestError("the model's chat template cannot be used", got=error, next_step=WITHOUT_CHAT) from error
    if taken.rendered.text is None:
        reason = taken.rendered.reason
        raise RequestError("the model's chat template refuses the prompt", got=reason, next_step=WITHOUT_CHAT)
    return taken.rendered.text


def self_test(bundle: Path, threads: int) -> Check:
    """Run the self-test of a verified bundle in its own runtime; a coded bundle may have to be unpacked first.

    Raises:
        InputError: it is no self-test of this exporter, or the bundle's model cannot be run.
    """
    manifest = read_manifest(bundle)
    test = read_document(bundle, SELFTEST, SelfTest)
    if any(file.coded for file in shipped(bundle, manifest)) and not runs_coded(manifest.target):
        return Check(name="selftest", status="not run", detail=f"the bundle's model is coded: {UNPACK}")
    with (
        opened_bundle(bundle, may_be_coded=True, check=False) as artifact,
        OpenedArtifact(artifact, max(64, len(test.prompt)), threads) as opened,
    ):
        return run_self_test(test, opened.logits)


def emulate_bundle(
    bundle: Path,
    device: str,
    ram_bytes: int | None,
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
        ram_bytes: Installed memory of the device; None for the profile's own.
        memory_bytes: Most memory, in place of the device's limit for one app.
        cores: Cores, in place of the device's.
        cpu_share: Share of the time of these cores.
        timeout_s: Seconds after which the run is killed; None to derive it from the model's size.
        context: Tokens of context to run at.
        progress: Called with the name of the step, steps done and their total.

    Raises:
        RequestError: a limit is impossible.
    """
    profile = device_with(device, ram_bytes)
    with opened_bundle(bundle) as artifact:
        granted = device_limits(profile, artifact.file_bytes)
        limits = ProcessLimits(
            granted.memory_bytes if memory_bytes is None else memory_bytes,
            granted.cores if cores is None else cores,
            cpu_share,
            granted.timeout_s if timeout_s is None else timeout_s,
        )
        return emulate(artifact, profile, _some_ids(context)[None], context, progress, limits)


def _some_ids(count: int) -> "Tokens":
    """Return token ids that exist in every vocabulary, int64 [count]; speed does not depend on the ids."""
    return np.random.default_rng(0).integers(100, 300, count)
