"""A bundle under measurement: its files, its self-test and its report."""

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
from exporter.targets.facts import facts_of


@dataclass(frozen=True)
class BundleUnderTest:
    """A bundle to measure.

    Attributes:
        bundle: Its folder.
        manifest: Its manifest.
        artifact: The model's files in the bundle.
        loaded: The same files as a runtime may load them.
        report: The report of the build.
        self_test: Its self-test.
    """

    bundle: Path
    manifest: Manifest
    artifact: Artifact
    loaded: Artifact
    report: Report
    self_test: SelfTest

    @property
    def model_files(self) -> list[str]:
        """Paths below the bundle of the files that a runtime reads to compute."""
        weights = (path.relative_to(self.loaded.folder).as_posix() for path in self.loaded.weights)
        return [*self._settings, *(f"model/{name}" for name in weights)]

    @property
    def _settings(self) -> list[str]:
        found = (name for name in facts_of(self.loaded.target).settings if (self.loaded.folder / name).is_file())
        return [f"model/{name}" for name in found]

    def uploads(self) -> list[Upload]:
        """Return the model's files for sending: settings as rewritten, all other files as listed.

        Raises:
            InputError: one of them differs from the manifest.
        """
        made = []
        for name in self.model_files:
            path = self.loaded.folder / Path(name).relative_to("model")
            made.append(Upload(path, name, *sha256_of(path)))
        listed = {entry.path: entry.sha256 for entry in self.manifest.files}
        for upload in made:
            if upload.name not in self._settings and upload.sha256 != listed[upload.name]:
                raise not_as_listed(self.bundle / upload.name, upload.sha256, listed[upload.name])
        return made

    def check(self, answers: Answers) -> Check:
        """Compare a device's answers to the self-test with those from when the bundle was made."""
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
    """Yield a bundle for measurement as long as the block lasts.

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
        artifact = replace(
            loaded, folder=folder, weights=tuple(folder / path.relative_to(loaded.folder) for path in loaded.weights)
        )
        yield BundleUnderTest(bundle, manifest, artifact, loaded, report, test)
