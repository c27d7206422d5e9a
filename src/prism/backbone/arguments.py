"""The arguments of a pipeline's call: check and normalise them, and repeat or split them by row."""

from __future__ import annotations

import os
import re
from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from prism.backbone import control
from prism.backbone.family import Family
from prism.backbone.pipeline import check_denoisers, warn_cut_off
from prism.errors import PrismError, listed, number, quoted, reason, whole
from prism.video import frames, read_video

if TYPE_CHECKING:
    from prism.backbone.backbone import Backbone

STEPS, PIXELS, FRAMES, GUIDANCE = (1, 10_000), (1, 16_384), (1, 10_000), (-100.0, 1000.0)  # plausible ranges
_WHOLE = {"num_inference_steps": STEPS, "height": PIXELS, "width": PIXELS, "num_frames": FRAMES}
_WHOLE |= {"max_sequence_length": (1, 1_000_000)}
_SCALES = ("guidance_scale", "guidance_scale_2", "true_cfg_scale", "min_guidance_scale", "max_guidance_scale")
_DEFAULT = ("num_videos_per_prompt", "num_images_per_prompt", "num_waveforms_per_prompt")  # only 1, dropped
_VIDEOS = ("video", "control_video")
_PICTURES = ("image", "last_image", *_VIDEOS)
_LISTED = (*_PICTURES, "negative_prompt")  # lists of one per prompt are allowed
_TEXTS = ("prompt", "negative_prompt", "pooled_prompt", "negative_pooled_prompt")  # prefixes of names of embeddings


def normalised(call: Mapping[str, Any]) -> dict[str, Any]:
    """The call with whole numbers as ints, pictures as RGB images, and inference tensors copied to plain ones.

    Pictures of any mode, bytes (H, W, C) and paths of local files become what diffusers' `load_image` makes of them;
    other arrays and tensors pass unchanged to the pipeline. Raises PrismError for numbers out of range, NaN, and files
    that cannot be read.
    """
    arguments: dict[str, Any] = {}
    for name, value in call.items():
        if name in _DEFAULT and value is not None and whole(name, value) == 1:
            continue
        if name in _WHOLE and value is not None:
            value = whole(name, value, *_WHOLE[name])
        elif name in _SCALES and value is not None:
            scale = number(name, value, *GUIDANCE)
            value = value if isinstance(value, int | float) else scale
        elif name == "callback_on_step_end":
            if value is not None and not callable(value):
                raise PrismError(f"callback_on_step_end must be a function; found {quoted(value, 80)}.")
        elif name == "callback_on_step_end_tensor_inputs":
            if value is None:  # the pipelines' own default
                continue
            value = listed(name, value)
        elif isinstance(value, float | np.floating):
            number(name, value)
        elif name in ("prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3"):
            texts(value, name)
        elif name == "output_type" and not isinstance(value, str):
            raise PrismError(
                f'output_type must be a text, such as "np", "pt", "pil" or "latent"; found {quoted(value, 80)}.'
            )
        elif name.endswith("_kwargs") and value is not None and not isinstance(value, Mapping):
            raise PrismError(f"{name} must be a dictionary; found {quoted(value, 80)}.")
        elif isinstance(value, Tensor) and value.is_inference():
            value = value.clone()
        elif name in _PICTURES:
            value = _pictures(name, value)
        arguments[name] = value
    return arguments


def _pictures(name: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_pictures(name, each) for each in value]
    if isinstance(value, str | os.PathLike):
        return _opened(name, os.fspath(value))
    if isinstance(value, Image.Image):
        return value if value.mode == "RGB" else ImageOps.exif_transpose(value).convert("RGB")
    if isinstance(value, np.ndarray) and value.dtype == np.uint8:
        pictures = [Image.fromarray((each * 255).round().astype(np.uint8)) for each in frames(value, name)]
        return pictures if name in _VIDEOS else pictures[0]
    return value


def _opened(name: str, path: str) -> Any:
    if path.startswith(("http://", "https://")):
        raise PrismError(f"{name} is the address {quoted(path, 120)}, and nothing is downloaded; give a local file.")
    if name in _VIDEOS:
        return [Image.fromarray((each * 255).round().astype(np.uint8)) for each in read_video(path)]
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except Exception as error:  # Pillow's readers raise errors of any kind on broken files
        reason = quoted(getattr(error, "strerror", None) or error, 160).rstrip(".")
        raise PrismError(f"The {name} {quoted(path, 120)} cannot be read: {reason}.") from error


# -- arguments with one row per prompt


def embedded_rows(call: Mapping[str, Any]) -> int:
    """The number of prompts that a call gives as embeddings, 0 where it gives none."""
    embeddings = [value for name, value in call.items() if name.startswith("prompt") and "embeds" in name]
    rows = (
        len(value) if getattr(value, "ndim", 1) else 1
        for value in embeddings
        if isinstance(value, Tensor | list | tuple)
    )
    return next(rows, 0)


def _is_embedding(name: str, value: Any) -> bool:
    """True for a text's embeddings, and for a mask or pooled vector that goes with them."""
    return name.startswith(_TEXTS) and isinstance(value, Tensor) and not name.endswith("cu_seqlens") and value.ndim > 0


def check_texts(prompts: Sequence[Any], call: Mapping[str, Any]) -> None:
    """Raise PrismError for prompts that are no texts or empty, unless the call gives embeddings in their place, and for
    embeddings, masks and pooled vectors that do not go together.
    """
    _check_embeddings(call)
    if embedded_rows(call):
        if any(prompts):
            raise PrismError("The prompt is given as text and as prompt_embeds; give one of the two.")
        return
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise PrismError(f"A prompt must be a text; found {quoted(prompt, 80)}.")
        if not prompt.strip():
            raise PrismError(f"The prompt is empty ({prompt!r}); say what the video should show.")


def _check_embeddings(call: Mapping[str, Any]) -> None:
    for name, value in call.items():
        of_text = name.startswith(_TEXTS) and ("embeds" in name or "mask" in name)
        if of_text and value is not None and (not isinstance(value, Tensor) or value.ndim < 2):
            raise PrismError(f"{name} must be a tensor with one row per prompt; found {quoted(value, 80)}.")
        if of_text and value is not None:
            _check_numbers(name, value)
    for name, value in call.items():
        positive = call.get(name.removeprefix("negative_")) if "embeds" in name and "mask" not in name else None
        if (
            isinstance(positive, Tensor)
            and isinstance(value, Tensor)
            and (positive.ndim, positive.shape[-1]) != (value.ndim, value.shape[-1])
        ):
            raise PrismError(
                f"{name} and {name.removeprefix('negative_')} must be of one width; found the shapes "
                f"{tuple(value.shape)} and {tuple(positive.shape)}."
            )
    rows = {name: len(value) for name, value in call.items() if _is_embedding(name, value)}
    if len({count for count in rows.values() if count != 1}) > 1 or 0 in rows.values():
        counts = ", ".join(f"{name} {count}" for name, count in rows.items())
        raise PrismError(
            f"The embeddings are of different numbers of prompts ({counts}); give one row, or one per prompt."
        )


def _check_numbers(name: str, value: Tensor) -> None:
    """Raise PrismError for embeddings or a mask without numbers, and for embeddings that no text encoder gives."""
    wrong = (
        "no numbers, on the device meta"
        if value.is_meta
        else f"the layout {value.layout}"
        if value.layout != torch.strided
        else f"the shape {tuple(value.shape)}"
        if 0 in value.shape
        else ""
    )
    if not wrong and "mask" not in name:
        wrong = (
            f"{value.dtype}" if not value.is_floating_point() else "" if value.isfinite().all() else "NaN or infinity"
        )
    if wrong:
        raise PrismError(f"{name} must be a dense tensor of finite floating-point numbers; found {wrong}.")


def of_prompt(call: Mapping[str, Any], row: int, prompts: int, shared: Container[str] = ()) -> dict[str, Any]:
    """The call for prompt number `row` of several: arguments with one row per prompt are cut to that row, except those
    in `shared`, whose lists are something else."""
    row_call = dict(call)
    for name, value in call.items():
        if name in shared:
            continue
        if _is_embedding(name, value) and len(value) > 1:
            row_call[name] = _row(name, value, row, prompts)
        elif name.endswith("cu_seqlens") and isinstance(value, Tensor) and len(value) > 2:
            row_call[name] = value.new_tensor([0, int(value[row + 1] - value[row])])
        elif name in _LISTED and isinstance(value, list | tuple) and not is_single(name, value):
            if name == "negative_prompt" and len(value) == 1:  # pipelines take it as one for all prompts
                continue
            row_call[name] = _row(name, value, row, prompts)
    return row_call


def _row(name: str, value: Any, row: int, prompts: int) -> Any:
    if len(value) != prompts:
        raise PrismError(f"{name} has {len(value)} entries for {prompts} prompts; give one, or one per prompt.")
    return value[row : row + 1] if isinstance(value, Tensor) else value[row]


def is_single(name: str, value: Any) -> bool:
    """True where `image` or a video is one for all rows, not a list of one per row (a video is a list of frames)."""
    if name in _VIDEOS and isinstance(value, list | tuple) and value:
        value = value[0]
    return value is not None and not isinstance(value, list | tuple)


def check_encoders(pipe: Any, taken: Mapping[str, Any], call: Mapping[str, Any], guided: bool) -> None:
    """Raise PrismError where a text has to be encoded and the pipeline has no encoder or tokenizer for it.

    `taken` are the arguments that the pipeline's call takes.
    """
    optional = {*getattr(pipe, "_optional_components", ()), "text_encoder_3", "tokenizer_3"}  # of Stable Diffusion 3
    names = [name for name in pipe.components if name.startswith(("text_encoder", "tokenizer"))]
    missing = [name for name in names if name not in optional and getattr(pipe, name, None) is None]
    if not missing:
        return
    if not embedded_rows(call):
        raise PrismError(f"The pipeline has no {missing[0]}; give prompt_embeds and what goes with them, no prompt.")
    negatives = [name for name in taken if name.startswith("negative_prompt_embeds")]
    if negatives and guided and all(call.get(name) is None for name in negatives):
        raise PrismError(
            f"The pipeline has no {missing[0]} to encode a negative prompt; give {negatives[0]} too, or guide not."
        )


def check_output_type(pipe: Any, output_type: Any) -> None:
    """Raise PrismError for an `output_type` that the pipeline's video processor does not make."""
    make = getattr(getattr(pipe, "video_processor", None), "postprocess_video", None)
    if output_type in (None, "latent") or make is None:
        return
    try:
        make(torch.zeros(1, 3, 1, 8, 8), output_type=output_type)
    except Exception as error:
        kind = type(pipe).__name__
        raise PrismError(f"{kind} makes no output_type {quoted(output_type, 40)!r}: {reason(error)}.") from error


def texts(prompts: Any, name: str = "prompt") -> list[str | None]:
    """A text or an iterable of texts (numpy's, pandas'), as a list of plain texts; None stays None.

    Raises PrismError for anything else.
    """
    if prompts is None or isinstance(prompts, str):
        rows: Sequence[Any] = [prompts]
    elif isinstance(prompts, bytes | Mapping | set | frozenset) or not hasattr(prompts, "__iter__"):
        raise PrismError(f"{name} must be a text or a list of texts; found {quoted(prompts, 80)}.")
    else:
        try:
            rows = list(np.atleast_1d(prompts)) if isinstance(prompts, np.ndarray) else list(prompts)
        except Exception:
            rows = [prompts]
    for row in rows:
        if row is not None and not isinstance(row, str):
            raise PrismError(f"{name} must be a text or a list of texts; found {quoted(row, 80)} in it.")
        if row is not None and not _is_unicode(row):
            raise PrismError(f"{name} holds characters that are no text: {quoted(ascii(row), 80)}.")
    return [None if row is None else str(row) for row in rows]


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# Arguments with a row per prompt: prompt_2, prompt_embeds, prompt_embeds_mask, negative_pooled_prompt_embeds, ...
_OF_A_PROMPT = re.compile(r"(negative_|pooled_)*prompt(_\d|_embeds\w*|_attention_mask\w*|_mask\w*|_cu_seqlens)?$")

# Pictures for adapters. Their rows and lists mean something else in each pipeline, and no pipeline repeats them for a
# batch, so that a call with one is made one row at a time.
_OF_AN_ADAPTER = re.compile(r"(negative_)?ip_adapter_image(_embeds)?$")

# Call arguments that do not change a conditioning.
_IRRELEVANT = frozenset(
    [
        *("guidance_scale", "true_cfg_scale", "min_guidance_scale", "max_guidance_scale", "guidance_scale_2"),
        *("num_inference_steps", "timesteps", "sigmas", "output_type", "return_dict", "generator"),
        *("callback_on_step_end", "callback_on_step_end_tensor_inputs", "spatio_temporal_guidance_blocks"),
    ]
)


def is_relevant(family: Family, name: str) -> bool:
    """Tell whether a call argument may change a conditioning. An embedded guidance scale does."""
    if name == "guidance_scale" and family.guidance in ("true_cfg_scale", ""):
        return True
    return name not in _IRRELEVANT and (not name.startswith("negative_") or name == "negative_image_embeds")


def relevant(family: Family, call: Mapping[str, Any]) -> dict[str, Any]:
    """The call arguments that may change a conditioning; with an adapter's pictures all but the generator, as these
    hold rows for the unconditional pass too."""
    shown, windowed = shows_adapters(call), any(name in call for name in control.WINDOW)  # by the call's steps
    taken = {"num_inference_steps", "timesteps", "sigmas"} if windowed else set()
    taken |= {*(name for name in call if shown or is_relevant(family, name))} - {"generator"}
    return {name: value for name, value in call.items() if name in taken}


def unguided(family: Family, call: Mapping[str, Any], taken: Container[str]) -> dict[str, float]:
    """The arguments that turn guidance off, so that no unconditional rows are computed; `taken`: those that the
    pipeline's call takes. Empty where an adapter's pictures hold rows for them."""
    off = {} if shows_adapters(call) else dict.fromkeys((family.guidance, "min_guidance_scale"), family.guidance_off)
    pairs = (off and {**off, **family.further_guidance}).items()
    return {n: value for name, value in pairs for n in (name, f"audio_{name}") if n in taken}


def shows_adapters(call: Mapping[str, Any]) -> bool:
    """Tell whether a call holds pictures for an adapter (IP-Adapter), which serve one row."""
    return any(_OF_AN_ADAPTER.match(name) and value is not None for name, value in call.items())


def draws_conditions(family: Family, call: Mapping[str, Any]) -> bool:
    """See `Backbone.draws_conditions`."""
    plain = (str, int, float, bool, type(None))
    conditions = {name: value for name, value in call.items() if is_relevant(family, name) and "prompt" not in name}
    return family.seeds_conditions or any(not isinstance(value, plain) for value in conditions.values())


def batch_of(family: Family, prompts: Sequence[str], seeds: Sequence[int], call: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that make one stock call of several rows: prompts, CPU generators, and, repeated per row, the
    arguments that `call` holds for one: image, negative prompts, embeddings with their masks and pooled vectors.

    Raises PrismError for an argument that has not exactly one row.
    """
    n = len(prompts)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    arguments: dict[str, Any] = {"generator": generators if n > 1 else generators[0]}
    if family.takes_prompts and not embedded_rows(call):
        arguments["prompt"] = prompts[0] if family.single_prompt else list(prompts)
    if family.image_form == "list":
        arguments |= {name: [call[name]] * n for name in ("image", *_VIDEOS) if is_single(name, call.get(name))}
    for name, value in call.items():
        if name.startswith("negative_prompt") and isinstance(value, str):
            arguments |= {name: [value] * n} if family.negative_prompt_form == "list" else {}
        elif n > 1 and _OF_A_PROMPT.match(name) and isinstance(value, str | Tensor | list | tuple):
            arguments[name] = _repeated(name, [value] if isinstance(value, str) else value, n)
    return arguments


def _repeated(name: str, value: Any, n: int) -> Any:
    """One row, n times."""
    if name.endswith("cu_seqlens"):  # of Kandinsky 5: bounds of the texts in one concatenated tensor
        if len(value) == 2:
            return value[-1] * torch.arange(n + 1, device=value.device, dtype=value.dtype)
    elif len(value) == 1:
        return value.repeat_interleave(n, 0) if isinstance(value, Tensor) else [value[0]] * n
    raise PrismError(f"{name} holds {len(value)} rows for a prompt's candidates; give one, which all of them share.")


def check_call(backbone: Backbone, prompts: Sequence[str], call: dict[str, Any]) -> None:
    """See `Backbone.check_call`."""
    if isinstance(prompts, str) or not prompts:
        raise PrismError(f"prompts must be a list of texts; found {'a single' if prompts else 'no'} text.")
    check_denoisers(backbone)
    unknown = sorted(set(call) - set(backbone._call))
    if unknown:
        raise PrismError(f"{type(backbone.pipe).__name__} takes no argument {unknown[0]!r}; leave it out.")
    for name, why in backbone.family.refused_arguments.items():
        needed = backbone.family.needed_values.get(name, backbone.default(name))
        given = call.get(name, backbone.default(name))
        if backbone.takes(name) and given != needed:
            advice = "Give" if name in backbone.family.needed_values else "Leave it at"
            raise PrismError(f"{name} = {quoted(repr(given), 80)} is not supported: {why}. {advice} {needed}.")
    _check_windows(backbone, call)
    control.window(backbone, call)
    if not backbone.family.takes_prompts:
        if any(prompts):
            raise PrismError(f"{type(backbone.pipe).__name__} takes no prompt, only an image; leave the prompt empty.")
        return
    check_texts(prompts, call)
    check_encoders(backbone.pipe, backbone._call, call, backbone.guided(call))
    limit = call.get("max_sequence_length", backbone.default("max_sequence_length")) or backbone.family.text_limit
    tokenizer = None if embedded_rows(call) else getattr(backbone.pipe, "tokenizer", None)
    if limit is not None and tokenizer is not None:
        with backbone.held():
            warn_cut_off(prompts, tokenizer, limit, backbone.takes("max_sequence_length"), backbone._measured)


def _check_windows(backbone: Backbone, call: Mapping[str, Any]) -> None:
    """Raise PrismError for a call whose frames are sampled window by window."""
    windows = backbone.family.windows
    if windows is None:
        return
    try:
        count = windows({name: call.get(name, backbone.default(name)) for name in backbone._call})
    except (TypeError, ValueError, ZeroDivisionError):  # arguments that the pipeline itself refuses
        return
    if count > 1:
        raise PrismError(
            f"{type(backbone.pipe).__name__} would sample this video in {count} windows one after another, each to its "
            "end, and a judge reads all frames at one noise level; ask for no more frames than one window has."
        )
