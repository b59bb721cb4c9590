"""The headline on a model of your own: ours, llama.cpp's mixes and a rival's file at equal bytes, on the same text.

    .venv/bin/python -m tests.benchmarks.headline MODEL [--rival FILE.gguf] [--calibration TEXT] [--evaluation TEXT]

`make headline MODEL=...` runs it. It writes a table and a picture into out/headline, and keeps each row as soon as it
is measured, so that an interrupted run goes on. llama.cpp's importance and our statistics are those of one text;
everything is measured on another.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np

from exporter.calibrate.statistics import collect
from exporter.calibrate.windows import Windows, file_windows, read_text, spread_windows
from exporter.compress.effort import effort
from exporter.formats.format import Float32
from exporter.foundation.errors import ExporterError, RequestError
from exporter.model.gguf_names import gguf_matrices
from exporter.model.model import Model
from exporter.model.sources import open_model
from exporter.model.tokenizer import ModelTokenizer, load_tokenizer, token_ids
from exporter.prove.accuracy import Reference
from exporter.targets.artifact import Artifact
from exporter.targets.opened import OpenedArtifact
from tests.benchmarks import llama_opponents
from tests.benchmarks.measured import WINDOW, identity, measured, removed
from tests.benchmarks.ours import SEED, Exporter, silent
from tests.benchmarks.picture import Axis, picture
from tests.benchmarks.rows import KeptRows, Published, Row
from tests.benchmarks.tables import table
from tests.reference import plain_texts

MIXES = ("Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M")
EVALUATION_WINDOWS = 16
COMPARED_CHARACTERS = 2000
OUTPUT = Path("out/headline")
TOOLS = ("llama-cpp-python", "transformers", "torch")


class Headline:
    """One model and its texts, what is made of them in a scratch folder, and the rows that were measured.

    Args:
        model: The model.
        calibration: Text for statistics and importance.
        evaluation: Text to measure on.
        output: Folder for rows, table and picture.
        scratch: Folder for artifacts.
    """

    def __init__(self, model: Model, calibration: Path, evaluation: Path, output: Path, scratch: Path) -> None:
        self._model, self._output, self._scratch = model, output, scratch
        self._tokenizer: ModelTokenizer = load_tokenizer(model.folder, model.decoder.vocab)
        length = min(WINDOW, model.decoder.context_length)
        windows = effort("balanced").calibration_windows
        self._calibration: Windows = spread_windows(calibration, self._tokenizer, windows, length)
        self._evaluation: Windows = file_windows(evaluation, self._tokenizer, EVALUATION_WINDOWS, length)
        self._text = read_text(evaluation)[:COMPARED_CHARACTERS]
        made_of = identity(model, self._calibration, self._evaluation, TOOLS)
        self._kept = KeptRows(Published(output / "rows.json"), model.name, made_of)

    @cached_property
    def _original(self) -> Reference:
        return Reference.of_original(self._model, self._evaluation.tokens)

    @cached_property
    def _exporter(self) -> Exporter:
        return Exporter(self._model, "gguf", self._calibration, self._evaluation)

    @cached_property
    def _importance(self) -> dict[str, Float32]:
        """GGUF name -> E[x^2] of the inputs, as llama-imatrix has it: one after the other for experts."""
        statistics = collect(self._model, self._calibration, SEED, silent)
        found = {}
        for name, groups in gguf_matrices(self._model.decoder).items():
            parts = [statistics.importance(group.site) for group in groups]
            if parts[0] is not None:
                # Matrices whose rows are stacked have one input.
                found[name] = np.concatenate(parts) if groups[0].expert is not None else parts[0]
        return found

    @cached_property
    def _floats(self) -> Path:
        return llama_opponents.floats(self._model, self._scratch / "floats")

    def _row(self, name: str, kind: str, make: Callable[[Path], tuple[Artifact, float | None]]) -> Row:
        """Return a row, measured unless it is known."""

        def measure() -> Row:
            with removed(self._scratch / "artifact") as folder:
                artifact, predicted = make(folder)
                return measured(self._original, artifact, name, kind, predicted)

        return self._kept.row(name, kind, "gguf", measure)

    def stock(self, mix: str) -> Row:
        """Measure what llama.cpp's quantiser makes with importance."""
        return self._row(
            mix, "stock", lambda to: (llama_opponents.quantised(self._floats, to, mix, self._importance), None)
        )

    def ours(self, name: str, max_file_bytes: int) -> Row:
        """Make and measure ours in no more bytes."""

        def make(to: Path) -> tuple[Artifact, float | None]:
            made = self._exporter.made(max_file_bytes, to)
            return made.artifact, made.predicted

        return self._row(name, "ours", make)

    def rival(self, path: Path) -> Row:
        """Measure a file that was made elsewhere of the same model.

        Raises:
            RequestError: it gives other ids to the text.
        """
        artifact = Artifact("gguf", path.parent, (path,))
        with OpenedArtifact(artifact, 64, 1) as opened:
            theirs = opened.tokenize(self._text)
        if theirs != token_ids(self._tokenizer, self._text):
            raise RequestError("the rival's file gives other ids to the text", where=path, expected="the same model")
        return self._row(path.name, "rival", lambda _: (artifact, None))

    def written(self) -> str:
        """Write table and picture, and return the table."""
        made = report(self._kept.rows)
        (self._output / "headline.md").write_text(f"# {self._model.name}\n\n{made}\n", "utf-8")
        axis = Axis.bits(self._model.decoder.parameters)
        (self._output / "headline.svg").write_text(picture(self._kept.rows, axis), "utf-8")
        return made


def report(rows: list[Row]) -> str:
    """Return the table: each file of others, and ours of no more bytes beside it."""
    ours = {row.name: row for row in rows if row.kind == "ours"}
    head = [
        "file", *(f"{what}, {whose}" for what in ("bytes", "KL", "KL, 99 %", "KL, 99.9 %", "same token")
                  for whose in ("theirs", "ours")), "ratio of KL",
    ]  # fmt: skip
    lines = []
    for row in rows:
        if row.kind != "ours":
            own = ours[row.name]
            cells = [f"{one:,}" for one in (row.file_bytes, own.file_bytes)] + [
                f"{one:.4f}" for one in (row.kl_mean, own.kl_mean, row.kl_p99, own.kl_p99, row.kl_p999, own.kl_p999)
            ]
            lines.append([row.name, *cells, f"{row.top1:.1%}", f"{own.top1:.1%}", f"{own.kl_mean / row.kl_mean:.2f}"])
    return table(head, lines, numbers_from=1)


def main(arguments: list[str]) -> int:
    """Make and measure everything, and write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a Hugging Face folder, a hub id, a .gguf file, or demo")
    parser.add_argument("--rival", type=Path, action="append", default=[], help="a GGUF file of the same model")
    parser.add_argument("--calibration", type=Path, help="text for statistics and importance")
    parser.add_argument("--evaluation", type=Path, help="text to measure on")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    asked = parser.parse_args(arguments)
    asked.output.mkdir(parents=True, exist_ok=True)
    try:
        with open_model(asked.model) as model, tempfile.TemporaryDirectory(dir=asked.output) as made:
            calibration, evaluation = plain_texts(Path(made))
            bench = Headline(
                model, asked.calibration or calibration, asked.evaluation or evaluation, asked.output, Path(made)
            )
            for mix in MIXES:
                bench.ours(mix, bench.stock(mix).file_bytes)
            for path in asked.rival:
                bench.ours(path.name, bench.rival(path).file_bytes)
            print(bench.written())
    except ExporterError as error:
        print(f"headline: {error}", file=sys.stderr)
        return 2
    print(f"table and picture: {asked.output / 'headline.md'}, {asked.output / 'headline.svg'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
