"""Compiles an artifact for the device's neural processor and proves it on the vendor's emulator, without the device.

Two distances tell apart what an emulator may show. That of the original model from the emulator is what is lost on the
processor. That of the artifact's own graph, computed here with float products, from the emulator is what the
processor's arithmetic adds: it is held to a limit, and so is the growth of the first by the second.
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from exporter.calibrate.windows import Tokens
from exporter.device.neural import NeuralProcessor
from exporter.device.profile import DeviceProfile
from exporter.formats.format import Float32
from exporter.foundation.errors import MissingDependencyError, RuntimeCrashError
from exporter.foundation.progress import Progress, silent
from exporter.foundation.quantities import Check, Quantity
from exporter.model.model import Model
from exporter.prove.accuracy import Reference
from exporter.prove.arm64 import Loss, loss
from exporter.prove.emulation import Emulation, not_run, outcome, words
from exporter.targets.artifact import Artifact
from exporter.targets.npu import Compiled, Npu, npu_target, processor_of
from exporter.targets.opened import OpenedArtifact

PLACED, ACCURACY, TOKENS = "npu.placed", "npu.accuracy", "npu.tokens"
NAMES = (PLACED, ACCURACY, TOKENS)
POSITIONS, WINDOW = 256, 64
# On the 135M model the emulator's own arithmetic costs 0.0002 nats, or ten times that where codes of activations are
# coarse, and a wrong scale some tenths.
MOST_ADDED_KL = 0.01
# The largest KL of the original against the emulator, as a multiple of that against the same graph in float products,
# beyond a negligible one.
TIMES_HERE, NEGLIGIBLE_KL = 1.15, 1e-4
# Prompts below and above a window, and the tokens generated after each.
PROMPTS, GENERATED = (5, 70), 16
THREADS = 2


def prove_on_npu(
    artifact: Artifact, model: Model, device: DeviceProfile, tokens: Tokens, progress: Progress = silent
) -> Emulation:
    """Compile an artifact's part for the device's neural processor, and run it on the emulator.

    Args:
        artifact: The artifact; what is compiled is written into its folder.
        model: The original model.
        device: The device.
        tokens: Evaluation windows, int64 [windows, length].
        progress: Called with the name of the step, steps done and their total.

    Returns:
        Checks and numbers with the basis `emulated`; empty for a device or a target without such a part.
    """
    npu, processor = npu_target(artifact.target), processor_of(device)
    if npu is None or processor is None:
        return Emulation()
    hindrance = npu.hindrance(processor, model)
    if hindrance is not None:
        return not_run(NAMES, f"the bundle has no part for the neural processor: {hindrance}")
    try:
        npu.require_installed()
    except MissingDependencyError as error:
        reason = f"the part for the neural processor is not compiled, and a device compiles it at load: {error}"
        return not_run(NAMES, reason.removesuffix("."))
    return _proved(_Proving(npu, processor, artifact, model, progress), tokens)


@dataclass(frozen=True)
class _Proving:
    npu: Npu
    processor: NeuralProcessor
    artifact: Artifact
    model: Model
    progress: Progress

    def emulated(self, tokens: list[int]) -> Float32:
        """Return logits of the compiled part on the emulator, float32 [tokens, vocab]."""
        return self.npu.logits(self.artifact, self.processor, tokens, partial(self.progress, "npu: windows"))

    def here(self, tokens: list[int]) -> Float32:
        """Return logits of the artifact itself, computed here with float products, float32 [tokens, vocab]."""
        with OpenedArtifact(self.artifact, len(tokens), THREADS, exact=True) as opened:
            return opened.logits(tokens)


def _proved(proving: _Proving, tokens: Tokens) -> Emulation:
    npu, artifact = proving.npu, proving.artifact
    stage = f"npu: compile ({npu.terms})"
    proving.progress(stage, 0, 1)
    try:
        compiled = npu.compile(artifact, proving.processor)
    except RuntimeCrashError as error:
        failed = outcome(PLACED, "failed", words(error))
        return Emulation((failed,)) + not_run((ACCURACY, TOKENS), "it was not compiled")
    proving.progress(stage, 1, 1)
    emulation = Emulation((check_placed(npu, compiled, npu.products(proving.model), proving.processor),))
    emulation += Emulation(quantities=_sizes(artifact, compiled), notes=(_note(npu, artifact, compiled),))
    try:
        emulation += _accuracy(proving, tokens)
    except RuntimeCrashError as error:
        emulation += Emulation((outcome(ACCURACY, "failed", f"the compiled model does not run: {words(error)}"),))
    try:
        return emulation + _generated(proving, tokens)
    except RuntimeCrashError as error:
        return emulation + Emulation((outcome(TOKENS, "failed", f"the pipeline does not run: {words(error)}"),))


def check_placed(npu: Npu, compiled: Compiled, products: int, processor: NeuralProcessor) -> Check:
    """Check that every matrix multiplication of the layers is on the processor, and name what is not."""
    others = ", ".join(f"{count} {kind}" for kind, count in sorted(compiled.others.items())) or "none"
    detail = (
        f"{compiled.placed} of {compiled.nodes} nodes of the layers are compiled for the {processor.soc} "
        f"(Hexagon {processor.architecture}, SoC number {processor.soc_number}), {compiled.products} of {products} "
        f"matrix multiplications among them; on the CPU: {others}; embedding and head by design; compiled in "
        f"{compiled.seconds:.0f} s by {npu.licence}"
    )
    return outcome(PLACED, "passed" if compiled.products == products else "failed", detail, compiled.products, products)


def _accuracy(proving: _Proving, tokens: Tokens) -> Emulation:
    """Compare the emulator with the original model, and with the same graph computed here."""
    windows = list(_windows(tokens))
    if not windows:
        return not_run((ACCURACY,), f"the evaluation text's windows are shorter than {WINDOW} tokens")
    original = Reference.of_original(proving.model, tokens)
    floats, here, there = [], [], []
    for number, count in windows:
        some = tokens[number, :count].tolist()
        floats.append(original.logits(number, slice(0, count)).numpy())
        here.append(proving.here(some))
        there.append(proving.emulated(some))
    expected, own, got = (np.concatenate(parts) for parts in (floats, here, there))
    return check_accuracy(proving.npu, loss(expected, own), loss(expected, got), loss(own, got))


def _windows(tokens: Tokens) -> Iterator[tuple[int, int]]:
    """Yield windows of the text, and the tokens to take of each, until there are enough; whole windows of the stage."""
    left = POSITIONS
    for number in range(len(tokens)):
        count = min(left, tokens.shape[1]) // WINDOW * WINDOW
        if count == 0:
            return
        yield number, count
        left -= count


def check_accuracy(npu: Npu, here: Loss, there: Loss, added: Loss) -> Emulation:
    """Return the check of the emulator's logits, and its numbers.

    Args:
        npu: The emulator.
        here: Loss of the artifact's graph, computed here with float products, against the original model.
        there: Loss of the emulator against the original model.
        added: Loss of the emulator against the artifact's graph.
    """
    limit = TIMES_HERE * here.kl_mean + NEGLIGIBLE_KL
    passed = there.kl_mean <= limit and added.kl_mean <= MOST_ADDED_KL
    detail = (
        f"on {npu.title}: KL of the original {there}, same next token {there.top1_agreement:.1%}; of the same graph "
        f"with float products here {here.kl_mean:.2g} nats; of that graph against the emulator {added.kl_mean:.2g} "
        f"nats, at most {MOST_ADDED_KL:g}; {npu.unseen}"
    )
    values = {"npu.kl": there, "npu.same_graph_kl": here, "npu.added_kl": added}
    quantities = {name: Quantity(value=one.kl_mean, unit="nats", basis="emulated") for name, one in values.items()}
    check = outcome(ACCURACY, "passed" if passed else "failed", detail, there.kl_mean, limit, "nats")
    return Emulation((check,), quantities)


def _generated(proving: _Proving, tokens: Tokens) -> Emulation:
    text = tokens.reshape(-1).tolist()
    proving.progress("npu: generation", 0, 1)
    # The emulator computes with one thread for the most part, so the prompts run side by side.
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        found = list(pool.map(partial(_continuation, proving), (text[:length] for length in PROMPTS)))
    proving.progress("npu: generation", 1, 1)
    return Emulation((check_tokens(found),))


@dataclass(frozen=True)
class Continuation:
    """The greedy tokens of the compiled pipeline beside those of the artifact on the CPU.

    Attributes:
        prompt: Tokens of the prompt.
        same: Tokens until the two part.
        kl: The least KL of the CPU's next token against any distribution that prefers the pipeline's token there, in
            nats; None if they do not part.
    """

    prompt: int
    same: int
    kl: float | None

    def __str__(self) -> str:
        """Return the result in words."""
        after = f"after {self.prompt} tokens {self.same} of {GENERATED} are the same"
        return after if self.kl is None else f"{after}, and the next two change places at a KL of {self.kl:.2g} nats"


def _continuation(proving: _Proving, prompt: list[int]) -> Continuation:
    artifact = proving.artifact
    expected, got = (proving.npu.generate(artifact, emulated, prompt, GENERATED) for emulated in (False, True))
    same = next((place for place, (one, other) in enumerate(zip(expected, got, strict=True)) if one != other), None)
    if same is None:
        return Continuation(len(prompt), GENERATED, None)
    read = prompt + expected[:same]
    with OpenedArtifact(artifact, len(read), THREADS, exact=True) as opened:
        last = opened.logits(read, len(read) - 1)[0]
    return Continuation(len(prompt), same, least_kl(last, expected[same], got[same]))


def least_kl(logits: Float32, first: int, other: int) -> float:
    """Return the least KL(p || q), in nats, over all q that give another token at least as much as the first.

    With all other tokens as they are, that q gives both tokens the mean m of their probabilities, so that the KL is
    p_first log(p_first / m) + p_other log(p_other / m).

    Args:
        logits: Those of p, float32 [vocab].
        first: The token that p prefers of the two.
        other: The other one.
    """
    exponents = np.exp(logits.astype(np.float64) - logits.max())
    pair = exponents[[first, other]] / exponents.sum()
    if pair[0] <= pair[1]:
        return 0.0
    return float(pair @ np.log(np.maximum(pair, np.finfo(np.float64).tiny) / pair.mean()))


def check_tokens(found: Sequence[Continuation]) -> Check:
    """Check that the compiled pipeline generates what the CPU does, up to what the emulator's arithmetic may change."""
    passed = all(one.kl is None or one.kl <= MOST_ADDED_KL for one in found)
    detail = (
        f"greedy tokens of the compiled pipeline and of the model on the CPU: {'; '.join(map(str, found))}; at most "
        f"{MOST_ADDED_KL:g} nats may; each turn of a chat needs a generator of its own"
    )
    return outcome(TOKENS, "passed" if passed else "failed", detail)


def _sizes(artifact: Artifact, compiled: Compiled) -> dict[str, Quantity]:
    written = sum(path.stat().st_size for path in compiled.files)
    return {
        "npu.compiled_bytes": Quantity(value=written, unit="bytes", basis="measured"),
        "npu.compile_s": Quantity(value=compiled.seconds, unit="s", basis="measured"),
    }


def _note(npu: Npu, artifact: Artifact, compiled: Compiled) -> str:
    """Return what of the bundle counts for what, with the digest of what was compiled."""
    written = sum(path.stat().st_size for path in compiled.files)
    digest = hashlib.sha256()
    for path in compiled.files:
        digest.update(path.read_bytes())
    return (
        f"the compiled part for the neural processor adds {written:,} bytes to download and disk (SHA-256 "
        f"{digest.hexdigest()[:16]}): the layers' weights once for reading prompts and once for generating, and both "
        "are in memory while it runs, with embedding and head from the model's own data; the weights in that data "
        "serve the CPU, and devices whose driver refuses the compiled part"
    )
