"""Results in llama-bench's output formats, for programs that read its JSON or Markdown.

Only fields whose value is known are given. Means and standard deviations are over the repeats, as in llama-bench.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from exporter.bench.results import Measurement, Test

GIB, MIB = 1 << 30, 1 << 20
# Column titles and widths; positive widths align right.
COLUMNS = (("model", -30), ("size", 10), ("params", 10), ("backend", -10), ("threads", 7), ("test", 13), ("t/s", 16))


@dataclass(frozen=True)
class RowHead:
    """The measured model and machine, in llama-bench's terms.

    Attributes:
        build: The runtime and its version, in place of llama.cpp's commit.
        cpu: The processor's name.
        file: Name of the model's file.
        type: Decoder, size and format in one phrase.
        size_bytes: Size of the model's files.
        parameters: Number of weights.
    """

    build: str
    cpu: str
    file: str
    type: str
    size_bytes: int
    parameters: int


def to_json(head: RowHead, measured: Measurement) -> str:
    """Return the tests as `llama-bench -o json` does."""
    facts = {
        "build_commit": head.build,
        "build_number": 0,
        "cpu_info": head.cpu,
        "gpu_info": "",
        "backends": "CPU",
        "model_filename": head.file,
        "model_type": head.type,
        "model_size": head.size_bytes,
        "model_n_params": head.parameters,
        "n_batch": measured.n_batch,
        "n_ubatch": measured.n_batch,
        "n_threads": measured.n_threads,
        "n_gpu_layers": 0,
    }
    return json.dumps([{**facts, **_numbers(test)} for test in measured.tests], indent=2, ensure_ascii=False)


def _numbers(test: Test) -> dict[str, object]:
    return {
        "n_prompt": test.n_prompt,
        "n_gen": test.n_gen,
        "n_depth": test.n_depth,
        "test_time": test.test_time,
        "avg_ns": round(fmean(test.samples_ns)),
        "stddev_ns": round(_deviation(test.samples_ns)),
        "avg_ts": fmean(test.samples_ts),
        "stddev_ts": _deviation(test.samples_ts),
        "samples_ns": list(test.samples_ns),
        "samples_ts": test.samples_ts,
    }


def _deviation(samples: Sequence[float]) -> float:
    return stdev(samples) if len(samples) > 1 else 0.0


def to_markdown(head: RowHead, measured: Measurement) -> str:
    """Return the tests as `llama-bench -o md` does."""
    rule = [f"{'-' * (abs(width) - 1)}{':' if width > 0 else '-'}" for _, width in COLUMNS]
    rows = [[title for title, _ in COLUMNS], *(_cells(head, measured, test) for test in measured.tests)]
    titles, *lines = (_line(row) for row in rows)
    return "\n".join([titles, f"| {' | '.join(rule)} |", *lines, "", f"build: {head.build} (0)"])


def _line(row: Sequence[str]) -> str:
    cells = (
        f"{cell:>{width}}" if width > 0 else f"{cell:<{-width}}" for cell, (_, width) in zip(row, COLUMNS, strict=True)
    )
    return f"| {' | '.join(cells)} |"


def _cells(head: RowHead, measured: Measurement, test: Test) -> list[str]:
    size, parameters = head.size_bytes, head.parameters
    return [
        head.type.replace("|", "/"),
        f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.2f} MiB",
        f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.2f} M",
        "CPU",
        str(measured.n_threads),
        test.name,
        f"{fmean(test.samples_ts):.2f} ± {_deviation(test.samples_ts):.2f}",
    ]
