"""Coded files: restored bit by bit, never silently wrong, and as small as the entropy says."""

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import constriction
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.coding import ans, chunk
from exporter.coding.byte_reader import Reading
from exporter.coding.chunk import decode, encode
from exporter.coding.container import PROFILES, code_file, original_of, restore_file
from exporter.coding.huffman import huffman_bytes, read_huffman
from exporter.coding.layout import ANYTHING, CODES, NUMBERS, Field, FileSection, Part
from exporter.coding.profiles import Profile
from exporter.coding.tables import PRECISION, TOTAL, counts_of, entropy_bits, read_table, shares_of, table_bytes
from exporter.foundation.errors import InputError, RequestError

pytestmark = pytest.mark.slow

Q8_0 = (Field(NUMBERS, 2), Field(CODES, 32))
FIELDS = st.lists(
    st.builds(Field, st.sampled_from((CODES, NUMBERS, ANYTHING)), st.integers(1, 5)), min_size=1, max_size=4
).map(tuple)
PARTS = st.lists(st.builds(Part, st.integers(1, 20), st.integers(1, 20), FIELDS), min_size=1, max_size=3)


def codes(rows: int, columns: int, spread: float, seed: int = 0) -> np.ndarray:
    """Return codes, int8 [rows, columns], some rows and columns of which reach further than others."""
    chance = np.random.default_rng(seed)
    reach = np.exp(chance.normal(0, 0.7, (rows, 1)) + chance.normal(0, 0.5, columns)) * spread
    return np.clip(np.rint(chance.normal(0, 1, (rows, columns)) * reach), -127, 127).astype(np.int8)


def q8_0(rows: int, columns: int, spread: float, seed: int = 0) -> bytes:
    """Return blocks as Q8_0 has them, one scale for each row."""
    scales = np.random.default_rng(seed).uniform(0.001, 0.01, (rows, 1, 1)).astype(np.float16).view(np.uint8)
    blocks = codes(rows, columns, spread, seed).view(np.uint8).reshape(rows, -1, 32)
    return np.concatenate([np.broadcast_to(scales, (*blocks.shape[:2], 2)), blocks], axis=2).tobytes()


@settings(max_examples=60, deadline=None)
@given(PARTS, st.sampled_from(PROFILES), st.integers(0, 2**32), st.sampled_from((1, 3, 40, 256)))
def test_any_parts_are_restored(parts: list[Part], profile: Profile, seed: int, alphabet: int) -> None:
    size = sum(part.bytes for part in parts)
    data = np.random.default_rng(seed).integers(0, alphabet, size).astype(np.uint8).tobytes()
    assert decode(encode(data, parts, profile).payload, size).tobytes() == data


@settings(max_examples=25, deadline=None)
@given(st.binary(max_size=3000), st.integers(0, 40), PARTS, st.sampled_from(PROFILES))
def test_any_file_is_restored_whatever_its_layout_claims(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, start: int, parts: list[Part], profile: Profile
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "file").write_bytes(data)
    size = code_file(folder / "file", folder / "coded", profile, [FileSection(start, part) for part in parts])
    assert restore_file(folder / "coded", folder / "restored").name == "file"
    assert (folder / "restored").read_bytes() == data
    assert (size.original_bytes, size.coded_bytes) == (len(data), (folder / "coded").stat().st_size)


@pytest.fixture(scope="module", params=PROFILES)
def coded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coded")
    (folder / "file").write_bytes(b"header " * 9 + q8_0(16, 64, 1.0))
    code_file(folder / "file", folder / "coded", request.param, [FileSection(63, Part(16, 2, Q8_0))])
    return folder / "coded"


def test_every_flipped_byte_is_noticed(coded: Path, tmp_path: Path) -> None:
    whole = coded.read_bytes()
    for place in range(len(whole)):
        (tmp_path / "flipped").write_bytes(whole[:place] + bytes((whole[place] ^ 0x41,)) + whole[place + 1 :])
        with pytest.raises(InputError, match="coded file"):
            restore_file(tmp_path / "flipped", tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["flipped"]


def test_every_missing_or_added_byte_is_noticed(coded: Path, tmp_path: Path) -> None:
    whole = coded.read_bytes()
    changed = [whole[:count] for count in range(len(whole))] + [whole + b"\0", whole[:-1] + whole[-2:]]
    for one in changed:
        (tmp_path / "changed").write_bytes(one)
        with pytest.raises(InputError, match="coded file"):
            restore_file(tmp_path / "changed", tmp_path / "out")


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(PROFILES), st.data())
def test_a_payload_that_its_checksum_does_not_guard_is_an_input_error_or_decodes(
    profile: Profile, data: st.DataObject
) -> None:
    part = Part(24, 4, Q8_0)
    payload = bytearray(encode(q8_0(24, 128, 1.0), [part], profile).payload)
    for place in data.draw(st.lists(st.integers(0, len(payload) - 1), min_size=1, max_size=4)):
        payload[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(payload)) | st.just(len(payload)))
    with suppress(InputError):
        assert len(decode(bytes(payload[:cut]), part.bytes)) == part.bytes


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0, 30.0])
def test_small_is_within_two_percent_of_the_entropy(tmp_path: Path, spread: float) -> None:
    (tmp_path / "file").write_bytes(q8_0(768, 1024, spread))
    size = code_file(tmp_path / "file", tmp_path / "coded", "small", [FileSection(0, Part(768, 32, Q8_0))])
    assert size.coded_bytes <= 1.02 * size.entropy_bytes


@pytest.mark.parametrize("spread", [0.5, 2.0, 20.0])
def test_ans_takes_as_many_bits_as_the_oracle(spread: float) -> None:
    symbols = codes(512, 1024, spread).view(np.uint8).reshape(-1)
    tables, sizes = shares_of(counts_of(symbols))[None], np.array([symbols.size])
    states, words = ans.encode(symbols, tables, sizes, np.zeros(1, np.int64))
    assert (ans.decode(states, words, tables, sizes, np.zeros(1, np.int64)) == symbols).all()
    model = constriction.stream.model.Categorical(tables[0] / TOTAL, perfect=True)
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(symbols.astype(np.int32), model)
    assert (coder.get_compressed().size * 4) == pytest.approx(2 * len(words) + 2 * len(states), rel=5e-3)
    assert 16 * len(words) + 16 * len(states) <= 1.005 * entropy_bits(counts_of(symbols))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 10**7), min_size=256, max_size=256).filter(any))
def test_shares_are_whole_and_tables_are_read_back(given_counts: list[int]) -> None:
    counts = np.array(given_counts)
    shares = shares_of(counts)
    assert int(shares.sum()) == TOTAL == 1 << PRECISION
    assert ((shares > 0) == (counts > 0)).all()
    reading = Reading(table_bytes(shares))
    assert (read_table(reading) == shares).all()
    reading.end()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5000), st.floats(0.1, 60), st.integers(0, 100))
def test_huffman_is_restored(count: int, spread: float, seed: int) -> None:
    symbols = np.random.default_rng(seed).normal(0, spread, count).astype(np.int8).view(np.uint8)
    reading = Reading(huffman_bytes(symbols))
    assert (read_huffman(reading, count) == symbols).all()
    reading.end()


def test_classes_take_fewer_bits_than_one_histogram(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(q8_0(768, 1024, 1.5))
    size = code_file(tmp_path / "file", tmp_path / "coded", "small", [FileSection(0, Part(768, 32, Q8_0))])
    assert size.coded_bytes < 0.95 * size.entropy_bytes


def test_equal_scales_of_a_row_take_two_bytes_a_row(tmp_path: Path) -> None:
    scales = np.random.default_rng(0).uniform(0.001, 0.01, (500, 1)).astype(np.float16)
    (tmp_path / "file").write_bytes(np.repeat(scales, 32, axis=1).tobytes())
    layout = [FileSection(0, Part(500, 32, (Field(NUMBERS, 2),)))]
    assert code_file(tmp_path / "file", tmp_path / "coded", "small", layout).coded_bytes < 2 * 500 + 400


@pytest.mark.parametrize("profile", PROFILES)
def test_chunks_of_too_many_parts_or_tables_are_coded_as_anything(
    profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [Part(1, 1, (Field(CODES, 1),))] * (chunk.MOST_PARTS + 1)
    data = codes(1, len(many), 1.0).tobytes()
    assert decode(encode(data, many, profile).payload, len(data)).tobytes() == data
    part, data = Part(64, 4, Q8_0), q8_0(64, 128, 3.0)
    payload = encode(data, [part], profile).payload
    monkeypatch.setattr(chunk, "MOST_BLOCKS", 2)
    with pytest.raises(InputError, match="has too many blocks"):
        decode(payload, part.bytes)
    assert decode(encode(data, [part], profile).payload, len(data)).tobytes() == data


def test_a_profile_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(RequestError, match="unknown profile of coding; got tiny, expected small or fast"):
        code_file(tmp_path / "file", tmp_path / "coded", "tiny")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["../evil", "a/b", "..", "", "c:\\x", "new\nline"])
def test_a_name_outside_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    from exporter.coding.container import Original, _header

    (tmp_path / "coded").write_bytes(_header(Original(name, 0, bytes(32))))
    with pytest.raises(InputError, match="names a file outside the folder"):
        original_of(tmp_path / "coded")


def test_a_size_that_the_disk_does_not_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from exporter.coding.container import Original, _header

    (tmp_path / "coded").write_bytes(_header(Original("x", 1 << 25, bytes(32))))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(RequestError, match="not enough free disk space"):
        restore_file(tmp_path / "coded", tmp_path / "x")


def test_a_size_that_no_coding_reaches_is_refused(tmp_path: Path) -> None:
    from exporter.coding.container import Original, _header

    (tmp_path / "coded").write_bytes(_header(Original("x", 1 << 60, bytes(32))))
    with pytest.raises(InputError, match="claims to stand for more than any model does"):
        restore_file(tmp_path / "coded", tmp_path / "x")


def test_another_file_and_another_version_are_refused(tmp_path: Path) -> None:
    from exporter.coding.container import MAGIC

    (tmp_path / "coded").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(InputError, match="this is no coded file"):
        original_of(tmp_path / "coded")
    (tmp_path / "coded").write_bytes(MAGIC + b"\x09" + bytes(60))
    with pytest.raises(InputError, match="of another version"):
        original_of(tmp_path / "coded")


def test_a_coding_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    (tmp_path / "file").write_bytes(bytes(1000))
    with pytest.raises(KeyboardInterrupt):
        code_file(tmp_path / "file", tmp_path / "coded", progress=interrupt)
    code_file(tmp_path / "file", tmp_path / "coded")
    with pytest.raises(KeyboardInterrupt):
        restore_file(tmp_path / "coded", tmp_path / "restored", interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coded", "file"]
