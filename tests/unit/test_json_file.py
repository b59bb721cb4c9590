"""JSON files of any content give an object or one sentence."""

import json
from pathlib import Path

import pytest

from exporter.foundation.errors import InputError
from exporter.model.json_file import MAX_DEPTH, MAX_VALUES, read_json_object, read_json_object_if_there

BROKEN = {
    "not JSON": (b"{", "config.json is not valid JSON"),
    "an empty file": (b"", "not valid JSON"),
    "a list": (b"[1]", "holds no JSON object; got list"),
    "a null": (b"null", "holds no JSON object; got NoneType"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "not valid JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not valid UTF-8"),
    "deeper than Python reads": (b'{"a":' + b"[" * 100_000, "nested too deeply"),
    "deeper than others read": (b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "nested too deeply"),
    "a number of 5000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "half a surrogate pair": (b'{"a": ["\\ud83d"]}', "half a surrogate pair"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_end_in_a_sentence(tmp_path: Path, kind: str) -> None:
    content, match = BROKEN[kind]
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=match):
        read_json_object(path)


def test_objects_are_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a": "\\ud83d\\ude00", "b": NaN, "c": 1, "c": {"d": ' + b"[" * 40 + b"]" * 40 + b"}}")
    read = read_json_object(path)
    assert read["a"] == "😀"
    assert set(read["c"]) == {"d"}


def test_what_is_no_file(tmp_path: Path) -> None:
    assert read_json_object_if_there(tmp_path / "none.json") is None
    (tmp_path / "folder.json").mkdir()
    for path in (tmp_path / "none.json", tmp_path / "folder.json"):
        with pytest.raises(InputError, match="there is no file"):
            read_json_object(path)
    (tmp_path / "large.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="too large; got 8 bytes, expected at most 7"):
        read_json_object(tmp_path / "large.json", 7)


def test_too_many_values_are_refused_and_as_many_as_the_largest_tokenizers_hold_are_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b'{"a": [' + b"[]," * (MAX_VALUES // 2) + b"0]}")
    with pytest.raises(InputError, match="holds too many values; got 4194306, expected at most 4194304"):
        read_json_object(path)
    vocabulary, merges = {f"token {i}": i for i in range(262_144)}, [["a token", "another"]] * 515_000
    path.write_text(json.dumps({"model": {"vocab": vocabulary, "merges": merges}}, indent=1))
    assert read_json_object(path)["model"]["vocab"] == vocabulary
