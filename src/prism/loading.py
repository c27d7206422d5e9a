"""Backbones, heads and stores by name: the embedded ones, a folder, or an id on the Hub."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from prism.errors import PrismError, number, quoted

EMBEDDED = "ShapeWorld (embedded)"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # short names
OFFLOAD = ("none", "model", "group")


def load_backbone(
    name: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    offload: str = "none",
    loras: Sequence[str] = (),
) -> tuple[Any, dict[str, Any], str]:
    """A `Backbone`, the arguments of its pipeline's call, and its name for reports.

    name: None for the embedded model; else a folder or Hub id of a diffusers pipeline. Call arguments are read from
    call.json in that folder, if there is one. device: None for cuda if there is one. dtype: None for bfloat16 on cuda,
    float32 elsewhere; the embedded model stays in float32. offload: "model" or "group", as diffusers' methods of these
    names, which need an accelerator. loras: local files or folders of safetensors, optionally followed by :SCALE.
    Raises `PrismError` if something cannot be loaded.
    """
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from prism import shapeworld
    from prism.backbone import Backbone
    from prism.backbone.loading import call_beside, check_device

    for logging in (diffusers_logging, transformers_logging):  # no progress bars of loading
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    device = device or default_device()
    check_device(device)
    dtype = DTYPES.get(str(dtype), dtype)
    if dtype is not None and dtype not in DTYPES.values():
        raise PrismError(f"The --dtype is {quoted(dtype, 60)}; choose {', '.join(DTYPES)} (or their long names).")
    if offload not in OFFLOAD:
        raise PrismError(f"The --offload is {quoted(offload, 60)}; choose one of {', '.join(OFFLOAD)}.")
    if offload != "none" and torch.device(device).type == "cpu":
        raise PrismError(
            f"The --offload {offload} brings models to an accelerator as they are needed, and this run is on the cpu; "
            "leave it out, or choose another --device."
        )
    adapters = [_lora(text) for text in loras]
    if name is None:
        backbone, call, name = Backbone(shapeworld.pipeline()), dict(shapeworld.CALL), EMBEDDED
    else:
        kind = getattr(torch, dtype or ("bfloat16" if device.startswith("cuda") else "float32"))
        backbone, call, name = Backbone.from_pretrained(name, dtype=kind), call_beside(name), str(name)
    adapt(backbone.pipe, adapters)
    place(backbone.pipe, device, offload)
    return backbone, call, name


@contextlib.contextmanager
def crew_of_backbone(
    name: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    offload: str = "none",
    loras: Sequence[str] = (),
    ray: str | None = None,
    workers: int | None = None,
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The `Crew` that holds a backbone, and the arguments of its pipeline's call; actors of Ray end with the block.

    ray: None for this process and those that a launcher started beside it; "local", "auto" or an address for actors of
    a Ray cluster. workers: the number of actors. Other arguments as of `load_backbone`, which each actor calls.
    """
    from prism.training.fan_out import crew_of

    if ray is None:
        backbone, call, _ = load_backbone(name, device, dtype, offload, loras)
        yield crew_of(backbone), call
        return
    from prism import shapeworld
    from prism.backbone.loading import call_beside
    from prism.training.actors import Actors

    call = dict(shapeworld.CALL) if name is None else call_beside(name)
    load = partial(_backbone, absolute(name), device, dtype, offload, [absolute(lora) for lora in loras])
    gpus = None if device is None else device.startswith("cuda")
    with Actors(load, ray, workers, gpus) as actors:
        yield actors, call


def _backbone(*arguments: Any) -> Any:
    return load_backbone(*arguments)[0]


def absolute(text: Any) -> Any:
    """An existing file or folder by its full path, for processes in other folders; another text as it is."""
    return os.path.abspath(text) if text is not None and os.path.exists(text) else text


def default_device() -> str:
    """This process's GPU where there is one, else the CPU."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"  # one of several processes


def place(pipe: Any, device: str, offload: str) -> None:
    """Move a pipeline to its device, or let diffusers move its models there when they are needed."""
    import torch

    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "group":
        stream = torch.device(device).type == "cuda"
        pipe.enable_group_offload(torch.device(device), offload_type="leaf_level", use_stream=stream)
    else:
        pipe.to(device)


def _lora(text: str) -> tuple[Path, float]:
    """The file of `FILE[:SCALE]` or `FOLDER[:SCALE]`, and the scale."""
    path, scale = text, "1"
    if not os.path.exists(text) and ":" in text:
        path, scale = text.rsplit(":", 1)
    value = number(f"The scale of the --lora {quoted(text, 120)}", _float(scale), -100, 100)
    file = Path(path)
    if file.is_dir():
        files_in = sorted(file.glob("*.safetensors"))
        if len(files_in) != 1:
            raise PrismError(f"The --lora folder {path} holds {len(files_in)} safetensors files; name one of them.")
        (file,) = files_in
    if not file.is_file():
        raise PrismError(f"The --lora {quoted(path, 200)} does not exist; give a local file or folder.")
    if file.suffix != ".safetensors":
        raise PrismError(f"The --lora {path} is no safetensors file, and nothing else is loaded; convert it first.")
    return file, value


def _float(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text  # quoted in the error


def adapt(pipe: Any, adapters: Sequence[tuple[Path, float]]) -> None:
    """Load LoRAs, each (file, scale), into a pipeline. Raises PrismError for a LoRA that does not fit it."""
    if not adapters:
        return
    if not hasattr(pipe, "load_lora_weights"):
        raise PrismError(f"{type(pipe).__name__} takes no LoRA; leave --lora out.")
    for index, (file, _) in enumerate(adapters):
        try:
            pipe.load_lora_weights(
                str(file.parent), weight_name=file.name, adapter_name=f"lora-{index}", local_files_only=True
            )
        except Exception as error:  # diffusers, peft and safetensors raise different errors
            raise PrismError(f"The --lora {file} cannot be loaded: {quoted(error).rstrip('.')}.") from error
        if not any(f"lora-{index}" in names for names in pipe.get_list_adapters().values()):
            raise PrismError(f"The --lora {file} holds nothing for {type(pipe).__name__}; it is of another model.")
    pipe.set_adapters([f"lora-{index}" for index in range(len(adapters))], [scale for _, scale in adapters])


def load_judge(head: str | None, backbone: Any, embedded: bool) -> Any:
    """The `Judge` of a saved head on `backbone`; None takes the head that ships for the embedded backbone."""
    from prism import shapeworld
    from prism.judge import Judge

    if head is None and not embedded:
        raise PrismError("The embedded head fits only the embedded backbone; name a head for this one with --head.")
    if head is None:
        return Judge.from_pretrained(shapeworld.asset_folder("head"), backbone)
    return Judge.from_pretrained(head, backbone)


def open_store(folder: Path | None) -> Any:
    """The `LatentStore` in `folder`; None opens the labelled candidates that ship with the package."""
    from prism import shapeworld
    from prism.preference import LatentStore

    return LatentStore.open(shapeworld.asset_folder("candidates") if folder is None else folder)


def check_store(folder: Path | None, store: Any, backbone: Any) -> None:
    """Refuse the embedded candidates (a folder None) for a backbone with another VAE."""
    from prism.backbone.fingerprint import fits

    if folder is None and fits(store.meta.get("backbone") or {}, backbone, ("vae",))[0]:
        raise PrismError(
            "The embedded candidates are latents of the embedded model; name a store of this backbone's own videos "
            "with --data."
        )


def load_reward(spec: str, timeout: float | None = None, device: str | None = None) -> Any:
    """The `Reward` that a text names: referee (ShapeWorld's), a ready-made teacher such as videoreward=FOLDER, or
    FILE.py:function, module:function.

    timeout: seconds that a call may take; None: any time. device: of a teacher.
    """
    from prism import teachers
    from prism.training.reward import Reward
    from prism.training.reward import load_reward as load

    if spec == "referee":
        from prism.shapeworld import referee

        reward = Reward(
            referee.reward, "referee", timeout, dimensions=tuple(referee.TIE_MARGINS), check_prompts=referee.parsed
        )
    elif _is_teacher(spec):
        teacher = teachers.load(spec, device or default_device())
        needs_fps, dimensions = getattr(teacher, "needs_fps", False), teacher.dimensions
        reward = Reward(
            teacher.score, teacher.name, timeout, spec, dimensions=dimensions, unclear=True, needs_fps=needs_fps
        )
    else:
        reward = load(spec, timeout)
    reward.load = partial(_load_once, spec, timeout, device)
    return reward


def _is_teacher(spec: str) -> bool:
    """True for a text that names a teacher. Raises PrismError for a name that is nearly one."""
    from prism import teachers
    from prism.training.reward import is_function

    function = is_function(spec)
    if not function or spec.partition(":")[0] in teachers.TEACHERS:
        teachers.check_name(spec)
    return not function and teachers.named(spec) is not None


def check_rewards(specs: Sequence[str]) -> None:
    """Refuse what `load_rewards` would refuse, as far as this process sees it without loading a teacher."""
    from prism import teachers

    for spec in specs:
        if _is_teacher(spec):
            teachers.check(spec)


@cache
def _load_once(spec: str, timeout: float | None, device: str | None) -> Any:
    return load_reward(spec, timeout, device)


def load_rewards(specs: Sequence[str], timeout: float | None, device: str | None, crew: Any = None) -> list[Any]:
    """The `Reward` of each text, as from `load_reward`; with a crew, its processes alone load teachers."""
    from prism.training.reward import Reward

    rewards = []
    for spec in specs:
        if crew is not None and _is_teacher(spec):
            described = crew.ask(partial(_described, spec=spec, timeout=timeout, device=device))
            rewards.append(Reward(_elsewhere, timeout=timeout, unclear=True, **described))
            rewards[-1].load = partial(_load_once, spec, timeout, device)
        else:
            rewards.append(load_reward(spec, timeout, device))
    return rewards


def _described(_: Any, spec: str, timeout: float | None, device: str | None) -> dict[str, Any]:
    reward = _load_once(spec, timeout, device)
    return {name: getattr(reward, name) for name in ("name", "source", "version", "dimensions", "needs_fps")}


def _elsewhere(videos: Any, prompts: Any, fps: Any = None) -> Any:
    raise PrismError("This reward is loaded by other processes.")


def check_alone(command: str) -> None:
    """Refuse to run a command as several processes that would all write its folder."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count not in ("", "0", "1"):
        raise PrismError(
            f"prism {command} works in one process, and WORLD_SIZE says {quoted(count, 40)}; start it without torchrun "
            "or accelerate launch."
        )


def describe(backbone: Any, name: str) -> dict[str, Any]:
    """The "backbone" entry of metrics.json: its name and fingerprint."""
    return {"name": name, **backbone.fingerprint()}
