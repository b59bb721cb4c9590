"""The stage that lets the model write its own calibration and evaluation text, through a quick artifact of 8 bits.

One target samples for all: they are then calibrated and compared on the same text, which is sampled once and kept in
the cache.
"""

import hashlib

import numpy as np

from exporter.calibrate.sample import notes, starts
from exporter.calibrate.windows import Windows
from exporter.compress.compression import Compression
from exporter.foundation.cache import cache_folder, scratch_folder
from exporter.foundation.cache_entries import ARRAY, kept
from exporter.foundation.progress import Progress
from exporter.model.model import Model
from exporter.model.tokenizer import ModelTokenizer, load_tokenizer
from exporter.planning.job import Job
from exporter.targets.contract import FormatsByBits, lower, sampling_target
from exporter.targets.opened import OpenedArtifact

# Raised when the same seed gives another text.
VERSION = 2


def sampled_windows(
    job: Job, windows: int, model: Model, tokenizer: ModelTokenizer, progress: Progress
) -> tuple[Windows, Windows]:
    """Return so many calibration windows and the evaluation windows, different sequences of one seeded sampling."""
    count = windows + job.evaluation_windows
    target = sampling_target()
    decisive = (VERSION, model.digest, target.type_of_8_bits, job.seed, count, job.window, job.threads)
    key = hashlib.sha256(":".join(map(str, decisive)).encode()).hexdigest()[:32]
    path = cache_folder("samples") / f"{key}.npy"
    tokens = kept(path, ARRAY, lambda: _sample(model, target, starts(tokenizer, count, job.seed), job, progress))
    return Windows.of(tokens[:windows], "self-sampled", 0), Windows.of(tokens[windows:], "self-sampled", 0)


def sampling_notes(model: Model, *texts: Windows) -> tuple[str, ...]:
    """Say what a reader must know of texts that the model wrote itself, if one of these is."""
    if all(text.kind == "file" for text in texts):
        return ()
    return notes(load_tokenizer(model.folder, model.decoder.vocab))


def _sample(model: Model, target: FormatsByBits, openings: list[list[int]], job: Job, progress: Progress) -> np.ndarray:
    # Beside the samples: the folder of temporary files may be small, or in memory.
    with scratch_folder(cache_folder("samples"), "quick") as scratch:
        compression = Compression(model, target.decide(model, target.type_of_8_bits, "rtn"))
        artifact = lower(target, compression, target.type_of_8_bits, scratch).artifact
        with OpenedArtifact(artifact, job.window, job.threads, sequences=len(openings)) as opened:
            texts = openings
            # Sampling continues from where it is, so that progress can be shown between calls.
            for length in range(64, job.window + 64, 64):
                texts = opened.sample(texts, min(length, job.window), job.seed)
                progress("sample: tokens", min(length, job.window), job.window)
    return np.array(texts)
