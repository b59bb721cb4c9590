"""Runs an artifact on an emulated Arm core like the device's, and chooses how its activations are rounded there.

Two things are checked. With float32 activations the core must compute the same as this machine, except for the order of
sums: this check is strict, and shows that instructions, runtime and files are right. How kernels round activations to
integers differs from core to core. Each setting of the artifact is therefore measured on that core, against float32
activations on the same tokens. Among the settings that cost no more than twice as much as rounding here, the fastest is
stored in the artifact. Emulation takes several times as long in float32 as in integers, so the core computes some
tokens in it, and this machine computes the rest. Because the two agree so strictly, a divergence from one is a
divergence from the other.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from exporter.calibrate.windows import Tokens
from exporter.device.profile import DeviceProfile
from exporter.emulate.arm64.core import Core, lacked, stand_in
from exporter.emulate.arm64.installation import Installation
from exporter.emulate.arm64.setup import installation
from exporter.formats.format import Float32
from exporter.foundation.errors import MissingDependencyError, RequestError, RuntimeCrashError
from exporter.foundation.progress import Progress, silent
from exporter.foundation.quantities import Check, Quantity
from exporter.prove.accuracy import divergence
from exporter.prove.emulation import Emulation, not_run, outcome, words
from exporter.targets.artifact import Artifact
from exporter.targets.emulated import Emulated, Run, Setting, emulated_target, emulation_needs
from exporter.targets.opened import OpenedArtifact

INSTRUCTIONS, AGREEMENT, ROUNDING = "arm64.instructions", "arm64.float_agreement", "arm64.rounding"
NAMES = (INSTRUCTIONS, AGREEMENT, ROUNDING)
# Sums of some thousand products in another order.
MOST_DIFFERENCE = 1e-3
MOST_AGREEMENT_KL = 1e-6
# Limits of the loss by rounding on a core: a multiple of this machine's own loss on the same tokens, and in any case a
# negligible one; if kernels round nothing, no more than another order of sums.
TIMES_HERE, NEGLIGIBLE_KL, MOST_KL_UNROUNDED = 2.0, 1e-3, MOST_AGREEMENT_KL
POSITIONS, POSITIONS_IN_FLOAT32 = 256, 16
# The last tokens come one at a time, since single rows use other kernels.
SINGLE = 2
TIMEOUT_S, TIMEOUT_BYTES_PER_S = 600.0, 2e7
THREADS = 2


@dataclass(frozen=True)
class Loss:
    """Mean KL(reference || other) in nats per token, its standard error, and the number of tokens compared."""

    kl_mean: float
    kl_error: float
    top1_agreement: float
    tokens: int

    def __str__(self) -> str:
        """Return the mean with its error."""
        return f"{self.kl_mean:.2g} ± {self.kl_error:.1g} nats over {self.tokens} tokens"


@dataclass(frozen=True)
class Emulator:
    """A target's artifacts on one emulated core, with tokens to run."""

    target: Emulated
    installation: Installation
    core: Core
    tokens: list[int]

    def logits(self, artifact: Artifact) -> Float32:
        """Return an artifact's logits on the core, float32 [tokens, vocab]."""
        single = min(SINGLE, len(self.tokens))
        timeout_s = TIMEOUT_S + len(self.tokens) * artifact.file_bytes / TIMEOUT_BYTES_PER_S
        return self.target.logits(artifact, Run(self.installation, self.core, self.tokens, single, THREADS, timeout_s))


def settle(artifact: Artifact, device: DeviceProfile, tokens: Tokens, progress: Progress = silent) -> Emulation:
    """Run an artifact on a core like the device's, and store the best way to round activations there in it.

    Args:
        artifact: The artifact; its graph and configuration are rewritten if another way to round is better.
        device: The device.
        tokens: Text to run it on, int64 [windows, length].
        progress: Called with the name of the step, steps done and their total.

    Returns:
        Checks and numbers with the basis `emulated`; empty for a device that is not an Arm.
    """
    core = stand_in(device)
    if core is None:
        return Emulation()
    target = emulated_target(artifact.target)
    if target is None:
        return not_run(NAMES, f"the target {artifact.target} is not run on emulated cores")
    installed = installation(emulation_needs())
    try:
        target.require(installed, core)
    except MissingDependencyError as error:
        return not_run(NAMES, words(error))
    count = POSITIONS if target.rounds(core) else POSITIONS_IN_FLOAT32
    emulator = Emulator(target, installed, core, tokens.reshape(-1)[:count].tolist())
    try:
        return _examined(emulator, artifact, device, progress)
    except RequestError as error:
        return not_run(NAMES, words(error))
    except RuntimeCrashError as error:
        failed = outcome(INSTRUCTIONS, "failed", words(error))
        return Emulation(
            (failed, *not_run(NAMES, f"{target.title} did not run on the emulated {core.name}").checks[1:])
        )


def _examined(emulator: Emulator, artifact: Artifact, device: DeviceProfile, progress: Progress) -> Emulation:
    target, current = emulator.target, emulator.target.current(artifact)
    candidates = target.candidates(artifact, emulator.core)
    with ExitStack() as opened:

        def configured(setting: Setting) -> Artifact:
            if setting == current:
                return artifact
            # Next to the artifact, on its disk, so that the data can be shared.
            folder = opened.enter_context(TemporaryDirectory(prefix=".setting-", dir=artifact.folder.parent))
            return target.configured(artifact, setting, Path(folder))

        exact = configured(target.exact)
        here = _logits_here(exact, emulator.tokens, exact=True)
        rounded = _logits_here(artifact, emulator.tokens, exact=False)
        runs = 1 + len(candidates)
        progress("emulate: Arm instructions", 0, runs)
        there = replace(emulator, tokens=emulator.tokens[:POSITIONS_IN_FLOAT32]).logits(exact)
        logits: dict[str, Float32] = {}
        for name, setting in candidates.items():
            progress("emulate: Arm instructions", 1 + len(logits), runs)
            logits[name] = there if setting == target.exact else emulator.logits(configured(setting))
        progress("emulate: Arm instructions", runs, runs)
    same = here[: len(there)]
    losses = {name: loss(here[: len(got)], got) for name, got in logits.items()}
    limit = MOST_KL_UNROUNDED
    if target.rounds(emulator.core):
        limit = max(TIMES_HERE * loss(here, rounded).kl_mean, NEGLIGIBLE_KL)
    chosen = choose(losses, limit, candidates, current)
    notes: tuple[str, ...] = ()
    if candidates[chosen] != current:
        target.configured(artifact, candidates[chosen], artifact.folder)
        notes = (
            f"activations are not rounded as planned: on the emulated {emulator.core.name}, {chosen} is the better way "
            f"({candidates[chosen].reason})",
        )
    checks = (
        _check_ran(emulator, device),
        check_agreement(same, there, emulator.core),
        check_rounding(losses, chosen, limit, candidates[chosen].reason, emulator.core),
    )
    return Emulation(checks, _quantities(same, there, losses), notes)


def _logits_here(artifact: Artifact, tokens: list[int], exact: bool) -> Float32:
    with OpenedArtifact(artifact, len(tokens), THREADS, exact) as opened:
        return opened.logits(tokens)


def choose(losses: Mapping[str, Loss], limit: float, candidates: Mapping[str, Setting], current: Setting) -> str:
    """Return the first setting within the limit; if there is none, the artifact's current one."""
    within = [name for name, found in losses.items() if found.kl_mean <= limit]
    return within[0] if within else next(name for name, setting in candidates.items() if setting == current)


def loss(expected: Float32, got: Float32) -> Loss:
    """Compare logits, both float32 [tokens, vocab]."""
    kl = divergence(expected, got)
    same = (expected.argmax(axis=1) == got.argmax(axis=1)).mean()
    return Loss(float(kl.mean()), float(kl.std() / len(kl) ** 0.5), float(same), len(kl))


def _check_ran(emulator: Emulator, device: DeviceProfile) -> Check:
    core = emulator.core
    without = lacked(core, device)
    apart = f"; the device's {', '.join(without)} are not emulated" if without else ""
    detail = (
        f"{emulator.target.title} ran the model on an emulated {core.name} in place of {device.clusters[0].name}{apart}"
    )
    return outcome(INSTRUCTIONS, "passed", detail)


def check_agreement(here: Float32, there: Float32, core: Core) -> Check:
    """Compare the logits of this machine and of an emulated core in float32 activations, both [tokens, vocab]."""
    if here.shape != there.shape:
        return outcome(AGREEMENT, "failed", f"{list(there.shape)} logits on the {core.name}, {list(here.shape)} here")
    most, kl = difference(here, there), loss(here, there).kl_mean
    detail = (
        f"with float32 activations the logits of {len(here)} tokens on the emulated {core.name} differ from this "
        f"machine's by at most {most:.1e}, KL {kl:.1e}"
    )
    passed = most < MOST_DIFFERENCE and kl < MOST_AGREEMENT_KL
    return outcome(AGREEMENT, "passed" if passed else "failed", detail, most, MOST_DIFFERENCE, "logits")


def difference(here: Float32, there: Float32) -> float:
    """Return the largest difference between two logits."""
    return float(np.abs(here - there).max())


def check_rounding(losses: Mapping[str, Loss], chosen: str, limit: float, reason: str, core: Core) -> Check:
    """Compare the loss of the chosen rounding with a limit, and report the loss of each one."""
    found = losses[chosen]
    passed = found.kl_mean <= limit
    measured = ", ".join(f"{name} {one}" for name, one in losses.items())
    verdict = f"the bundle has {chosen}: {reason}"
    if not passed:
        # Float32 loses nothing, so it was not available.
        verdict = f"{chosen} stays, for float32 activations have no quick kernels for these codes"
    against = f"KL on the emulated {core.name} against float32 activations here"
    detail = f"{against}: {measured}; the limit is {limit:.2g}; {verdict}"
    return outcome(ROUNDING, "passed" if passed else "failed", detail, found.kl_mean, limit, "nats")


def _quantities(here: Float32, there: Float32, losses: Mapping[str, Loss]) -> dict[str, Quantity]:
    values = {"arm64.float_difference": (difference(here, there), "logits")}
    for name, found in losses.items():
        values[f"arm64.rounding_kl.{name}"] = (found.kl_mean, "nats")
    return {name: Quantity(value=value, unit=unit, basis="emulated") for name, (value, unit) in values.items()}
