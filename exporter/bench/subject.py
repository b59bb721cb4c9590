"""A bundle as it is measured: its files, its self-test, and what is said of it beside the results."""

from dataclasses import dataclass
from pathlib import Path

from exporter.bench.results import Answers
from exporter.bundle.manifest import Manifest, sha256_of
from exporter.bundle.verify import read_manifest
from exporter.device.connect.workplace import Parcel
from exporter.errors import InputError
from exporter.measures import Check
from exporter.report.data import Report, from_json
from exporter.targets.artifact import Artifact
from exporter.use import open_bundle
from exporter.validate.selftest import UNSURE, SelfTest

CONFIG = "model/genai_config.json"


@dataclass(frozen=True)
class Subject:
    """A bundle to measure.

    Attributes:
        bundle: Its folder.
        manifest: What it lists.
        artifact: What a runtime loads.
        report: What the build found.
        self_test: What it must answer.
    """

    bundle: Path
    manifest: Manifest
    artifact: Artifact
    report: Report
    self_test: SelfTest

    @property
    def model_files(self) -> list[str]:
        """Paths below the bundle of what a runtime reads to compute."""
        return [one.path for one in self.manifest.files if one.role == "model" or one.path == CONFIG]

    @property
    def has_adapter(self) -> bool:
        """Whether factors travel in a file of their own."""
        return any(path.endswith("adapter.gguf") for path in self.model_files)

    def parcels(self) -> list[Parcel]:
        """Return the model's files as they are sent.

        Raises:
            InputError: one of them is not as the manifest lists it.
        """
        made = []
        for entry in self.manifest.files:
            if entry.path not in self.model_files:
                continue
            path = self.bundle / entry.path
            _, digest = sha256_of(path)
            if digest != entry.sha256:
                raise InputError(
                    "the file is not the one that the manifest lists", where=path, got=f"SHA-256 {digest}",
                    expected=entry.sha256, next_step="see edge-exporter verify, and get the bundle again",
                )  # fmt: skip
            made.append(Parcel(path, entry.path, entry.size, entry.sha256))
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


def subject_of(bundle: Path) -> Subject:
    """Return a bundle as it is measured.

    Raises:
        InputError: a file of it is missing, truncated or no such document.
        RequestError: its model is coded.
    """
    artifact, manifest = open_bundle(bundle), read_manifest(bundle)
    report, test = bundle / "report.json", bundle / "selftest.json"
    return Subject(
        bundle, manifest, artifact, from_json(Report, report.read_bytes(), report),
        from_json(SelfTest, test.read_bytes(), test),
    )  # fmt: skip
