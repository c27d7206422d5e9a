"""Draw the film strips of docs/referee.md and docs/shapeworld.md: `python docs/strips.py docs/strips`.

One picture of clean renders, one of each corruption (a row a strength) and one of each backbone: some of the 17 frames
of each video, and the referee's scores beside.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from prism import shapeworld
from prism.backbone import Backbone
from prism.shapeworld import corruptions, grammar, referee, world

INK, MUTED, ACCENT = "#1d1f24", "#6b6f78", "#3f3ec9"
FRAMES = {"flicker": range(9), "noise": range(0, 17, 4)}  # noise does not compress; else every second frame
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SEED = 7
SAMPLED = 8  # prompts of each backbone's picture
WORLD = (  # the sorts of motion, then each relation
    "a small red circle bounces off the floor on a striped ground",
    "a large cyan triangle moves slowly up on a brown ground",
    "a purple square moves quickly left",
    "a white cross shrinks on a grey ground",
    "an orange circle grows",
    "a green triangle stays still on a striped ground",
    "a red circle moves right above a white cross",
    "a cyan triangle moves left below a yellow square on a brown ground",
    "a green square moves down on the left of an orange cross",
    "a purple circle moves up on the right of a green triangle",
    "a white square moves left in front of a red circle on a grey ground",
    "a yellow triangle moves right behind a blue square",
    "a blue cross moves up while an orange circle moves right",
    "a blue square moves right, then a yellow cross moves down",
    "a purple square moves down, then a cyan circle passes behind it on a striped ground",
    "a red circle moves right, then a green square passes in front of it on a grey ground",
)
SHOWN = {
    "blur": "a yellow cross moves right below a blue square",
    "noise": "a red triangle bounces off the left wall on a brown ground",
    "flicker": "a green cross moves left while a purple circle moves up on a grey ground",
    "teleport": "an orange square moves right",
    "melt": "a blue square moves right, then a yellow cross moves down",
    "wrong colour": "a yellow cross shrinks",
    "wrong direction": "a cyan circle moves right behind a red triangle on a grey ground",
    "wrong order": "a red circle moves right, then a blue square passes behind it",
    "missing object": "a white triangle moves down on the right of a green circle on a brown ground",
}


def draw(
    videos: Tensor, prompts: Sequence[str], notes: Sequence[str], bold: str | None, frames: range, target: Path
) -> None:
    """Films (rows, T, H, W, 3) one below the other, their notes on the left and scores on the right; `bold` scores in
    colour.
    """
    scores, rows, cell = referee.batch(videos, prompts), len(videos), 0.8
    left, right, top = (1.85, 1.7, 0.3) if bold is None else (0.6, 1.7, 0.5)
    width, height = left + right + cell * len(frames), top + (cell + 0.05) * rows
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")

    def write(x: float, y: float, text: str, **style: Any) -> None:
        figure.text(x / width, 1 - y / height, text, **{"va": "center", "fontsize": 8, "color": INK, **style})

    for row in range(rows):
        low = height - top - (cell + 0.05) * (row + 1) + 0.05
        axes = figure.add_axes((left / width, low / height, 1 - (left + right) / width, cell / height))
        axes.imshow(torch.cat([videos[row, frame] for frame in frames], 1).numpy(), interpolation="nearest")
        axes.set_axis_off()
        for edge in range(1, len(frames)):
            axes.axvline(edge * world.SIZE - 0.5, color="white", linewidth=1.2)
        middle = height - low - cell / 2
        write(left - 0.12, middle, notes[row], ha="right")
        for column, name in enumerate(referee.TIE_MARGINS):
            style = {"color": ACCENT, "weight": "bold"} if name == bold else {}
            write(width - right + 0.4 + 0.5 * column, middle, f"{scores[name][row]:.2f}", ha="center", **style)
    for column, name in enumerate(referee.TIE_MARGINS):
        write(width - right + 0.4 + 0.5 * column, top - 0.12, name, ha="center", color=MUTED)
    for column, frame in enumerate(frames):
        write(left + cell * (column + 0.5), top - 0.1, str(frame), ha="center", fontsize=6.5, color=MUTED)
    if bold is not None:
        write(0.08, 0.15, f"“{prompts[0]}”", ha="left", fontsize=9)
        write(left - 0.12, top - 0.1, "strength", ha="right", fontsize=6.5, color=MUTED)
    drawn = BytesIO()
    figure.savefig(drawn)
    Image.open(drawn).convert("RGB").quantize(112, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
        target, optimize=True
    )


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    notes = [textwrap.fill(text, 26, break_on_hyphens=False) for text in WORLD]
    every_other = range(0, world.FRAMES, 2)
    draw(world.render([_scene(text) for text in WORLD], SEED), WORLD, notes, None, every_other, folder / "world.png")
    for kind, prompt in SHOWN.items():
        videos = torch.cat([corruptions.corrupt([_scene(prompt)], kind, strength, SEED) for strength in STRENGTHS])
        target, notes = folder / f"{kind.replace(' ', '-')}.png", [f"{strength:g}" for strength in STRENGTHS]
        own = corruptions.CORRUPTIONS[kind]
        draw(videos, [prompt] * len(videos), notes, own, FRAMES.get(kind, every_other), target)
    prompts = shapeworld.prompts("validation", SAMPLED)  # the first ones, and their first seed: nothing is chosen
    notes = [textwrap.fill(text, 26, break_on_hyphens=False) for text in prompts]
    for name in shapeworld.BACKBONES:
        pipe = shapeworld.pipeline(name)
        noise = [torch.Generator().manual_seed(SEED) for _ in prompts]
        latents = pipe(prompts, generator=noise, output_type="latent", **shapeworld.CALL).frames
        draw(Backbone(pipe).decode(latents), prompts, notes, None, every_other, folder / f"backbone-{name}.png")


def _scene(prompt: str) -> grammar.Scene:
    scene = grammar.parse(prompt)
    assert scene is not None, prompt
    return scene


if __name__ == "__main__":
    main(Path(sys.argv[1]))
