"""A set of pictures for road 1 of docs/your-own-model.md: first frames of ShapeWorld's renders, each beside itself
blurred and with grain, by which `prism encode pairs.csv --num-frames 1`, `prism train` and `prism eval` are tried.

    python benchmarks/pictures.py runs/pictures
"""

from __future__ import annotations

import csv
import random
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from prism.shapeworld import world

COUNT, SEED = 400, 0


def main(out: Path) -> None:
    """Write pictures/ and pairs.csv to `out`."""
    (out / "pictures").mkdir(parents=True)
    videos, prompts = world.sample(COUNT, SEED)
    chance, seen = random.Random(SEED), set[str]()
    with open(out / "pairs.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["prompt", "chosen", "rejected"])
        for row, prompt in enumerate(prompts):
            if prompt in seen:  # a pair a prompt
                continue
            seen.add(prompt)
            sharp = Image.fromarray((videos[row, 0].numpy() * 255).astype(np.uint8))
            blurred = np.asarray(sharp.filter(ImageFilter.GaussianBlur(chance.uniform(0.5, 2))), float)
            grain = np.random.default_rng(row).normal(0, chance.uniform(0, 25), blurred.shape)
            names = [f"pictures/{row:04d}-a.png", f"pictures/{row:04d}-b.jpg"]
            sharp.save(out / names[0])
            Image.fromarray((blurred + grain).clip(0, 255).astype(np.uint8)).save(out / names[1], quality=80)
            table.writerow([prompt, *names])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
