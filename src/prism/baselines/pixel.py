"""The pixel judge: a small video network that scores decoded frames for a prompt, as reward models do.

It is given a noisy latent like the judge on hidden states, decodes it with the backbone's VAE as if it were clean, and
looks at the frames. Convolutions shrink the frames to tokens, and a transformer reads them beside the backbone's own
text embeddings of the prompt. It works on any backbone and any frame size of at least 16 pixels.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from prism import files
from prism.backbone import Backbone
from prism.errors import PrismError
from prism.judge import Judge

FORMAT, SCHEMA = "prism-pixel-judge", 1
DECODE_ROWS = 8  # videos decoded at a time
_VAE = ("vae", "vae_config")


class _Block(nn.Module):
    """Residual block: space, then time (as planar convolutions, which CPUs are far better at)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.space = nn.Conv2d(width, width, 3, padding=1)
        self.time = nn.Conv2d(width, width, (3, 1), padding=(1, 0))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) to the same."""
        planes = F.gelu(self.norm(x)).transpose(1, 2).flatten(0, 1)
        seen = F.gelu(self.space(planes)).unflatten(0, (len(x), -1)).transpose(1, 2)
        return x + self.time(seen.flatten(3)).view_as(x)


class PixelNetwork(nn.Module):
    """Scores of videos.

    Args:
        text_width: width of the prompt's embeddings.
        num_dimensions: number of scores.
        width: half the channels after the stem; the transformer is four times as wide.
        layers: of the transformer.
        dropout: in the transformer and before the last layer.
    """

    def __init__(
        self, text_width: int, num_dimensions: int = 4, width: int = 48, layers: int = 3, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"text_width": text_width, "num_dimensions": num_dimensions, "width": width}
        self.options |= {"layers": layers, "dropout": dropout}
        wide = 4 * width
        # colours and where: x, y, time; every patch through a small network of its own
        self.stem = nn.Sequential(
            nn.Conv3d(6, 2 * width, (2, 8, 8), stride=(2, 8, 8)), nn.GELU(), nn.Conv3d(2 * width, 2 * width, 1)
        )
        self.middle = nn.Sequential(_Block(2 * width), _Block(2 * width))
        self.pool = nn.Conv3d(2 * width, wide, 2, stride=2)
        self.place = nn.Linear(3, wide)
        self.text = nn.Linear(text_width, wide)
        layer = nn.TransformerEncoderLayer(
            wide, max(1, wide // 32), 4 * wide, dropout, "gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Sequential(
            nn.LayerNorm(2 * wide), nn.Linear(2 * wide, wide), nn.GELU(), nn.Dropout(dropout),
            nn.Linear(wide, num_dimensions, bias=False),
        )  # fmt: skip

    def forward(self, videos: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, num_dimensions) of videos (B, T, H, W, 3) in [0, 1] and text (B, Lt, text_width); mask: True if real."""
        x = videos.permute(0, 4, 1, 2, 3) * 2 - 1
        x = torch.cat([x[:, :, :1], x], 2) if x.shape[2] % 2 else x
        grid = [torch.linspace(-1, 1, size, device=x.device) for size in x.shape[2:]]
        where = torch.stack(torch.meshgrid(*grid, indexing="ij")).expand(len(x), -1, -1, -1, -1)
        x = self.middle(self.stem(torch.cat([x, where], 1)))
        x = self.pool(F.pad(x, [pad for size in reversed(x.shape[2:]) for pad in (0, size % 2)]))
        grid = [torch.linspace(-1, 1, size, device=x.device) for size in x.shape[2:]]
        places = torch.stack(torch.meshgrid(*grid, indexing="ij"), -1).flatten(0, 2)
        tokens = x.flatten(2).transpose(1, 2) + self.place(places)
        both = torch.cat([tokens, self.text(text)], 1)
        unseen = None
        if mask is not None:
            unseen = torch.cat([mask.new_zeros(tokens.shape[:2]), ~mask], 1)
        read = self.transformer(both, src_key_padding_mask=unseen)[:, : tokens.shape[1]]
        return self.head(torch.cat([read.mean(1), read.amax(1)], 1)).float()


class PixelJudge:
    """Scores noisy latents by what they decode to; the counterpart of `prism.Judge`.

    Attributes:
        backbone: whose VAE decodes, and whose text embeddings tell the prompt.
        head: the network, float32.
        dimensions, eta, trained_on: as of `Judge`.
        name: "pixel", or "pixel-noisy" where noisy videos were among those it learned from.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: PixelNetwork,
        dimensions: Sequence[str],
        eta: float = 5.0,
        trained_on: Mapping[str, Any] | None = None,
        name: str = "pixel",
    ) -> None:
        self.backbone, self.head = backbone, head.to(backbone.device)
        self.dimensions, self.eta, self.name = tuple(dimensions), float(eta), name
        self.trained_on = dict(trained_on or {})

    @classmethod
    def untrained(cls, pipe: Any, dimensions: Sequence[str], seed: int = 0, name: str = "pixel", **options: Any) -> Any:
        """A judge with a fresh network; `options` as of `PixelNetwork`. The global random state is left alone."""
        backbone = pipe if isinstance(pipe, Backbone) else Backbone(pipe)
        width = backbone.condition(["a"]).arguments["encoder_hidden_states"].shape[-1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = PixelNetwork(width, len(dimensions), **options)
        return cls(backbone, network, dimensions, name=name)

    # -- using it

    def text(self, prompts: Sequence[str], **call: Any) -> tuple[Tensor, Tensor | None]:
        """The backbone's embeddings of prompts (B, Lt, text_width) and which are real (B, Lt), or None for all."""
        embeddings = self.backbone.condition(prompts, **call).arguments["encoder_hidden_states"]
        mask = self.backbone.family.text_mask(embeddings)
        return embeddings.float(), mask

    @torch.no_grad()
    def score_videos(self, videos: Tensor, prompts: str | Sequence[str], **call: Any) -> Tensor:
        """(B, num_dimensions) of videos (B, T, H, W, 3) in [0, 1]."""
        names = [prompts] * len(videos) if isinstance(prompts, str) else list(prompts)
        if len(names) != len(videos):
            raise PrismError(f"There must be a prompt for each video; found {len(names)} for {len(videos)}.")
        text, mask = self.text(names, **call)
        self.head.eval()
        return self.head(videos.to(self.backbone.device).float(), text, mask)

    @torch.no_grad()
    def score(self, noisy_latents: Tensor, prompts: str | Sequence[str], t: float | Tensor, **call: Any) -> Tensor:
        """Scores of latents at noise level t, decoded as they are; arguments as of `Judge.score`. t is ignored."""
        names = [prompts] * len(noisy_latents) if isinstance(prompts, str) else list(prompts)
        if len(names) != len(noisy_latents):
            raise PrismError(f"There must be a prompt for each latent; found {len(names)} for {len(noisy_latents)}.")
        scores = []
        for start in range(0, len(names), DECODE_ROWS):
            rows = slice(start, start + DECODE_ROWS)
            scores.append(self.score_videos(self.backbone.decode(noisy_latents[rows]), names[rows], **call))
        return torch.cat(scores)

    score_clean = Judge.score_clean  # the same draws of noise, around this class's own `score`

    # -- on disk

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], pipe: Any) -> PixelJudge:
        """Put a saved pixel judge onto a backbone. Raises PrismError for a damaged folder or another VAE."""
        folder, backbone = Path(folder), pipe if isinstance(pipe, Backbone) else Backbone(pipe)
        config = files.read_json(folder / "config.json")
        if not isinstance(config, dict) or config.get("format") != FORMAT or config.get("schema") != SCHEMA:
            raise PrismError(f"The file {folder / 'config.json'} does not describe a pixel judge of schema {SCHEMA}.")
        found = backbone.fingerprint()
        for field in _VAE:
            if config["backbone"].get(field) != found[field]:
                raise PrismError(
                    f"The pixel judge in {folder} was trained on frames of the VAE {config['backbone'].get('vae')}, "
                    f"this pipeline has {found['vae']}{' of another configuration' if field == 'vae_config' else ''}; "
                    "load the backbone it was trained on."
                )
        network = PixelNetwork(**config["network"])
        tensors = files.load_safetensors(folder / "model.safetensors")
        wanted = network.state_dict()
        if tensors.keys() != wanted.keys() or any(tensors[name].shape != wanted[name].shape for name in wanted):
            raise PrismError(f"The file {folder / 'model.safetensors'} does not hold this network's weights.")
        network.load_state_dict({name: value.float() for name, value in tensors.items()})
        return cls(backbone, network.eval(), config["dimensions"], config["eta"], config["trained_on"], config["name"])

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
            "trained_on": self.trained_on,
        }
        with files.new_folder(Path(folder), overwrite) as temporary:
            half = {name: value.detach().half().contiguous() for name, value in self.head.state_dict().items()}
            save_file(half, temporary / "model.safetensors")
            files.write_json(temporary / "config.json", config)
            (temporary / "README.md").write_text(_card(self))


def _card(judge: PixelJudge) -> str:
    count = sum(p.numel() for p in judge.head.parameters())
    noisy = " and decoded noisy latents" if judge.name == "pixel-noisy" else ""
    return (
        f"# PRISM pixel judge ({judge.name})\n\nA video network of {count / 1e6:.1f} million parameters that scores"
        f" decoded frames for a prompt: {', '.join(judge.dimensions)}. Trained on decoded videos{noisy}; only differences"
        " within a prompt mean something. It is what the judge on hidden states is compared with, not meant to be used"
        " instead.\n\n```python\nfrom prism.baselines import PixelJudge\n\n"
        "judge = PixelJudge.from_pretrained(folder, pipe)\n```\n"
    )
