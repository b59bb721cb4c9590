"""`make fuzz`: mutations of every kind of input, and each finding with the command that shows it again."""

import argparse
import os
import sys

from exporter.foundation.cpu import available_cores
from tests.fuzz.fuzzing import Tally, fuzz


def main() -> int:
    """Fuzz some subjects, as many at a time as there are cores; return 1 where there is a finding."""
    from concurrent.futures import ThreadPoolExecutor

    from tests.fuzz.bombs import BOMBS
    from tests.fuzz.subjects import SUBJECTS

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--only", nargs="*", choices=(*SUBJECTS, *BOMBS), default=list(SUBJECTS), metavar="SUBJECT")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation")
    parser.add_argument("--count", type=int, default=3000, help="mutations of each subject")
    asked = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with ThreadPoolExecutor(min(2, available_cores())) as pool:
        started = {name: pool.submit(fuzz, name, asked.seed, asked.first, asked.count) for name in asked.only}
        tallies = {name: tally.result() for name, tally in started.items()}
    for tally in tallies.values():
        print(*tally.findings, sep="\n", end="\n" if tally.findings else "")
    columns = ("mutations", "accepted", "refused", "findings", "seconds")
    print(f"{'subject':<20}" + "".join(f"{column:>10}" for column in columns))
    for name, tally in tallies.items():
        print(_line(name, tally))
    return int(any(tally.findings for tally in tallies.values()))


def _line(name: str, tally: Tally) -> str:
    counts = (tally.accepted + tally.refused + len(tally.findings), tally.accepted, tally.refused, len(tally.findings))
    return f"{name:<20}" + "".join(f"{count:>10}" for count in counts) + f"{tally.seconds:>10.1f}"


if __name__ == "__main__":
    sys.exit(main())
