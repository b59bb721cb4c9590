"""llama.cpp on an emulated Arm core: an artifact's logits with the rounding of its kernels, or all in float32."""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from exporter.emulate.arm64.core import Core
from exporter.emulate.arm64.installation import Installation
from exporter.emulate.arm64.logits import read_logits
from exporter.formats.format import Float32
from exporter.foundation.cache import require_space, scratch_folder
from exporter.model.gguf_reader import open_gguf
from exporter.targets.artifact import Artifact
from exporter.targets.emulated import Run
from exporter.targets.gguf.formats.ggml import decoded
from exporter.targets.gguf.header import finish_header
from exporter.targets.gguf.session import ADAPTER_FILE
from exporter.targets.gguf.vocabulary import copy_fields

ARCHITECTURE, FILE_TYPE = gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.FILE_TYPE


@dataclass(frozen=True)
class ArmKernels:
    """How inputs of matrix multiplications are rounded; llama.cpp derives it from the type of the weights.

    Attributes:
        reason: A description for the user.
    """

    reason: str


AS_THE_TYPES_SAY = ArmKernels("llama.cpp rounds a product's inputs as the type of its weights has it")
FLOAT32 = ArmKernels("the weights are decoded, and nothing is rounded")


class EmulatedGguf:
    """GGUF files on emulated cores; see `exporter.targets.emulated.Emulated`."""

    title = "llama.cpp"
    exact = FLOAT32

    def require(self, installation: Installation, core: Core) -> None:
        """Require that the program for a core is installed."""
        installation.machine(core)
        installation.program(core, self.title)

    def rounds(self, core: Core) -> bool:
        """Return True: the kernels of every core round activations."""
        return True

    def current(self, artifact: Artifact) -> ArmKernels:
        """Return the rounding that the types of the tensors imply."""
        return FLOAT32 if _is_decoded(artifact) else AS_THE_TYPES_SAY

    def candidates(self, artifact: Artifact, core: Core) -> Mapping[str, ArmKernels]:
        """Return the only setting."""
        current = self.current(artifact)
        return {"float32" if current == FLOAT32 else "int8 in blocks": current}

    def configured(self, artifact: Artifact, setting: ArmKernels, folder: Path) -> Artifact:
        """Write the files with all tensors decoded to float32 into another folder."""
        assert setting == FLOAT32
        weights_in_all = sum(int(tensor.n_elements) for path in artifact.weights for tensor in open_gguf(path).tensors)
        require_space(folder, 4 * weights_in_all, "free some space for the weights in float32")
        weights = tuple(folder / path.name for path in artifact.weights)
        for source, path in zip(artifact.weights, weights, strict=True):
            write_decoded(source, path)
        return Artifact(artifact.target, folder, weights)

    def logits(self, artifact: Artifact, run: Run) -> Float32:
        """Return the logits after each token, float32 [tokens, vocab], computed by the program `emulated_main`."""
        exact = _is_decoded(artifact)
        # The program takes the model first, then the adapter.
        files = sorted(artifact.weights, key=lambda path: path.name == ADAPTER_FILE)
        with scratch_folder() as scratch:
            asked, made = scratch / "tokens.bin", scratch / "logits.npy"
            asked.write_bytes(np.array(run.tokens, "<i4").tobytes())
            options = [str(int(exact)), str(run.single), str(run.threads)]
            command: list[Path | str] = [run.installation.program(run.core, self.title), *options, asked, made]
            command += [path.absolute() for path in files]
            run.installation.machine(run.core).run(command, run.timeout_s)
            return read_logits(made, len(run.tokens))


def _is_decoded(artifact: Artifact) -> bool:
    float32 = gguf.GGMLQuantizationType.F32
    return all(tensor.tensor_type == float32 for path in artifact.weights for tensor in open_gguf(path).tensors)


def write_decoded(source: Path, path: Path) -> None:
    """Rewrite a GGUF file with every tensor decoded to float32, one tensor at a time.

    Raises:
        InputError: the source is damaged.
    """
    reader = open_gguf(source)
    own = {ARCHITECTURE, FILE_TYPE, *(name for name in reader.fields if name.startswith("GGUF."))}
    with closing(gguf.GGUFWriter(path, reader.fields[ARCHITECTURE].contents())) as writer:
        copy_fields(writer, (field for name, field in reader.fields.items() if name not in own))
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        for tensor in reader.tensors:
            shape = tuple(int(size) for size in reversed(tensor.shape))
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), 4 * int(tensor.n_elements))
        finish_header(writer)
        for tensor in reader.tensors:
            writer.write_tensor_data(decoded(tensor))


EMULATED = EmulatedGguf()
