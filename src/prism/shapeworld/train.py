"""Train ShapeWorld's generator from scratch: first the VAE, then transformer and text encoder together on its latents.

Every batch follows from (seed, step), so that a run that was killed continues from its last checkpoint with the same
results."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from prism import files, runs
from prism.errors import SEEDS, PrismError, number, whole
from prism.shapeworld import CALL, generator, world
from prism.team import Team

SHIFT = 3.0  # moves the noise levels of training towards noise
DECAY = 0.3  # the learning rate falls over this last share of the steps


def _step_seed(seed: int, step: int, team: Team) -> int:
    """A seed that is different for each step and process."""
    return seed + step * team.size + team.rank


def fit(
    modules: dict[str, nn.Module],
    loss_at: Callable[[int], Tensor],
    folder: Path,
    steps: int,
    learning_rate: float,
    matrix_rate: float = 0.0,
    snapshots: Sequence[int] = (),
    ema_decay: float = 0.999,
    checkpoint_every: int = 250,
    warmup: int = 100,
    *,
    team: Team | None = None,
) -> None:
    """Train `modules` with AdamW: warm-up, a linear decay over the last 30 % of the steps, gradients clipped to norm 1,
    an EMA of the weights, a log, and checkpoints from which a run resumes.

    `loss_at(step)` returns the loss of one batch. With a `matrix_rate`, Muon trains the matrices inside blocks at that
    learning rate: it reaches the same loss in about half of AdamW's steps. At the end `modules` hold the EMA.
    `folder/checkpoint.safetensors` is the last checkpoint; `folder/step-N.safetensors` is the EMA after step N, for
    each N in `snapshots`."""
    team = team or Team()
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"{m}.{n}": p for m, module in modules.items() for n, p in module.named_parameters() if p.requires_grad}
    team.share(weights.values())
    averages = {name: p.detach().clone() for name, p in weights.items()}
    in_blocks = {name for name, p in weights.items() if matrix_rate and p.ndim == 2 and ".blocks." in name}
    rest = [p for name, p in weights.items() if name not in in_blocks]
    rated: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01), learning_rate)
    ]
    if in_blocks:
        matrices = [weights[name] for name in sorted(in_blocks)]
        muon = torch.optim.Muon(matrices, lr=matrix_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        rated.append((muon, matrix_rate))
    moments = {name: ("momentum_buffer",) if name in in_blocks else ("exp_avg", "exp_avg_sq") for name in weights}
    states = {name: rated[name in in_blocks][0].state for name in weights}
    checkpoint, first = folder / "checkpoint.safetensors", 0
    if checkpoint.exists():
        saved = files.load_safetensors(checkpoint)
        first = int(saved["step"])
        for name, p in weights.items():
            p.data.copy_(saved[f"weight/{name}"])
            averages[name].copy_(saved[f"average/{name}"])
            states[name][p] = {key: saved[f"moment/{key}/{name}"] for key in moments[name]}
            if name not in in_blocks:
                states[name][p]["step"] = torch.tensor(float(first))

    log, losses, started = folder / "log.jsonl", [], time.time()
    if team.first:
        _cut_log(log, first)
    quiet = None if team.first else True
    for step in tqdm(range(first, steps), initial=first, total=steps, disable=quiet, desc=folder.name):
        pace = min(1.0, (step + 1) / warmup, 0.01 + (steps - step) / (DECAY * steps))
        for optimiser, rate in rated:
            optimiser.param_groups[0]["lr"] = rate * pace
            optimiser.zero_grad(set_to_none=True)
        loss = loss_at(step)
        loss.backward()
        gradients = [p.grad for p in weights.values() if p.grad is not None]
        team.add_up(gradients)
        torch._foreach_div_(gradients, team.size)
        nn.utils.clip_grad_norm_(weights.values(), 1.0)
        for optimiser, _ in rated:
            optimiser.step()
        # Not diffusers' EMAModel: with inv_gamma 9, power 1 and update_after_step -1 it has the same decay, but its
        # sums differ in the last bit. Not LambdaLR: resuming it takes more lines than setting "lr" above.
        decay = min(ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(averages.values()), [p.detach() for p in weights.values()], 1 - decay)
        losses.append(loss.item())
        if not team.first:  # the first process alone writes the log and the checkpoints
            continue
        if (step + 1) % 50 == 0:
            row = {"step": step + 1, "loss": sum(losses) / len(losses), "seconds": round(time.time() - started, 1)}
            row["processes"] = team.size
            with log.open("a") as file:
                print(json.dumps(row), file=file)
            losses = []
        if step + 1 in snapshots:
            with files.new_file(folder / f"step-{step + 1}.safetensors") as path:
                save_file(averages, path)
        if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
            state = {"step": torch.tensor(step + 1)}
            for name, p in weights.items():
                state |= {f"weight/{name}": p.detach(), f"average/{name}": averages[name]}
                state |= {f"moment/{key}/{name}": states[name][p][key] for key in moments[name]}
            with files.new_file(checkpoint) as path:
                save_file({key: value.contiguous() for key, value in state.items()}, path)
    for name, p in weights.items():
        p.data.copy_(averages[name])


def _cut_log(path: Path, step: int) -> None:
    """Drop the rows after `step` from the log: a killed run repeats the steps since its checkpoint."""
    rows = path.read_text().splitlines(keepends=True) if path.is_file() else []
    earlier = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= step]
    with files.new_file(path) as whole:
        whole.write_text("".join(earlier))


def train_vae(folder: Path, config: PartConfig, device: str, team: Team) -> None:
    """Fit the encoder in closed form, train the decoder by regression on latents with a little noise; write
    `folder/vae`.

    Where `config.start` names the folder of an earlier VAE, its encoder stays as it is and its decoder is trained
    further.
    """
    seed, batch_size = config.seed, config.batch_size
    torch.manual_seed(seed)
    vae = _with_encoder(folder, config, team)
    code = generator.LinearCode.of(vae)
    vae.requires_grad_(False).to(device)
    decoder = vae.decoder.requires_grad_(True)
    if not config.start and not (folder / "checkpoint.safetensors").exists():
        with torch.no_grad():  # start with no residual branches and nearly grey outputs
            for module in decoder.modules():
                if hasattr(module, "conv2"):
                    module.conv2.weight.zero_()
            decoder.conv_out.weight.mul_(0.1)
            decoder.conv_out.bias.zero_()

    def loss_at(step: int) -> Tensor:
        chance = torch.Generator().manual_seed(_step_seed((seed + 1) * 1_000_003, step, team))
        video, _ = world.sample(batch_size, _step_seed(seed * 7_919, step, team))
        pixels = generator.to_input(video).to(device)
        latents = code(video)
        latents = (latents + 0.05 * torch.randn(latents.shape, generator=chance)).to(device)
        target = patchify(pixels, vae.config.patch_size)
        with torch.autocast(device_type=torch.device(device).type, dtype=torch.bfloat16):
            output = generator.decode_unclamped(vae, latents)
        error = output.float() - target
        return error.square().mean() + 0.1 * error.abs().mean()

    fit({"decoder": decoder}, loss_at, folder, config.steps, config.learning_rate, team=team)
    if team.first:
        _save(vae.to("cpu"), folder / "vae")


def _with_encoder(folder: Path, config: PartConfig, team: Team) -> AutoencoderKLWan:
    """The VAE with a fitted encoder, from `folder/fitted`, which is made where it is missing.

    Fitting takes about a minute on one core; other processes wait meanwhile."""

    def make(fitted: Path) -> None:
        torch.manual_seed(config.seed)
        if config.start:
            vae = AutoencoderKLWan.from_pretrained(config.start).float()
        else:
            vae = generator.build()
            print(f"The linear code loses {generator.fit_encoder(vae, config.seed):.1%} of the pixels' variance.")
        vae.save_pretrained(fitted)

    team.on_first(lambda: runs.Parts(folder).piece("fitted/", make))
    return AutoencoderKLWan.from_pretrained(folder / "fitted")


def _latent_pool(
    folder: Path, code: generator.LinearCode, videos: int, seed: int, team: Team
) -> tuple[Tensor, list[str]]:
    """Latents of `videos` random clean videos, in half precision, and their prompts, from `folder/latents.safetensors`,
    which is made where it is missing.
    """

    def make(path: Path) -> None:
        latents, prompts, chunk = [], [], 250
        for start in tqdm(range(0, videos, chunk), disable=None, desc="rendering"):
            video, names = world.sample(min(chunk, videos - start), seed * 7_919 + start)
            latents.append(code(video).half())
            prompts += names
        save_file({"latents": torch.cat(latents).contiguous()}, path, metadata={"prompts": json.dumps(prompts)})

    team.on_first(lambda: runs.Parts(folder).piece("latents.safetensors", make))
    with safe_open(folder / "latents.safetensors", "pt") as file:
        return file.get_tensor("latents"), json.loads(file.metadata()["prompts"])


def train_transformer(
    folder: Path, vae_folder: Path, config: PartConfig, device: str, team: Team, pool: Path | None = None
) -> None:
    """Train transformer and text encoder by flow matching on the VAE's latents; write `folder/transformer` and
    `folder/text_encoder`.

    Sigma is logit-normal with a shift of 3; 15 % of the prompts are dropped for classifier-free guidance.
    Where `config.start` names the folder of such a pair, training goes on from its weights.
    pool: folder in which trainings of one VAE, seed and number of videos share their latents; None: `folder`.
    """
    seed, batch_size = config.seed, config.batch_size
    torch.manual_seed(seed)
    vae = _with_encoder(vae_folder, DEFAULTS["vae"], team)  # the decoder is not needed
    latents, prompts = _latent_pool(pool or folder, generator.LinearCode.of(vae), config.videos, seed, team)
    if config.start:
        transformer, text_encoder = generator.load_generator(Path(config.start))
    else:
        transformer = generator.build_transformer(config.layers, config.heads, vae.config.z_dim)
        text_encoder = generator.build_text_encoder()
    transformer, text_encoder = transformer.to(device).train(), text_encoder.to(device).train()
    tokenizer = generator.tokenizer()

    def loss_at(step: int) -> Tensor:
        chance = torch.Generator().manual_seed(_step_seed((seed + 2) * 1_000_003, step, team))
        rows = torch.randint(len(latents), (batch_size,), generator=chance)
        clean = latents[rows].float().to(device)
        dropped = torch.rand(batch_size, generator=chance) < 0.15
        tokens = tokenizer(
            ["" if drop else prompt for prompt, drop in zip([prompts[i] for i in rows], dropped, strict=True)],
            padding="max_length",
            max_length=generator.TEXT_LENGTH,
            return_tensors="pt",
        ).to(device)
        text = (
            text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state * tokens.attention_mask[..., None]
        )
        level = torch.sigmoid(torch.randn(batch_size, generator=chance))
        level = (SHIFT * level / (1 + (SHIFT - 1) * level)).to(device)
        noise = torch.randn(clean.shape, generator=chance).to(device)
        sigma = level.view(-1, 1, 1, 1, 1)
        noisy = (1 - sigma) * clean + sigma * noise
        # On a CPU float32 is faster.
        with torch.autocast("cuda", torch.bfloat16, enabled=torch.device(device).type == "cuda"):
            output = transformer(noisy, level * 1000, text, return_dict=False)[0]
        return (output.float() - (noise - clean)).square().mean()

    modules = {"transformer": transformer, "text_encoder": text_encoder}
    rates = config.learning_rate, config.matrix_rate
    fit(modules, loss_at, folder, config.steps, *rates, config.snapshots, team=team)
    if team.first:
        _save(transformer.to("cpu"), folder / "transformer")
        _save(text_encoder.to("cpu"), folder / "text_encoder")


def _save(model: Any, folder: Path) -> None:
    with files.new_folder(folder, overwrite=True) as temporary:
        model.save_pretrained(temporary)


PARTS = ("vae", "transformer")


@dataclass(frozen=True)
class PartConfig:
    """Settings of one part of the training; see `DEFAULTS`.

    `start`: folder of weights to start from: a VAE, whose encoder is kept, or a transformer and its text encoder.
    `matrix_rate`, `snapshots`: see `fit`. `layers`, `heads`: size of the transformer. `videos`: number of clean videos
    that it learns from, rendered once."""

    steps: int
    batch_size: int
    learning_rate: float
    seed: int = 0
    videos: int = 40_000
    matrix_rate: float = 0.0
    layers: int = 6
    heads: int = 4
    snapshots: tuple[int, ...] = ()
    start: str = ""


DEFAULTS = {
    "vae": PartConfig(steps=4000, batch_size=8, learning_rate=1.5e-3),
    "transformer": PartConfig(
        steps=16000, batch_size=32, learning_rate=1e-3, matrix_rate=7e-3, snapshots=(500, 1000, 2000, 4000, 8000)
    ),
}


def run(
    out: Path, part: str = "all", device: str = "cpu", resume: bool = False, pool: Path | None = None, **settings: Any
) -> None:
    """Train a part (`vae`, `transformer`) or both (`all`) in `out`; once both are trained, write `out/pipeline`.

    `settings` are fields of `PartConfig`; None takes the part's default. Each part keeps its settings, log and last
    checkpoint in `out/<part>`. With `resume`, a run that was stopped continues from its checkpoint, if the learning
    rate has not begun to fall also with another number of steps. `pool`: see `train_transformer`. Raises PrismError for
    an unknown part, settings out of range, or a folder of another run."""
    if part not in (*PARTS, "all"):
        raise PrismError(f"The part is {part!r}: use vae, transformer or all.")
    team = Team.gathered(device)
    configs: dict[str, PartConfig] = {}
    claims: list[runs.Parts] = []  # held until both are trained
    for name in PARTS if part == "all" else (part,):
        config = replace(DEFAULTS[name], **{key: value for key, value in settings.items() if value is not None})
        most = {"steps": 10**8, "batch_size": 10**5, "layers": 1000, "heads": 1000, "videos": 10**8}
        for key, high in most.items():
            whole(f"The {key} of a training run", getattr(config, key), 1, high)
        number("The learning_rate of a training run", config.learning_rate, 0, 100, above=True)
        whole("The seed of a training run", config.seed, 0, SEEDS)
        needed = {"vae": ("",), "transformer": ("transformer", "text_encoder")}[name]
        paths = [Path(config.start, folder, "config.json") for folder in needed if config.start]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise PrismError(f"The --start {config.start} holds no {name} ({missing[0]} is missing); name another.")
        configs[name] = config
    team.on_first(lambda: claims.extend(_claim(out / name, config, resume) for name, config in configs.items()))
    if "vae" in configs:
        train_vae(out / "vae", configs["vae"], device, team)
    if "transformer" in configs:
        train_transformer(out / "transformer", out / "vae", configs["transformer"], device, team, pool)
    made = ("vae/vae", "transformer/transformer", "transformer/text_encoder")
    if team.first and all(map(runs.Parts(out).has, made)):
        save_pipeline(out, out / "pipeline")


def _claim(folder: Path, config: PartConfig, resume: bool) -> runs.Parts:
    """Claim a part's folder: refuse another run's, write the settings of a new run, and the new number of steps of a
    resumed one.
    """
    saved, settings = folder / "config.json", {"command": "shapeworld train", **asdict(config)}
    claim = runs.claim(folder, settings, resume, changeable=("steps",), besides=("fitted",))  # by either part
    if claim.resumed:
        steps = files.read_json(saved)["steps"]
        checkpoint = folder / "checkpoint.safetensors"
        if steps != config.steps and checkpoint.is_file():
            done = int(files.load_safetensors(checkpoint)["step"])
            if done > (1 - DECAY) * min(steps, config.steps):
                raise PrismError(
                    f"The run in {folder} is at step {done} of {steps}, where the learning rate falls already; "
                    f"it cannot go on to {config.steps} steps. Resume it with --steps {steps}."
                )
        files.write_json(saved, settings)
    return claim


def save_pipeline(out: Path, folder: Path) -> None:
    """Save the trained parts of `out` as a diffusers pipeline in half precision, with `call.json` and the settings of
    both parts.
    """
    pipe = generator.assemble(
        AutoencoderKLWan.from_pretrained(out / "vae" / "vae"),
        *generator.load_generator(out / "transformer"),
    )
    with files.new_folder(folder, overwrite=True) as temporary:
        for part in (pipe.vae, pipe.transformer):  # not the text encoder: transformers would load it in half precision
            part.half()
        pipe.save_pretrained(temporary, safe_serialization=True)
        files.write_json(temporary / "call.json", CALL)
        for name in PARTS:
            shutil.copy(out / name / "config.json", temporary / f"{name}-config.json")
        generator.write_manifest(temporary)
