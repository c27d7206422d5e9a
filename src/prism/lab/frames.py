"""Decoded frames, kept on disk: a pixel judge's time goes into decoding, and several judges see the same frames.

Frames are bytes, as in a video file. They are kept under a hash of the latent they were decoded from, so that whatever
gives the same latent (the same store, level, seed and draw) finds them, and nothing stale is ever read.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prism import files, temporary
from prism.backbone import Backbone
from prism.backbone.fingerprint import vae_hash, vae_hashes
from prism.errors import PrismError

FORMAT, SCHEMA = "prism-decoded", 1


def decode(backbone: Backbone, latents: Tensor) -> Tensor:
    """Latents (B, ...), noisy or not, decoded as they are: (B, T, H, W, 3) uint8.

    One at a time: a video's bytes must not depend on which others are decoded beside it.
    """
    return torch.cat([(backbone.decode(row) * 255).round().to(torch.uint8).cpu() for row in latents.split(1)])


class DecodedCache:
    """Does what `decode` does, and remembers it in a folder.

    A file holds a video of T * H * W * 3 bytes, 209 kB of 17 frames of 64 x 64. Files appear whole, so that a run that
    was killed goes on where it was, and several processes may share a folder.

    Args:
        folder: made where it does not exist.
        backbone: whose VAE decodes.

    Raises:
        PrismError: where the folder holds something else, or frames of another VAE.
    """

    def __init__(self, folder: str | os.PathLike[str], backbone: Backbone) -> None:
        self.folder, self.backbone = Path(folder), backbone
        self.decoded = 0  # videos that this process had to decode
        wanted = {"format": FORMAT, "schema": SCHEMA, "vae": vae_hash(backbone)}
        label = self.folder / "cache.json"
        if not label.is_file():
            self._begin(label, wanted)
        known = files.read_json(label)
        if not isinstance(known, dict) or known.get("format") != FORMAT or known.get("schema") != SCHEMA:
            raise PrismError(f"The file {label} does not describe decoded frames of schema {SCHEMA}; delete it.")
        if {**known, "vae": None} != {**wanted, "vae": None} or str(known.get("vae")) not in vae_hashes(backbone):
            raise PrismError(f"The frames in {self.folder} were decoded by another VAE; choose another folder.")

    def _begin(self, label: Path, wanted: dict[str, Any]) -> None:
        """Make the folder and its label, unless something else is there. Other processes may be at the same."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            taken = any(
                path.suffix == ".npy" or (path.is_dir() and not temporary.NAME.fullmatch(path.name))
                for path in self.folder.iterdir()
            )
            if label.is_file():  # another process was first; whoever sees frames of its sees its label after them
                return
            if taken:
                raise PrismError(f"The folder {self.folder} holds something else than frames; choose another one.")
            files.write_json(label, wanted)
        except OSError as error:
            raise PrismError(
                f"Decoded frames cannot be kept in {self.folder}: {error.strerror or error}; choose another folder."
            ) from error

    def __call__(self, latents: Tensor) -> Tensor:
        """(B, T, H, W, 3) uint8 of latents (B, ...), as of `decode`."""
        return torch.stack([self._one(row) for row in latents])

    def __len__(self) -> int:
        """The number of videos kept."""
        return sum(1 for _ in self.folder.glob("*.npy"))

    def _one(self, latent: Tensor) -> Tensor:
        values = latent.detach().cpu().float().contiguous().numpy()
        name = hashlib.sha256(str(values.shape).encode() + values.tobytes()).hexdigest()[:32]
        path = self.folder / f"{name}.npy"
        if path.is_file():
            try:
                return torch.from_numpy(np.load(path, allow_pickle=False))
            except (OSError, ValueError, EOFError):  # damaged: decoded anew
                path.unlink(missing_ok=True)
        frames = decode(self.backbone, latent[None])[0]
        self.decoded += 1
        try:
            with files.new_file(path) as whole, whole.open("wb") as stream:
                np.save(stream, frames.numpy(), allow_pickle=False)
        except OSError as error:
            raise PrismError(
                f"Decoded frames cannot be kept in {self.folder}: {error.strerror or error}; make room and start "
                "again, what is decoded already is found again."
            ) from error
        return frames
