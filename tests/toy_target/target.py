"""A target with the required members alone: every matrix in float16, each in a file of its own."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from exporter.compress.compression import CompressedMatrix, Compression
from exporter.formats.floats import FLOAT16, FLOAT32
from exporter.formats.format import Float32
from exporter.formats.group import Decision, WeightGroup
from exporter.foundation.errors import RequestError
from exporter.model.model import Model
from exporter.targets.artifact import Artifact
from exporter.targets.contract import Target, lower

FORMATS = {one.name: one for one in (FLOAT16, FLOAT32)}


class Toy(Target):
    name = "toy"
    default_type = "F16"
    default_method = "rtn"
    most_rounding_kl = 0.1

    def types(self) -> list[str]:
        return list(FORMATS)

    def decide(self, model: Model, type: str, method: str) -> list[Decision]:
        if type not in FORMATS:
            raise RequestError(f"unknown type {type!r}", expected=" or ".join(FORMATS))
        return [Decision(group, method, FORMATS[type], f"{type} for every matrix") for group in model.groups()]

    def write(
        self, compression: Compression, matrices: Iterator[CompressedMatrix], type: str, folder: Path
    ) -> Artifact:
        written = []
        for matrix in matrices:
            written.append(folder / f"{matrix.name}.{matrix.decision.format.name}")
            written[-1].write_bytes(matrix.encoded.data.tobytes())
        return Artifact(self.name, folder, tuple(written))

    def write_float(self, model: Model, folder: Path) -> Artifact:
        return lower(self, Compression(model, self.decide(model, "F32", "rtn")), "F32", folder).artifact

    def read_back(self, artifact: Artifact, model: Model) -> Callable[[WeightGroup], Float32]:
        stored = self.stored_types(artifact, model)

        def read(group: WeightGroup) -> Float32:
            data = np.fromfile(artifact.folder / f"{group.name}.{stored[group.name]}", np.uint8)
            return FORMATS[stored[group.name]].decode_rows(data.reshape(group.rows, -1), group.columns)

        return read

    def stored_types(self, artifact: Artifact, model: Model) -> dict[str, str]:
        return dict(path.name.rsplit(".", 1) for path in artifact.weights)


TARGET = Toy()
