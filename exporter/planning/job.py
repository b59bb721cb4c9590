"""What is asked for."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from exporter.coding.profiles import Profile
from exporter.model.adapter_settings import AdapterUse
from exporter.planning.plan import Plan


@dataclass(frozen=True)
class Job:
    """One request to `build` or `plan`.

    `type`, `method`, the limits, `prefer`, `effort` and `transport` are short forms of a recipe's steps; see
    `exporter.planning.resolve.recipe_for`.

    Attributes:
        source: A Hugging Face folder, hub id, `.gguf` file, or `demo`; a folder may hold a LoRA adapter.
        device: A profile's name, or the path of a user's own TOML; None for the one of the plan that is repeated.
        target: A target's name, or `auto` for the one that the device prefers.
        type: A named mix or weight format of the target; None for the target's default.
        method: A compression method; None for the target's default.
        output: The bundle's folder; `plan` needs none.
        calibration: A UTF-8 text, or None for text that the model samples itself.
        evaluation: A UTF-8 text that accuracy is measured on, or None for sampled text of another seed.
        seed: Seed of all that is random.
        window: Tokens of a calibration or evaluation window.
        effort: How much work goes into a smaller loss: `fast`, `balanced` or `max`; None for the recipe's.
        calibration_windows: Windows to calibrate on; None for as many as the effort takes.
        evaluation_windows: Windows to measure accuracy on.
        context: Tokens of context that memory and speed are stated for.
        threads: Threads that runtimes compute with on this machine.
        max_file_bytes: Most bytes of the model files; every matrix then gets the format that keeps behaviour best.
        bits: The same as an average of bits a weight of the source, everything in the files counted.
        min_decode_tokens_per_s: Least tokens/s that the device is expected to generate.
        min_prefill_tokens_per_s: Least tokens/s that it is expected to read of a prompt.
        prefer: What matters more within those limits: `accuracy` or `speed`, or `balanced`.
        recipe: A recipe's name, or the path of a user's own TOML; where it gives matrices their formats, it decides in
            place of type, method and limits.
        save_pruned: A folder that the model is written to once a recipe has pruned it, for transformers.
        transport: Ship the model files coded, by the profile `small` or `fast`; None for plain, or as the recipe says.
        emulate: Run the artifact on this machine under the device's limits as well.
        judge: Run the artifact in a second, independent runtime as well.
        repeats: A finished plan, whose recipe and decisions are used in place of the options above; see
            `repeating`.
        backend: The processor and interface that computes on the device; None for the one that its profile prefers.
        ram_bytes: Installed memory of the device, among the sizes that it is sold with; None for its most common one.
        base: Folder or hub id of an adapter's base; None for the one that the adapter names.
        adapter: `merge` an adapter into its base, or `keep` it beside the base.
    """

    source: str
    device: str | None = None
    target: str = "auto"
    type: str | None = None
    method: str | None = None
    output: Path | None = None
    calibration: Path | None = None
    evaluation: Path | None = None
    seed: int = 0
    window: int = 512
    effort: str | None = None
    calibration_windows: int | None = None
    evaluation_windows: int = 6
    context: int = 512
    threads: int = 2
    max_file_bytes: int | None = None
    bits: float | None = None
    min_decode_tokens_per_s: float | None = None
    min_prefill_tokens_per_s: float | None = None
    prefer: str = "balanced"
    recipe: str | None = None
    save_pruned: Path | None = None
    transport: Profile | None = None
    emulate: bool = False
    judge: bool = False
    repeats: Plan | None = None
    base: str | None = None
    adapter: AdapterUse = "merge"
    backend: str | None = None
    ram_bytes: int | None = None

    def repeating(self, plan: Plan) -> Self:
        """Return the job that does what a plan says, with this one's source, texts, output and machine."""
        return replace(
            self,
            device=self.device or plan.device,
            ram_bytes=plan.ram_bytes,
            backend=plan.backend,
            target=plan.target,
            seed=plan.seed,
            window=plan.window,
            context=plan.context,
            evaluation_windows=plan.evaluation_windows,
            adapter=plan.adapter or "merge",
            repeats=plan,
        )
