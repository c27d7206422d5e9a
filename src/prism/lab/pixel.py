"""The pixel judge: a small video network that scores decoded frames for a prompt, as reward models do."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from prism import files, runs, video
from prism.backbone import Backbone, Conditioning, Ragged
from prism.backbone.fingerprint import fits, vae_hash, vae_hashes
from prism.errors import PrismError, number, whole
from prism.judge import Judge
from prism.judge import saved as folders

_PROMPT_WIDTH = 64  # width of the prompt's summary, which scales and shifts channels (FiLM, Perez et al. 2018)


class _Block(nn.Module):
    """Residual block of two 2D convolutions; the first sees neighbouring frames, and the prompt acts on its output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.film = nn.Linear(_PROMPT_WIDTH, 2 * width)
        self.scale = nn.Parameter(torch.ones(width, 1, 1))
        for parameter in self.film.parameters():  # at first the prompt changes nothing
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, frames: int, prompt: Tensor) -> Tensor:
        """(B * frames, C, H, W) to the same shape; prompt: (B, 64), a summary of the text."""
        # One number per video: normalising each frame or channel would hide what judges look for, such as flicker.
        power = x.float().unflatten(0, (-1, frames)).square().mean((1, 2, 3, 4)).repeat_interleave(frames)
        y = x * (power + 1e-6).rsqrt().to(x.dtype)[:, None, None, None] * self.scale.to(x.dtype)
        y = self.first(_shift(F.relu(y), frames))
        scale, bias = self.film(prompt).repeat_interleave(frames, 0)[..., None, None].chunk(2, 1)
        return x + self.second(F.relu(y * (1 + scale) + bias))


def _shift(x: Tensor, frames: int) -> Tensor:
    """Take a quarter of the channels from the frame before and a quarter from the frame after; zeros at the ends."""
    part, videos = x.shape[1] // 4, x.unflatten(0, (-1, frames))
    before = F.pad(videos[:, :-1, :part], (0, 0, 0, 0, 0, 0, 1, 0))
    after = F.pad(videos[:, 1:, part : 2 * part], (0, 0, 0, 0, 0, 0, 0, 1))
    shifted = torch.cat([before, after, videos[:, :, 2 * part :]], 2).flatten(0, 1)
    return shifted.contiguous(memory_format=torch.channels_last)


class PixelNetwork(nn.Module):
    """Scores of videos of any length, with frames of at least 16 pixels per side.

    Args:
        text_width: width of the prompt's embeddings.
        num_dimensions: number of scores.
        width: channels at a quarter of the frames' size, a multiple of 8. There are twice as many at an eighth, and
            three times as many in the transformer.
        layers: of the transformer.
        dropout: in the transformer's outputs and around the last layers.
    """

    def __init__(
        self, text_width: int, num_dimensions: int = 4, width: int = 64, layers: int = 2, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"text_width": text_width, "num_dimensions": num_dimensions, "width": width}
        self.options |= {"layers": layers, "dropout": dropout}
        wide = 3 * width
        self.said = nn.Sequential(nn.Linear(text_width, _PROMPT_WIDTH), nn.ReLU())
        self.stem = nn.Conv2d(8, width, 4, stride=4)  # colours of two frames, and the coordinates x and y
        self.fine = nn.ModuleList([_Block(width)])
        self.down = nn.Conv2d(width, 2 * width, 2, stride=2)
        self.coarse = nn.ModuleList([_Block(2 * width), _Block(2 * width)])
        self.pool = nn.Conv3d(2 * width, wide, 2, stride=2)
        self.place = nn.Linear(3, wide)
        self.text = nn.Linear(text_width, wide)
        layer = nn.TransformerEncoderLayer(
            wide, max(1, wide // 32), 4 * wide, dropout, "relu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        for each in self.transformer.layers:
            each.self_attn.dropout = 0.0  # random numbers for every attention weight cost more than they help
        summary = 2 * wide + 4 * width
        self.norm = nn.LayerNorm(2 * wide)
        self.head = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(summary, 2 * width), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(2 * width, num_dimensions, bias=False),
        )  # fmt: skip

    def forward(self, videos: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, num_dimensions) of videos (B, T, H, W, 3) in [0, 1] and text (B, Lt, text_width); mask: True if real."""
        real = text.new_ones(text.shape[:2], dtype=torch.bool) if mask is None else mask
        prompt = self.said((text * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1))

        rows, coordinates = len(videos), _grid(videos.shape[2:4], videos).permute(2, 0, 1)
        x = _even(videos * 2 - 1, 1).unflatten(1, (-1, 2)).permute(0, 1, 2, 5, 3, 4).flatten(2, 3)  # (B, T/2, 6, H, W)
        frames, x = x.shape[1], x.flatten(0, 1)
        x = torch.cat([x, coordinates.expand(len(x), -1, -1, -1)], 1).contiguous(memory_format=torch.channels_last)
        x = self.stem(x)
        for block in self.fine:
            x = block(x, frames, prompt)
        x = self.down(_even(_even(x, 2), 3))
        for block in self.coarse:
            x = block(x, frames, prompt)
        x = x.unflatten(0, (rows, frames)).transpose(1, 2)
        skipped = [x.mean((2, 3, 4)), x.amax((2, 3, 4))]  # past the transformer to the head, which learns from it first
        for axis in (2, 3, 4):
            x = _even(x, axis)
        x = self.pool(x)

        tokens = x.flatten(2).transpose(1, 2) + self.place(_grid(x.shape[2:], videos).flatten(0, 2))
        seen = tokens.shape[1]
        unreal = torch.cat([real.new_zeros(rows, seen), ~real], 1)
        read = self.transformer(torch.cat([tokens, self.text(text)], 1), src_key_padding_mask=unreal)[:, :seen]
        return self.head(torch.cat([self.norm(torch.cat([read.mean(1), read.amax(1)], 1)), *skipped], 1)).float()


def _grid(sizes: torch.Size, like: Tensor) -> Tensor:
    """Coordinates in [-1, 1] of every cell of a grid, (*sizes, len(sizes))."""
    axes = [torch.linspace(-1, 1, size, device=like.device) for size in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


def _even(x: Tensor, axis: int) -> Tensor:
    """Make an odd axis even by repeating its first entry; in time, a causal VAE encodes the first frame by itself."""
    return torch.cat([x.narrow(axis, 0, 1), x], axis) if x.shape[axis] % 2 else x


FORMAT, SCHEMA = "prism-pixel-judge", 1
_SIZES = {"text_width": 2**20, "width": 4096, "layers": 256}  # the largest that a file may ask for
ROWS = 16  # videos that the network looks at together


def checked_prompts(noisy_latents: Tensor, prompts: str | Sequence[str]) -> list[str]:
    """A prompt per latent. Raises PrismError for another number of them, and for latents that are not finite."""
    names = [prompts] * len(noisy_latents) if isinstance(prompts, str) else list(prompts)
    if len(names) != len(noisy_latents):
        raise PrismError(f"There must be a prompt for each latent; found {len(names)} for {len(noisy_latents)}.")
    bad = ~noisy_latents.flatten(1).isfinite().all(1)  # frames of 8 bits would hide it
    if bool(bad.any()):
        raise PrismError(f"Row {int(bad.nonzero()[0])} has no finite score; its latents hold NaN or infinity.")
    return names


def decode(backbone: Backbone, latents: Tensor) -> Tensor:
    """Latents (B, ...), noisy or not, decoded as they are: (B, T, H, W, 3) uint8.

    They are decoded one by one, so that a video's bytes do not depend on the other videos of the batch.
    """
    return torch.cat([(backbone.decode(row) * 255).round().to(torch.uint8).cpu() for row in latents.split(1)])


class PixelJudge:
    """Scores noisy latents by their decoded frames; the counterpart of `prism.Judge`.

    Attributes:
        backbone: its VAE decodes, and its text embeddings represent the prompt.
        head: the network, float32.
        dimensions, eta, trained_on: as of `Judge`.
        name: "pixel", or "pixel-noisy" if it was also trained on noisy videos.
        frames: decodes latents as `decode` does, from a cache (`prism.lab.pixel_training.DecodedCache`); None: no
            cache. Scores are the same.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: PixelNetwork,
        dimensions: Sequence[str],
        eta: float = 5.0,
        trained_on: Mapping[str, Any] | None = None,
        name: str = "pixel",
        frames: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.backbone, self.head = backbone, head.to(backbone.device)
        self.dimensions, self.eta, self.name = tuple(dimensions), float(eta), name
        self.trained_on, self.frames = dict(trained_on or {}), frames

    @classmethod
    def untrained(
        cls,
        pipe: Any,
        dimensions: Sequence[str],
        seed: int = 0,
        name: str = "pixel",
        call: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> PixelJudge:
        """A judge with a fresh network; `options` as of `PixelNetwork`. The global random state is left alone.

        call: arguments of the pipeline's call, without which some pipelines refuse to run (an image).
        """
        backbone = pipe if isinstance(pipe, Backbone) else Backbone(pipe)
        prompt = "a" if backbone.family.takes_prompts else ""
        width = backbone.denoiser_call(backbone.condition([prompt], **(call or {}))[0].arguments).text.shape[-1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = PixelNetwork(width, len(dimensions), **options)
        return cls(backbone, network, dimensions, name=name)

    # -- using it

    def text(self, prompts: Sequence[str], **call: Any) -> tuple[Tensor, Tensor | None]:
        """The backbone's embeddings (B, Lt, text_width) of prompts, and the mask (B, Lt) of real tokens; None: all."""
        return self.text_of(self.backbone.condition(prompts, **call))

    def text_of(self, conditioning: Conditioning | Ragged) -> tuple[Tensor, Tensor | None]:
        """The same as `text`, from a conditioning of B rows."""
        if not isinstance(conditioning, Conditioning):
            raise PrismError("A pixel judge needs texts of one length, and this pipeline trims them; use another one.")
        call = self.backbone.denoiser_call(conditioning.arguments)
        return call.text.float(), call.text_mask

    @torch.no_grad()
    def score_videos(self, videos: Any, prompts: str | Sequence[str], **call: Any) -> Tensor:
        """(B, num_dimensions) of videos (B, T, H, W, 3) in [0, 1], or what else `prism.video.videos` takes."""
        videos = torch.from_numpy(video.videos(videos))
        names = [prompts] * len(videos) if isinstance(prompts, str) else list(prompts)
        if len(names) != len(videos):
            raise PrismError(f"There must be a prompt for each video; found {len(names)} for {len(videos)}.")
        text, mask = self.text(names, **call)
        self.head.eval()
        scores = self.head(videos.to(self.backbone.device), text, mask)
        bad = ~scores.isfinite().all(1)
        if bool(bad.any()):
            raise PrismError(f"Row {int(bad.nonzero()[0])} has no finite score; its weights may be damaged.")
        return scores

    @torch.no_grad()
    def score(self, noisy_latents: Tensor, prompts: str | Sequence[str], t: float | Tensor, **call: Any) -> Tensor:
        """Scores of latents at noise level t, decoded as they are; arguments as of `Judge.score`. t is ignored.

        Frames are rounded to 8 bits, as in a video file.
        """
        return _of_frames([self], noisy_latents, prompts, call)

    score_clean = Judge.score_clean  # the same draws of noise, around this class's own `score`

    # -- on disk

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], pipe: Any, frames: Callable[[Tensor], Tensor] | None = None
    ) -> PixelJudge:
        """Put a saved pixel judge onto a backbone. Raises PrismError for a damaged folder or another VAE.

        Args:
            folder: written by `save_pretrained`.
            pipe: a diffusers pipeline or a `Backbone`.
            frames: cache of decoded frames; judges that are measured on the same videos should share it.
        """
        folder, backbone = Path(folder), pipe if isinstance(pipe, Backbone) else Backbone(pipe)
        path, weights = folder / "config.json", folder / "model.safetensors"
        config = files.read_json(path)
        if not isinstance(config, dict) or config.get("format") != FORMAT or config.get("schema") != SCHEMA:
            raise PrismError(f"The file {path} does not describe a pixel judge of schema {SCHEMA}.")
        dimensions, eta, trained_on, _ = folders.described(config, path)
        name = folders.field(config, "name", str, path)
        network = _network(folders.field(config, "network", dict, path), len(dimensions), path)
        shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
        header = files.safetensors_header(weights)
        if {name: shape for name, (_, shape) in header.items()} != shapes or not all(
            dtype in folders.DTYPES for dtype, _ in header.values()
        ):
            raise PrismError(f"The file {weights} does not hold this network's weights.")
        _check_vae(folder, config, backbone)
        tensors = files.load_safetensors(weights)
        network.load_state_dict({n: value.to(torch.float32, copy=True) for n, value in tensors.items()}, assign=True)
        return cls(backbone, network.eval(), dimensions, eta, trained_on, name, frames)

    def save_pretrained(self, folder: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write config.json, model.safetensors (half precision) and README.md as a folder that appears whole."""
        config = {
            "format": FORMAT,
            "schema": SCHEMA,
            "name": self.name,
            "network": self.head.options,
            "dimensions": list(self.dimensions),
            "eta": self.eta,
            "backbone": self.backbone.fingerprint(),
            "vae_weights": vae_hash(self.backbone),
            "trained_on": self.trained_on,
        }
        with runs.new(folder, overwrite, FORMAT) as temporary:
            half = {name: value.detach().half().contiguous() for name, value in self.head.state_dict().items()}
            save_file(half, temporary / "model.safetensors")
            files.write_json(temporary / "config.json", config)
            (temporary / "README.md").write_text(_card(self))


class JointPixelJudge:
    """Pixel judges on one VAE that decode each latent once; the scores of one stand after those of another."""

    name = "pixel judges"

    def __init__(self, judges: Sequence[PixelJudge]) -> None:
        first, self.judges = judges[0], tuple(judges)
        self.backbone, self.eta, self.trained_on = first.backbone, first.eta, dict(first.trained_on)
        self.dimensions = tuple(f"{k}/{name}" for k, judge in enumerate(judges) for name in judge.dimensions)

    @torch.no_grad()
    def score(self, noisy_latents: Tensor, prompts: str | Sequence[str], t: float | Tensor, **call: Any) -> Tensor:
        """(B, scores) of latents at noise level t; arguments as of `PixelJudge.score`."""
        return _of_frames(self.judges, noisy_latents, prompts, call)


def _of_frames(
    judges: Sequence[PixelJudge], latents: Tensor, prompts: str | Sequence[str], call: Mapping[str, Any]
) -> Tensor:
    """(B, scores) of latents that are decoded once for all judges, a few at a time."""
    names, scores, first = checked_prompts(latents, prompts), [], judges[0]
    for start in range(0, len(names), ROWS):
        rows = slice(start, start + ROWS)
        frames = decode(first.backbone, latents[rows]) if first.frames is None else first.frames(latents[rows])
        videos = frames.float() / 255
        scores.append(torch.cat([judge.score_videos(videos, names[rows], **call) for judge in judges], 1))
    return torch.cat(scores)


def _network(options: Mapping[str, Any], num_dimensions: int, path: Path) -> PixelNetwork:
    """A network without weights, at the size that its options say."""
    if options.keys() != {*_SIZES, "num_dimensions", "dropout"} or options["num_dimensions"] != num_dimensions:
        raise PrismError(f"The field 'network' of {path} does not describe a network of {num_dimensions} scores.")
    field = lambda name: f"The field 'network.{name}' of {path}"  # noqa: E731
    sizes = {name: whole(field(name), options[name], 1, most) for name, most in _SIZES.items()}
    dropout = number(field("dropout"), options["dropout"], 0.0, 1.0)
    try:
        with torch.device("meta"):  # no memory
            return PixelNetwork(**sizes, num_dimensions=num_dimensions, dropout=dropout)
    except AssertionError as error:  # attention heads that do not divide the width
        raise PrismError(f"{field('width')} is {sizes['width']}, of which no network is made.") from error


def _check_vae(folder: Path, config: Mapping[str, Any], backbone: Backbone) -> None:
    """Refuse another VAE; warn of one with other settings or weights."""
    refusals, differences = fits(config.get("backbone") or {}, backbone, ("vae",))
    for trained, present in refusals:
        raise PrismError(
            f"The pixel judge in {folder} was trained on frames of the {trained}, this pipeline has {present}; load "
            "the backbone it was trained on."
        )
    if str(config.get("vae_weights")) not in vae_hashes(backbone):
        differences.append("a VAE with other weights")
    for clause in differences:
        warnings.warn(
            f"The pixel judge in {folder} was trained on frames of {clause}; check its accuracy on this backbone "
            "before relying on it.",
            stacklevel=3,
        )


def _card(judge: PixelJudge) -> str:
    count = sum(p.numel() for p in judge.head.parameters())
    noisy = " and decoded noisy latents" if judge.name == "pixel-noisy" else ""
    return (
        f"# PRISM pixel judge ({judge.name})\n\nA video network of {count / 1e6:.1f} million parameters that scores"
        f" decoded frames for a prompt: {', '.join(judge.dimensions)}. Trained on decoded videos{noisy}; only"
        " differences within a prompt mean something. It is what the judge on hidden states is compared with, not"
        " meant to be used instead.\n\n```python\nfrom prism.lab.pixel import PixelJudge\n\n"
        "judge = PixelJudge.from_pretrained(folder, pipe)\n```\n"
    )
