"""The command line as a user meets it: whole runs in processes of their own."""

import json
import subprocess
from pathlib import Path

import pytest

from exporter.coding.container import code_file
from exporter.targets.artifact import target_names
from tests.commands import cli
from tests.models import tiny_model

pytestmark = pytest.mark.slow

TARGETS = {"gguf": "Q8_0", "onnx": "int8", "onnx-qdq": "a16w8"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, two texts and a bundle for each target."""
    folder = tmp_path_factory.mktemp("world")
    tiny_model(folder / "model")
    words = "the capital of France is Paris, numbers 12 345 and hello world. "
    (folder / "calibration.txt").write_text(words * 400)
    (folder / "evaluation.txt").write_text(words[::-1] * 400)
    for target, type in TARGETS.items():
        made = build(folder, type, target, f"bundle-{target}")
        assert made.returncode == 0, made.stderr
    return folder


def build(folder: Path, type: str, target: str, output: str) -> subprocess.CompletedProcess[str]:
    return cli(
        folder, "build", "model", "--device", "raspberry-pi-5", "--target", target, "--type", type, "-o", output,
        "--calibration", "calibration.txt", "--evaluation", "evaluation.txt", "--context", "128", "--json",
    )  # fmt: skip


@pytest.mark.parametrize("target", list(TARGETS))
def test_bundle_is_whole_and_says_what_it_is(world: Path, target: str) -> None:
    bundle = f"bundle-{target}"
    verified = cli(world, "verify", bundle, "--json")
    assert verified.returncode == 0, verified.stderr
    facts = json.loads(cli(world, "inspect", bundle, "--json").stdout)
    assert facts["target"] == target
    assert facts["accuracy"]["kl_mean"]["value"] < 0.01
    # This model's weights are random, so its first choices hardly lead: a small change moves some of them.
    assert facts["accuracy"]["top1_agreement"]["value"] > 0.9
    for section, name in (("size", "file_bytes"), ("speed", "decode_tokens_per_s"), ("memory", "peak_bytes")):
        assert facts[section][name]["basis"] == "measured"
    assert {check["name"] for check in facts["checks"]} >= {"lowering.weights", "lowering.formats", "device.ram"}
    assert cli(world, "run", bundle, "-p", "hello").returncode == 0
    assert "compare" not in cli(world, "compare", "bundle-gguf", "bundle-onnx").stderr


def test_the_same_job_gives_the_same_content(world: Path) -> None:
    assert build(world, "Q8_0", "gguf", "again").returncode == 0
    digests = [
        json.loads((world / name / "manifest.json").read_text())["content_digest"] for name in ("bundle-gguf", "again")
    ]
    assert digests[0] == digests[1]


def test_a_flipped_byte_fails_the_check(world: Path) -> None:
    path = world / "bundle-onnx" / "model" / "model.onnx.data"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    verified = cli(world, "verify", "bundle-onnx")
    assert verified.returncode == 1
    assert "checks failed" in verified.stderr
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("build", "model", "-d", "raspberry-pi-6", "-o", "x"), 2, "did you mean 'raspberry-pi-5'"),
        (("build", "model", "-d", "raspberry-pi-5", "-o", "bundle-gguf"), 2, "exists"),
        (("build", "model", "-d", "raspberry-pi-5", "-o", "no/where"), 2, "does not exist"),
        (("plan", "model", "-d", "raspberry-pi-5", "--type", "Q4_K_X"), 2, "unknown GGUF type 'Q4_K_X'"),
        (("plan", "model", "-d", "raspberry-pi-5", "-t", "gguff"), 2, "did you mean 'gguf'"),
        (("plan", "model", "-d", "raspberry-pi-5", "-t", "onnx", "--type", "int4-b256"), 2, "cannot hold rows of 64"),
        (("plan", "nothing", "-d", "raspberry-pi-5"), 2, "there is no such model"),
        (("build", "model", "-d", "raspberry-pi-5", "-o", "x", "--calibration", "none.txt"), 2, "no such text file"),
        (("verify", "model"), 2, "this is no bundle"),
        (("plan", "model"), 2, "device"),
    ],
)
def test_wrong_requests_are_one_sentence(world: Path, arguments: tuple[str, ...], code: int, sentence: str) -> None:
    before = sorted(path.name for path in world.iterdir())
    done = cli(world, *arguments)
    assert done.returncode == code, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in world.iterdir()) == before


def test_a_coded_file_is_unpacked_and_a_damaged_one_is_not(world: Path) -> None:
    model = world / "bundle-gguf/model/model.gguf"
    code_file(model, world / "small.coded")
    printed = json.loads(cli(world, "unpack", "small.coded", "-o", "unpacked", "--json").stdout)
    assert (world / "unpacked/model.gguf").read_bytes() == model.read_bytes()
    assert printed["bytes"] == model.stat().st_size
    again = cli(world, "unpack", "small.coded", "-o", "unpacked")
    assert (again.returncode, "already exists" in again.stderr) == (2, True)
    damage = bytearray((world / "small.coded").read_bytes())
    damage[-9] ^= 1
    (world / "small.coded").write_bytes(damage)
    damaged = cli(world, "unpack", "small.coded", "-o", "other")
    assert (damaged.returncode, "the coded file is damaged" in damaged.stderr) == (3, True)
    assert not list((world / "other").iterdir())
    nothing = cli(world, "unpack", "none.coded", "-o", "other")
    assert (nothing.returncode, "there is no such file" in nothing.stderr) == (2, True)


@pytest.mark.parametrize("target", list(TARGETS))
@pytest.mark.parametrize("recipe", ["double", "rate"])
def test_a_recipe_that_ships_coded(world: Path, recipe: str, target: str) -> None:
    shipped, plain = f"shipped-{recipe}-{target}", f"plain-{recipe}-{target}"
    made = cli(
        world, "build", "model", "--device", "raspberry-pi-5", "--target", target, "--recipe", recipe, "-o", shipped,
        "--calibration", "calibration.txt", "--evaluation", "evaluation.txt", "--context", "128", "--json",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    facts = json.loads(made.stdout)
    assert facts["recipe"]["transport"] == "small"
    coded = sum(path.stat().st_size for path in (world / shipped).rglob("*.coded"))
    size = facts["size"]
    assert size["coded_bytes"]["value"] == coded < size["file_bytes"]["value"]
    assert size["coded_bits_per_weight"]["value"] == pytest.approx(8 * coded / facts["model"]["parameters"])
    while_coded = json.loads(cli(world, "verify", shipped, "--json").stdout)
    tested = {check["name"]: check["status"] for check in while_coded["checks"]}["selftest"]
    ran = cli(world, "run", shipped, "-p", "hello", "--json")
    if target == "onnx":
        assert (tested, ran.returncode) == ("passed", 0)
        took = json.loads(ran.stdout)["residence"]
        assert (took["basis"], took["weight_bytes"] > 0) == ("measured", True)
        kept = cli(world, "run", shipped, "-p", "hello", "-n", "4", "--min-decode", "0.5")
        assert (kept.returncode, "parts coded" in kept.stderr) == (0, True)
    else:
        assert (tested, ran.returncode, "edge-exporter unpack" in ran.stderr) == ("not run", 2, True)
    benched = cli(world, "bench", shipped, "-r", "1")
    assert (benched.returncode, "edge-exporter unpack" in benched.stderr) == (2, True)
    assert cli(world, "unpack", shipped, "-o", plain).returncode == 0
    verified = json.loads(cli(world, "verify", plain, "--json").stdout)
    assert {check["status"] for check in verified["checks"]} == {"passed"}
    unpacked = cli(world, "run", plain, "-p", "hello", "--json")
    assert unpacked.returncode == 0
    if target == "onnx":
        assert json.loads(unpacked.stdout)["answer"] == json.loads(ran.stdout)["answer"]
        refused = cli(world, "run", plain, "-p", "hello", "--min-decode", "0.5")
        assert (refused.returncode, "leave out --min-decode" in refused.stderr) == (2, True)
    assert "shipped coded" in cli(world, "inspect", plain).stdout


def test_any_bundle_can_ship_coded(world: Path) -> None:
    made = cli(
        world, "build", "model", "--device", "raspberry-pi-5", "--target", "gguf", "--type", "Q8_0", "-o", "fast",
        "--transport", "fast", "--calibration", "calibration.txt", "--evaluation", "evaluation.txt", "--context", "128",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert cli(world, "unpack", "fast", "-o", "fast-plain").returncode == 0
    restored = (world / "fast-plain/model/model.gguf").read_bytes()
    assert restored == (world / "bundle-gguf/model/model.gguf").read_bytes()
    assert "'small', 'fast'" in cli(world, "build", "model", "-d", "x", "-o", "y", "--transport", "quick").stderr


def test_listing_devices(world: Path) -> None:
    assert "raspberry-pi-5" in cli(world, "devices").stdout


@pytest.mark.parametrize("target", target_names())
def test_planning_for_every_target(world: Path, target: str) -> None:
    planned = json.loads(cli(world, "plan", "model", "-d", "raspberry-pi-5", "-t", target, "--json").stdout)
    assert planned["file_bytes"]["basis"] == "estimated"
    assert len(planned["decisions"]) == 15


def test_names_from_outside_are_shown_with_their_control_characters_escaped(world: Path) -> None:
    odd = "odd \x1b[31m[red]model"
    (world / odd).mkdir(exist_ok=True)
    for path in (world / "model").iterdir():
        (world / odd / path.name).write_bytes(path.read_bytes())
    shown = cli(world, "plan", odd, "-d", "raspberry-pi-5")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("odd \\u001b[31m[red]model for ")


def test_a_plan_within_limits_is_one_json_document(world: Path) -> None:
    limits = ("--bits", "30", "--min-decode", "10", "--prefer", "speed")
    planned = cli(world, "plan", "model", "--device", "raspberry-pi-5", "--target", "gguf", *limits, "--json")
    assert planned.returncode == 0, planned.stderr
    assert "10.0 tokens/s decoded (estimated), speed preferred" in json.loads(planned.stdout)["scheme"]
