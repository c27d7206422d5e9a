"""The rate of `prism encode` over that of the VAE by itself: python benchmarks/encode_throughput.py

Writes clips of moving noise as mp4 files, larger than the frames that are taken of them, and then in turns encodes them
as `prism encode` does (decoded, resized, encoded, written as shards with their checksums) and calls the VAE's `encode`
on tensors of the same frames, clip by clip. Prints the VAE's seconds over those of the whole, the median of the rounds:
1 if nothing but the VAE took time; the bar is 90 %. Beside the clock's seconds stand those of CPU time of the thread
that runs the VAE, which say the same on a machine where other work takes turns; threads that read ahead have their own.

`--vae wan`: the encoder of a Wan VAE, narrower, on frames of 256 x 256. `--vae shapeworld`: the embedded one, whose
clips of 64 x 64 cost a tenth of a second: the largest share of what is not the VAE.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prism import shapeworld
from prism.backbone import Backbone
from prism.clips import FramePolicy, read_clip
from prism.preference.readers import read
from prism.training.encode import AHEAD, encode
from prism.video import write_video

BAR = 0.9


def wan(width: int, frames: int) -> tuple[Backbone, dict[str, Any]]:
    """A Wan pipeline whose VAE has the published blocks, of fewer channels; its transformer does not matter here."""
    from diffusers import AutoencoderKLWan
    from tests import tiny

    pipe = tiny.wan()
    torch.manual_seed(0)
    pipe.vae = AutoencoderKLWan(base_dim=width).eval()
    call = {"height": 256, "width": 256, "num_frames": frames, "num_inference_steps": 2, "max_sequence_length": 12}
    return Backbone(pipe), call


def write_clips(folder: Path, count: int, frames: int, size: tuple[int, int]) -> Path:
    """Clips of a smooth picture that moves, with some noise, and a CSV in VideoAlign's columns."""
    rng, (height, width) = np.random.default_rng(0), size
    with (folder / "pairs.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["path_A", "path_B", "prompt", "VQ", "split"])
        for number in range(count):
            coarse = torch.from_numpy(rng.uniform(size=(1, 3, 8, 8)))
            picture = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")[0].permute(1, 2, 0).numpy()
            video = np.stack([np.roll(picture, 2 * frame, 1) for frame in range(frames + 8)])
            video = (video + 0.02 * rng.standard_normal((frames + 8, height, width, 1))).clip(0, 1)
            write_video(folder / f"{number}.mp4", video.astype(np.float32), 16)
            if number % 2:
                table.writerow([f"{number - 1}.mp4", f"{number}.mp4", f"a cat runs {number // 2}", "A", "train"])
    return folder / "pairs.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vae", choices=("wan", "shapeworld"), default="wan")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--frames", type=int, default=17, help="of wan")
    parser.add_argument("--width", type=int, default=8, help="base_dim of wan's VAE; 96 as published")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of the VAE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.vae == "wan":
        (backbone, call), size = wan(options.width, options.frames), (360, 480)
    else:
        backbone, call, size = Backbone(shapeworld.pipeline()), dict(shapeworld.CALL), (64, 64)
    policy = FramePolicy(num_frames=call["num_frames"], height=call["height"], width=call["width"])
    vae, rounds = backbone.pipe.vae, []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        found = read(write_clips(folder, options.clips, call["num_frames"], size))
        start = time.thread_time()
        frames = [read_clip(folder / f"{number}.mp4", policy).frames for number in range(options.clips)]
        reading = (time.thread_time() - start) / options.clips
        tensors = [torch.from_numpy(each).permute(3, 0, 1, 2)[None].float().contiguous() / 127.5 - 1 for each in frames]
        vae_encode(vae, tensors[:1])
        backbone.condition(["a cat runs 0"], **call)  # set up once
        for number in range(options.rounds):
            turns = [
                ("whole", lambda out=folder / f"{number}": encode(found, backbone, call, policy, out, progress=False)),
                ("VAE", lambda: vae_encode(vae, tensors)),
            ]
            taken = {}
            for name, work in turns if number % 2 else turns[::-1]:
                start = np.array([time.perf_counter(), time.thread_time(), time.process_time()])
                work()
                taken[name] = np.array([time.perf_counter(), time.thread_time(), time.process_time()]) - start
            rounds.append(taken)
    shape = "x".join(map(str, tensors[0].shape[1:]))
    print(f"{options.vae}, {options.clips} clips of {shape}, {options.rounds} rounds, {options.threads} threads")
    print(f"reading a clip takes a thread {1000 * reading:.0f} ms, and {AHEAD} threads read ahead")
    for place, name in enumerate(("clock", "CPU of the VAE's thread", "CPU of all threads")):
        whole, alone = (np.array([taken[each][place] for taken in rounds]) for each in ("whole", "VAE"))
        share = float(np.median(alone / whole))
        met = "" if place == 2 else f", bar {BAR:.0%} {'met' if share >= BAR else 'MISSED'}"
        ends = f"{(alone / whole).min():.1%} to {(alone / whole).max():.1%}"
        print(f"{name}: VAE {np.median(alone):.2f} s, whole {np.median(whole):.2f} s: {share:.1%} ({ends}){met}")


@torch.no_grad()
def vae_encode(vae: Any, tensors: list[torch.Tensor]) -> None:
    for each in tensors:
        vae.encode(each)


if __name__ == "__main__":
    main()
