"""`prism eval` by 1, 2 and 4 processes: the same metrics to the bit, on the embedded model; minutes on two cores.

python benchmarks/eval_processes.py [--out FOLDER]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from prism import files


def metrics_of(out: Path, processes: int) -> dict[str, Any]:
    """The metrics, but times and place, of `prism eval` by some processes."""
    words = ["prism", "eval", "--device", "cpu", "--ties", "videoalign", "--timesteps", "700,0", "--batch-size", "5"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "--"]
    command = [sys.executable, *(launcher if processes > 1 else ["-m"]), *words, "--out", str(out)]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=3000, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if run.returncode:
        raise RuntimeError(run.stderr[-3000:])
    metrics = files.read_json(out / "metrics.json")
    return {name: value for name, value in metrics.items() if name not in ("timings", "environment")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    folder = parser.parse_args().out or Path(tempfile.mkdtemp())
    found = {}
    for processes in (1, 2, 4):
        start = time.perf_counter()
        found[processes] = metrics_of(folder / f"{processes}", processes)
        print(f"{processes} processes: {time.perf_counter() - start:.0f} s", flush=True)
    same = all(metrics == found[1] for metrics in found.values())
    print(f"metrics of 1, 2 and 4 processes are {'the same' if same else 'DIFFERENT'}: {folder}")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
