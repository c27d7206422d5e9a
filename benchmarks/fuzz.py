"""Readers under damage: how many of N mutated heads, pipelines' folders and stores end in anything but a sentence.

    python benchmarks/fuzz.py heads --count 1000 --seed 0
    python benchmarks/fuzz.py backbones --count 200

"fine": it loaded and could be used; "sentence": a PrismError of at most 500 characters on one line; "raw": any other
exception; "long": a PrismError that is longer or has several lines; "hang": no answer in 20 seconds. What is wrong is
printed with the seed that makes it again (`--only SEED`).
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

from tests.fuzz import readers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["heads", "pixels", "backbones", "stores"])
    parser.add_argument("--count", type=int, default=1000, help="mutations")
    parser.add_argument("--seed", type=int, default=0, help="of the first mutation; the others follow")
    parser.add_argument("--only", type=int, help="run the mutation of this seed alone, and say what came of it")
    parser.add_argument("--sentences", action="store_true", help="print every sentence too")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    counts: Counter[str] = Counter()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as place, open(os.devnull, "w") as nowhere:
        case = getattr(readers, options.what)(Path(place))
        seeds = [options.only] if options.only is not None else range(options.seed, options.seed + options.count)
        for seed in seeds:
            with contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
                told, kind, words = case(Random(seed))
            counts[kind] += 1
            if kind not in ("fine", "sentence") or options.sentences or options.only is not None:
                print(f"[{seed}] {kind}: {told}\n    {words}", flush=True)
    print(f"{options.what}, {sum(counts.values())} mutations, {time.perf_counter() - start:.0f} s:", end=" ")
    print(", ".join(f"{kind} {count}" for kind, count in counts.most_common()))


if __name__ == "__main__":
    main()
