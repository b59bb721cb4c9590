"""A bundle as it is measured: its files, its self-test, and what is said of it beside the results."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from exporter.bench.results import Answers
from exporter.bundle.digests import not_as_listed
from exporter.bundle.manifest import REPORT, SELFTEST, Manifest, sha256_of
from exporter.bundle.opening import opened_bundle
from exporter.bundle.reading import read_document, read_manifest
from exporter.device.connect.remote_folder import Upload
from exporter.foundation.quantities import Check
from exporter.prove.self_test import UNSURE, SelfTest
from exporter.report.data import Report
from exporter.targets.artifact import Artifact

CONFIG = "model/genai_config.json"


@dataclass(frozen=True)
class BundleUnderTest:
    """A bundle to measure.

    Attributes:
        bundle: Its folder.
        manifest: What it lists.
        artifact: The model's files as they lie in it.
        loaded: The same as a runtime may load them.
        report: What the build found.
        self_test: What it must answer.
    """

    bundle: Path
    manifest: Manifest
    artifact: Artifact
    loaded: Artifact
    report: Report
    self_test: SelfTest

    @property
    def model_files(self) -> list[str]:
        """Paths below the bundle of what a runtime reads to compute."""
        config = [CONFIG] if (self.loaded.folder / Path(CONFIG).name).is_file() else []
        return [*config, *(f"model/{path.name}" for path in self.loaded.weights)]

    @property
    def has_adapter(self) -> bool:
        """Whether factors travel in a file of their own."""
        return any(path.endswith("adapter.gguf") for path in self.model_files)

    def uploads(self) -> list[Upload]:
        """Return the model's files as they are sent: settings as they were written anew, all else as it is listed.

        Raises:
            InputError: one of them is not as the manifest lists it.
        """
        made = []
        for name in self.model_files:
            path = self.loaded.folder / Path(name).name
            made.append(Upload(path, name, *sha256_of(path)))
        listed = {entry.path: entry.sha256 for entry in self.manifest.files}
        for upload in made:
            if upload.name != CONFIG and upload.sha256 != listed[upload.name]:
                raise not_as_listed(self.bundle / upload.name, upload.sha256, listed[upload.name])
        return made

    def check(self, answers: Answers) -> Check:
        """Compare what a device answered to the self-test with what was answered when the bundle was made."""
        test = self.self_test
        if not test.positions:
            return Check(name="selftest", status="not run", detail=UNSURE)
        given = list(zip(answers.tokens, answers.logits, strict=False))
        right = sum(
            token == expected and abs(logit - value) <= test.tolerance
            for (token, logit), expected, value in zip(given, test.expected, test.logits, strict=False)
        )
        passed = right == len(test.positions) == len(given)
        detail = f"{right} of {len(test.positions)} positions answer as when the bundle was made"
        return Check(name="selftest", status="passed" if passed else "failed", detail=detail)


@contextmanager
def subject_of(bundle: Path, check: bool = True) -> Iterator[BundleUnderTest]:
    """Give a bundle as it is measured, as long as the block lasts.

    Args:
        bundle: Its folder.
        check: Compare the model's files with the manifest first.

    Raises:
        InputError: a file of it is missing, not as listed, or no such document.
        RequestError: its model is coded.
    """
    manifest = read_manifest(bundle)
    report, test = read_document(bundle, REPORT, Report), read_document(bundle, SELFTEST, SelfTest)
    vocab = next((row.rows for row in report.tensors if row.role == "embedding"), None)
    if vocab is not None:
        test.require_below(vocab, bundle / SELFTEST)
    with opened_bundle(bundle, check=check) as loaded:
        folder = bundle / "model"
        artifact = replace(loaded, folder=folder, weights=tuple(folder / path.name for path in loaded.weights))
        yield BundleUnderTest(bundle, manifest, artifact, loaded, report, test)
