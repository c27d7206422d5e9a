"""The row of facts of a family of pipelines: blocks, clock, latent layout, VAE normalisation, CFG form, text tokens."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Literal

from torch import Tensor, nn

from prism.backbone import layout, noise
from prism.backbone.facts import check_values
from prism.backbone.layout import Grid, Layout, TokenForm
from prism.backbone.pipeline import config_of, tensor_of, unwrapped
from prism.errors import PrismError, quoted

DEPTH = "as deep as the paper's block 12 of 30: "
PROJECTED = "{}'s, projected to the video's width before the first block"

TokenCount = int | Literal["text", "rest"] | Callable[[Mapping[str, Any]], int]
# Arguments of a denoiser call in diffusers that carry one row per sample.
BATCHED = frozenset(
    [
        *("hidden_states", "sample", "timestep", "guidance", "pooled_projections", "image_embeds", "added_time_ids"),
        *("encoder_hidden_states", "encoder_hidden_states_2", "encoder_hidden_states_image", "condition_mask"),
        *("attention_mask", "encoder_attention_mask", "encoder_attention_mask_2", "encoder_hidden_states_mask"),
        *("inpaint_latents", "video_coords", "img_shapes", "txt_seq_lens"),  # the last two are lists
        *("control_hidden_states", "control_latents", "pose_hidden_states", "face_pixel_values"),
        *("latents_history_short", "latents_history_mid", "latents_history_long"),
        *("mid_block_additional_residual", "controls_latents", "control_context"),  # of a ControlNet
        "added_cond_kwargs",  # a dict
    ]
)

FORMER_NAMES = {
    "alone": "batch_size_one",
    "batched": "batched_arguments",
    "beside": "parallel_blocks",
    "carried": "loop_layout",
    "counts_calls": "counts_steps_by_calls",
    "first_frame": "first_frame_pipelines",
    "fixed": "refused_arguments",
    "frames_more": "extra_frames",
    "given_back": "restores_condition",
    "gives_tensor": "returns_tensor",
    "images": "image_form",
    "negatives": "negative_prompt_form",
    "one_text": "single_prompt",
    "prompts": "takes_prompts",
    "texts_alone": "encode_prompts_singly",
    "timestep_of_one": "pure_noise_timestep",
    "vae_alone": "vae_batch_size_one",
    "vae_drops": "dropped_frames_by_condition",
    "vae_frames": "vae_frame_by_frame",
    "vae_gives": "decoded_layout",
    "vae_told": "decode_num_frames",
    "without_last": "trailing_blocks_field",
}  # former names of fields of `Family`; rows may use them for one more version


def _takes_former_names(kind: type[Family]) -> type[Family]:
    """Let `kind(...)`, and `dataclasses.replace` with it, take fields by their former names, with a FutureWarning."""
    init: Any = kind.__init__

    @wraps(init)
    def with_former_names(self: Family, *args: Any, **values: Any) -> None:
        for old in [name for name in values if name in FORMER_NAMES]:
            new = FORMER_NAMES[old]
            warnings.warn(
                f"{old} of a Family is called {new} now; the old name goes in the next version.", FutureWarning, 2
            )
            values[new] = values.pop(old)  # `replace` passes the old row's value too: the new one wins
        init(self, *args, **values)

    kind.__init__ = with_former_names  # type: ignore[method-assign]
    return kind


@_takes_former_names
@dataclass(frozen=True)
class Family:
    """Facts shared by pipelines with one latent layout, clock, VAE normalisation and form of guidance."""

    name: str
    """its key in `FAMILIES`"""
    models: str
    """the models' usual names"""
    pipelines: tuple[str, ...]
    """class names of its pipelines; subclasses of these are of the family too"""
    blocks: tuple[str, ...]
    """the denoiser's lists of blocks, in the order in which they run"""
    cfg: Literal["two_calls", "one_batch"]
    """classifier-free guidance: a conditional call, then an unconditional one; or both groups of rows in one batch"""
    parallel_blocks: tuple[str, ...] = ()
    """further lists of blocks, which run in turn with these and carry other tokens (Latte's spatial ones)"""
    conditional_first: bool = False
    """in one batch: the conditional rows come first, not last"""
    guidance: str = "guidance_scale"
    """the argument that turns guidance on above `guidance_off`; "guider": the pipeline's own guider decides"""
    guidance_off: float = 1.0
    """the largest value of that argument at which guidance is off"""
    further_guidance: Mapping[str, float] = field(default_factory=dict)
    """arguments that each add a pass of the conditional rows to a step, after the others, where they are above this
    number; each, and `guidance`, may have its like for the sound ("audio_guidance_scale"), which counts too"""
    clock: noise.Clock | noise.OwnClock = "flow"
    """how a noise level becomes alpha, sigma and the model's timestep: "flow", "rising_flow" (timesteps rise from
    noise), "ddpm", "euler" (ddpm, also between whole indices), "edm", or functions of one's own, a
    `prism.backbone.OwnClock`"""
    pure_noise_timestep: float = 1000.0
    """the model timestep at which a flow is pure noise"""
    layout: Layout = "BCTHW"
    """axes of the latents that the denoiser is given"""
    loop_layout: Layout | None = None
    """axes of the latents that the sampling loop holds and the scheduler steps; None: as `layout` (no packed one)"""
    latents_argument: tuple[str, ...] = ("hidden_states", "sample")
    """the denoiser's argument with the latents: the first of these names that is there"""
    timestep_argument: str = "timestep"
    """the denoiser's argument with the timestep"""
    text_argument: str = "encoder_hidden_states"
    """the denoiser's argument with the text"""
    text_mask_argument: str = "encoder_attention_mask"
    """the denoiser's argument that says which rows of the text are real tokens"""
    # Rows are sliced by name, not by shape: a list of rotary positions may happen to be as long as the batch.
    batched_arguments: frozenset[str] = BATCHED
    """the denoiser's arguments with one row per sample; for a dict, its name takes all tensors in it, and "name.key"
    one of them"""
    control_arguments: tuple[str, ...] = ()
    """the denoiser's arguments that hold the outputs of the pipeline's `controlnet`, in their order; it runs just
    before the denoiser, on the same latents and timestep. (): there is none"""
    returns_tensor: bool = False
    """the denoiser returns a plain tensor, as those outside diffusers may"""
    learns_variance: bool = False
    """the denoiser puts out a variance on further channels, as many as the latents have"""
    further_timesteps: tuple[str, ...] = ()
    """further arguments of the denoiser that hold the timestep, one per row"""
    read_arguments: Mapping[str, bool | None] = field(default_factory=dict)
    """values that a judge's read gives the denoiser's switches, or None in place of a sound's latents, so that tokens
    depend on the video's alone where a sound is denoised beside them; such a read is always a pass of its own, up to
    the tap"""
    outputs: int = 1
    """number of tensors that the denoiser returns, one row per sample each, the video's first: 2 with a sound beside
    it"""
    patch: Grid | None = None
    """latent cells (T, H, W) per token; None: as the denoiser's configuration says"""
    pads: bool = False
    """the denoiser pads latents that are no whole number of tokens high, wide or long"""
    token_form: TokenForm = "BLD"
    """a block's output: plain (B, L, D), or (L, B, D); "temporal": (B H W, T, D); "frames": a U-Net's (B T, D, H, W)"""
    tokens_before: TokenCount = 0
    """number of tokens before the video's in a block's output; "text": as many as the text has; "rest": all that are
    not the video's; or a function of the denoiser's arguments"""
    tokens_behind: TokenCount = 0
    """number of tokens after the video's, likewise"""
    video_output: int = 0
    """index of the video's tokens among a block's outputs, where it has several"""
    widths: str | int = ""
    """D_vis, or the field of the denoiser's configuration that holds it; "": number of heads times width of a head"""
    trailing_blocks_field: str = ""
    """field of the denoiser's configuration with the number of blocks at the end of `blocks` that do not carry the
    video's tokens; "": all carry them"""
    text_embedder: str | None = None
    """the denoiser's own text embedding: its output is D_vis wide and does not see the timestep; None: there is none"""
    text_padding: Literal["zeros", "mask", "unknown"] = "unknown"
    """how text rows after the prompt's end are recognised: they are zero, a mask says so, or they are not"""
    text_limit: int | None = None
    """largest number of tokens of a prompt, where the call has no max_sequence_length to say it"""
    text_reason: str = ""
    """why `text_embedder` is that module, or why there is none (for docs/backbones.md)"""
    takes_prompts: bool = True
    """the pipelines take a prompt"""
    single_prompt: bool = False
    """the pipelines take one prompt and no list of them: everything runs at batch size 1"""
    single_output: bool = False
    """the pipelines give one video, without an axis for the batch"""
    image_form: Literal["single", "list"] = "list"
    """how one conditioning image or video is given to a batch: once, or as a list with one per row"""
    negative_prompt_form: Literal["single", "list"] = "single"
    """how one negative prompt is given to a batch: once, or as a list with one per row"""
    refused_arguments: Mapping[str, str] = field(default_factory=dict)
    """arguments of the call that are refused unless they have their defaults, as a judge cannot read what they do; each
    with the reason"""
    needed_values: Mapping[str, bool] = field(default_factory=dict)
    """values that some of these arguments must have in place of their defaults"""
    first_frame_pipelines: tuple[str, ...] = ()
    """pipelines that put an image into the latents as their first frame, and show it by no mask and no timestep"""
    seeds_conditions: bool = False
    """the seed decides a condition that no argument shows, as an image's embedding that a prior makes of the prompt"""
    restores_condition: bool = False
    """the loop samples a condition's frames too, and the pipeline puts the condition back into the latents after it"""
    appends_conditions: bool = False
    """the loop's latents, which are packed, hold tokens of conditions behind the video's, and the pipeline drops them
    after it"""
    sampling_rate: str = ""
    """the part and the field of its configuration with the samples per second of the sounds that the pipelines make, as
    "vae.sampling_rate"; "": they make videos or images"""
    soundtrack_rate: str = ""
    """the same of the sound beside the video, which is second in the pipelines' output; "": there is none"""
    after_loop: str = ""
    """name of the pipeline's method that changes latents (1, ...) after the loop"""
    extra_frames: Literal["before", "behind"] = "before"
    """on which side of the video's latent frames the loop holds further ones, which are not decoded"""
    num_extra_frames: int = 0
    """the number of such frames, where every call has them"""
    windows: Callable[[Mapping[str, Any]], int] | None = None
    """the number of windows that a call samples one after another, each to its end, by the call's arguments; more than
    one is refused, as a judge reads all frames at one noise level"""
    ends_with_prediction: bool = False
    """what the pipelines decode is the clean latents that their last step predicted, over the scheduler's sigma_data"""
    denormalises_output: bool = False
    """as output_type "latent" the pipelines give latents as their VAE takes them, and not as the loop holds them"""
    vae_mean_std: bool = False
    """latents are normalised by the VAE's latents_mean and latents_std"""
    vae_factor: Literal["", "scaling_factor", "sigma_data"] = ""
    """latents are multiplied by this field of the VAE's configuration (sigma_data: of the scheduler's)"""
    vae_shift: bool = False
    """latents are shifted by the VAE's shift_factor"""
    vae_frame_by_frame: bool = False
    """the VAE takes single frames, not videos"""
    vae_batch_size_one: bool = False
    """the VAE takes one video at a time"""
    dropped_frames_by_condition: Mapping[str, int] = field(default_factory=dict)
    """how many frames the pipeline drops from the front of the decoded video, by the image_condition_type of the
    denoiser's configuration"""
    decoded_layout: Literal["BCTHW", "BTCHW"] = "BCTHW"
    """axes of the VAE's decoded videos"""
    decode_num_frames: Callable[[int], int] | None = None
    """the number of frames for a number of latent frames, where the VAE's decode must be given num_frames"""
    batch_size_one: bool = False
    """a row's inputs depend on the rows beside it in a batch: everything runs at batch size 1"""
    encode_prompts_singly: bool = False
    """a prompt's embedding depends on the prompts that are encoded with it: each is captured by itself"""
    counts_steps_by_calls: bool = False
    """steps are counted by denoiser calls and not by the scheduler's, which the pipeline copies or steps twice"""
    tap: float = 0.4
    """default depth of the tap, as a share of the blocks"""
    tap_reason: str = ""
    """why `tap` is at that depth (for docs/backbones.md)"""

    def __post_init__(self) -> None:
        check_values(self)
        if self.single_prompt and not self.batch_size_one:
            object.__setattr__(self, "batch_size_one", True)

    # -- the denoiser

    def block_list(self, denoiser: Any) -> list[nn.Module]:
        """The blocks that carry video tokens, in the order in which they run."""
        blocks: list[nn.Module] = []
        denoiser = unwrapped(denoiser)
        for name in self.blocks:
            try:
                part = denoiser.get_submodule(name)
            except AttributeError as error:
                raise PrismError(f"The denoiser {type(denoiser).__name__} has no blocks {name!r}: {error}.") from error
            blocks += list(part) if isinstance(part, nn.ModuleList) else [part]
        trailing = int(config_of(denoiser)[self.trailing_blocks_field]) if self.trailing_blocks_field else 0
        return blocks[: len(blocks) - trailing]

    def first_blocks(self, denoiser: Any, up_to: int) -> list[tuple[nn.ModuleList, int]]:
        """The lists of blocks, each with the number of its first blocks that a read after `up_to` blocks needs.

        Raises PrismError where the blocks are not in lists, so that the first of them cannot be loaded alone.
        """
        if self.control_arguments:
            raise PrismError(
                "A ControlNet's outputs go to blocks by how many there are, so that no first blocks can be loaded "
                "alone; load the whole pipeline."
            )
        lists, remaining = [], up_to
        for name in self.blocks:
            part = denoiser.get_submodule(name)
            if not isinstance(part, nn.ModuleList):
                raise PrismError(
                    f"Of {type(denoiser).__name__} no first blocks can be loaded alone; load the whole pipeline."
                )
            count = min(remaining, len(part))
            lists.append((part, count))
            remaining -= count
        return lists + [(denoiser.get_submodule(name), up_to) for name in self.parallel_blocks]

    def block_widths(self, denoiser: Any) -> list[int]:
        """D_vis after each block."""
        config = config_of(denoiser)
        if self.token_form == "frames":
            down = list(config["block_out_channels"])
            return [*down, down[-1], *reversed(down)]
        width = self.widths
        if not isinstance(width, int):
            names = (width,) if width else ("num_attention_heads", "attention_head_dim")
            width = math.prod(_config_field(config, name, "widths") for name in names)
        return [width] * len(self.block_list(denoiser))

    def video(self, output: Any) -> Tensor:
        """The video's tokens in a block's output."""
        states: Tensor = output[self.video_output] if isinstance(output, tuple) else output
        return states

    def videos(self, output: Any) -> Any:
        """The videos in a pipeline's output, one per row."""
        single = self.single_output and getattr(output[0], "ndim", 4) == 4  # latents have their axis
        return [output[0]] if single else output[0]

    def stepped(self, output: Any, scheduler: Any) -> Tensor:
        """The latents in what a scheduler's step gives: those that the pipelines decode if it is the last step."""
        if self.ends_with_prediction:
            return tensor_of(output[1:]) / float(config_of(scheduler)["sigma_data"])
        return tensor_of(output, "prev_sample")

    def conditional(self, rows: int, samples: int) -> slice:
        """The conditional rows in a denoiser call of `rows`, which are one or two groups of `samples`."""
        return slice(0, samples) if self.conditional_first else slice(rows - samples, rows)

    def patches(self, config: Mapping[str, Any]) -> Grid:
        """Latent cells (T, H, W) per token."""
        if self.patch is not None:
            return self.patch
        size = _config_field(config, "patch_size", "patch")
        patch = (config.get("patch_size_t") or 1, size, size) if type(size) is int else size
        if not isinstance(patch, list | tuple) or len(patch) != 3 or not all(type(n) is int and n > 0 for n in patch):
            raise PrismError(
                f"The denoiser's patch_size must be a whole number from 1, or three of them; found {quoted(size, 80)}."
            )
        return (patch[0], patch[1], patch[2])

    def channels(self, config: Mapping[str, Any], noisy: Tensor) -> int:
        """The number of latent channels in the denoiser's input; channels of a condition follow them."""
        size = noisy.shape[layout.channel_axis(self.layout)]
        channels = config.get("out_channels") or config.get("in_visual_dim") or size
        channels //= 2 if self.learns_variance else 1
        cells = math.prod(self.patches(config)) if layout.is_packed(self.layout) else 1  # in one token
        return min(size, channels * cells)

    def dropped_frames(self, config: Mapping[str, Any]) -> int:
        """The number of pixel frames that the pipeline drops from the front of a decoded video."""
        return self.dropped_frames_by_condition.get(config.get("image_condition_type") or "", 0)

    # -- noise levels

    def check_scheduler(self, scheduler: Any) -> None:
        """Raise PrismError for a scheduler that does not fit `clock`: see `prism.backbone.noise.check`."""
        noise.check(self.clock, scheduler)

    def level(self, scheduler: Any, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(alpha, sigma, model timestep) at t in [0, 1000]: see `prism.backbone.noise.level`."""
        alpha, sigma, timestep = noise.level(self.clock, scheduler, t)
        if isinstance(self.clock, noise.OwnClock):
            return alpha, sigma, timestep
        return alpha, sigma, timestep * (self.pure_noise_timestep / 1000)

    def t_of(self, scheduler: Any, timestep: Any) -> float:
        """The noise level in [0, 1000] at which the model was called with `timestep`."""
        is_own = isinstance(self.clock, noise.OwnClock)
        return noise.t_of(self.clock, scheduler, float(timestep) * (1.0 if is_own else 1000 / self.pure_noise_timestep))


def _config_field(config: Mapping[str, Any], name: str, fact: str) -> Any:
    """A field of the denoiser's configuration. Where it is missing, the error asks for the fact that replaces it."""
    if name not in config:
        raise PrismError(f"The denoiser's configuration has no {name!r}; say it as {fact!r} in the pipeline's family.")
    return config[name]
