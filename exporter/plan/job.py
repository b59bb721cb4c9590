"""What is asked for."""

from dataclasses import dataclass, replace
from pathlib import Path

from exporter.coding.chunk import Profile
from exporter.compress.effort import Effort, effort
from exporter.foundation.errors import RequestError


@dataclass(frozen=True)
class Job:
    """One request to `build` or `plan`.

    Attributes:
        source: A Hugging Face folder, hub id, `.gguf` file, or `demo`.
        device: A profile's name, or the path of a user's own TOML.
        target: A target's name, or `auto` for the one that the device prefers.
        type: A named mix or weight format of the target; None for the target's default.
        method: A compression method; None for the target's default.
        output: The bundle's folder; `plan` needs none.
        calibration: A UTF-8 text, or None for text that the model samples itself.
        evaluation: A UTF-8 text that accuracy is measured on, or None for sampled text of another seed.
        seed: Seed of all that is random.
        window: Tokens of a calibration or evaluation window.
        effort: How much work goes into a smaller loss of behaviour: `fast`, `balanced` or `max`.
        calibration_windows: Windows to calibrate on; None for as many as the effort takes.
        evaluation_windows: Windows to measure accuracy on.
        context: Tokens of context that memory and speed are stated for.
        threads: Threads that runtimes compute with on this machine.
        max_file_bytes: Most bytes of the model files; every matrix then gets the format that keeps behaviour best.
        bits: The same as an average of bits a weight of the source, everything in the files counted.
        min_decode_tokens_per_s: What the device is expected to generate at the least.
        min_prefill_tokens_per_s: What the device is expected to read of a prompt at the least.
        prefer: What matters more within those limits: `accuracy` or `speed`, or `balanced`.
        recipe: A recipe's name, or the path of a user's own TOML; where it gives matrices their formats, it decides in
            place of type, method and limits.
        save_pruned: A folder that the model is written to once a recipe has pruned it, for transformers.
        transport: Ship the model files coded, by the profile `small` or `fast`; None for plain, or as the recipe says.
        emulate: Run the artifact on this machine under the device's limits as well.
    """

    source: str
    device: str
    target: str = "auto"
    type: str | None = None
    method: str | None = None
    output: Path | None = None
    calibration: Path | None = None
    evaluation: Path | None = None
    seed: int = 0
    window: int = 512
    effort: str = "balanced"
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

    @property
    def effort_level(self) -> Effort:
        """What the effort spends.

        Raises:
            RequestError: there is no such effort.
        """
        level = effort(self.effort)
        return (
            level if self.calibration_windows is None else replace(level, calibration_windows=self.calibration_windows)
        )

    @property
    def prediction_windows(self) -> int:
        """Windows of the evaluation text that the loss of formats is predicted on."""
        return min(self.evaluation_windows, self.effort_level.prediction_windows)


def require_no_contradiction(job: Job, prunes: bool, encodes: bool) -> None:
    """Refuse options that decide the same thing twice, or that nothing follows from.

    Args:
        job: What is asked for.
        prunes: Its recipe makes the model smaller.
        encodes: Its recipe gives every matrix its format.

    Raises:
        RequestError: they are named.
    """
    if job.save_pruned is not None and not prunes:
        raise RequestError(
            "there is no pruned model to save",
            where="--save-pruned",
            next_step="name a recipe that prunes, such as --recipe prunenet",
        )
    limits = {
        "--max-file-bytes": job.max_file_bytes is not None,
        "--bits": job.bits is not None,
        "--min-decode": job.min_decode_tokens_per_s is not None,
        "--min-prefill": job.min_prefill_tokens_per_s is not None,
        f"--prefer {job.prefer}": job.prefer != "balanced",
    }
    options = {"--recipe": encodes, "--type": job.type is not None}
    if encodes:
        options["--method"] = job.method is not None
    named = [option for option, given in {**options, **limits}.items() if given]
    alone = {"--recipe", "--type"} & set(named)
    if len(named) > 1 and (alone or {"--max-file-bytes", "--bits"} <= set(named)):
        raise RequestError(f"{' and '.join(named)} contradict each other", next_step="name only one of them")
