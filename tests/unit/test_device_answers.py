"""What a device answers is hostile: whatever it is, it is refused in one sentence, soon and in little memory."""

import resource
import time

import pytest

from exporter.bench.results import MAX_CHARACTERS, Answers, LlamaBenchRows, Measurement, Needs, parsed
from exporter.foundation.errors import InputError

FULL = MAX_CHARACTERS - 64
HOSTILE = {
    "nested lists": "[" * FULL,
    "nested objects": '{"a":' * (FULL // 5),
    "a list of numbers": f"[{'1,' * (FULL // 2)}1]",
    "a list of objects": f"[{'{},' * (FULL // 3)}{{}}]",
    "a list of tokens": f'{{"tokens":[{"1," * (FULL // 2)}1],"logits":[]}}',
    "tokens that are none": f'{{"tokens":[{"[]," * (FULL // 3)}1],"logits":[]}}',
    "many keys": "{" + ",".join(f'"k{i}":0' for i in range(FULL // 12)) + "}",
    "a long key": f'{{"{"k" * FULL}":0}}',
    "a long number": f'{{"tokens":[{"9" * FULL}],"logits":[]}}',
    "a long text": f'"{"a" * FULL}"',
    "no number": '{"tokens":[1],"logits":[NaN]}',
    "an infinite number": '{"tokens":[1],"logits":[1e999]}',
    "half a character": '{"python":"\\ud800","missing":[],"hidden":[]}',
    "a control character": '{"python":"\\u001b[2J","missing":[],"hidden":[]}',
    "more than an answer": " " * (MAX_CHARACTERS + 1),
    "nothing": "",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", [Answers, Measurement, Needs, LlamaBenchRows])
def test_it_is_refused_soon_and_in_little_memory(kind: type[object], name: str) -> None:
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError) as caught:
        parsed(kind, HOSTILE[name], "ssh://pi@board")
    assert time.process_time() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 << 10
    assert len(str(caught.value)) < 400 and str(caught.value).isprintable()
