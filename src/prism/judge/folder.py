"""A judge as a folder: config.json, model.safetensors and a model card, found, checked and written.

It holds heads alone; what it says about the backbone is a fingerprint, checked when the heads are put onto one. One
head is schema 1, its tensors under their own names; several are schema 2, with a list `members` in config.json and
tensors named `0.query`, `1.query`, ...
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from prism import files
from prism.backbone import Backbone
from prism.backbone.fingerprint import fits
from prism.errors import PrismError
from prism.judge.card import model_card

FORMAT, SCHEMAS = "prism-head", (1, 2)


def write(
    folder: str | os.PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, Tensor], overwrite: bool
) -> None:
    """Write a judge's folder, which appears whole; an existing one is refused unless `overwrite`."""
    with files.new_folder(folder, overwrite) as temporary:
        weights = temporary / "model.safetensors"
        save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, weights)
        sealed = {**config, "weights_sha256": files.sha256(weights)}
        files.write_json(temporary / "config.json", sealed)
        (temporary / "README.md").write_text(model_card(sealed), encoding="utf-8")


def read(source: str | os.PathLike[str], revision: str | None) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """A judge's folder (or its snapshot from the Hub), its config.json and its tensors.

    A run's folder, in which `prism train` and `prism demo` leave the judge as head/, will do.

    Raises PrismError where a file is missing, truncated, altered or a pickle.
    """
    folder = _locate(source, revision)
    config = files.read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("format") != FORMAT or config.get("schema") not in SCHEMAS:
        raise PrismError(
            f"The file {folder / 'config.json'} does not describe a PRISM head of schema "
            f"{' or '.join(map(str, SCHEMAS))}."
        )
    weights = folder / "model.safetensors"
    tensors = files.load_safetensors(weights)  # first, as it tells a pickle from a truncated file
    if files.sha256(weights) != config.get("weights_sha256"):
        raise PrismError(f"The file {weights} is not the one its config.json was written for; it was altered.")
    return folder, config, tensors


def by_member(tensors: Mapping[str, Tensor], several: bool) -> dict[str, dict[str, Tensor]]:
    """A judge's tensors by the number of the head they belong to, under the head's own names."""
    places: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        place, _, inner = name.partition(".") if several else ("0", "", name)
        places.setdefault(place, {})[inner] = value
    return places


def check_fingerprint(folder: Path, saved: Mapping[str, Any], backbone: Backbone) -> None:
    """Refuse a backbone that the heads cannot be used on; warn of one that may make them less sure."""
    refusals, differences = fits(saved, backbone)
    for was, found in refusals:
        raise PrismError(
            f"The head in {folder} was trained on the {was}, this pipeline has {found}; load the backbone it was "
            "trained on."
        )
    for clause in differences:
        warnings.warn(
            f"The head in {folder} was trained on {clause}; check its accuracy on this backbone before relying on it.",
            stacklevel=3,
        )


def _locate(source: str | os.PathLike[str], revision: str | None) -> Path:
    """The local folder of a head: as given, or its snapshot from the Hub."""
    folder = Path(source)
    if folder.is_dir():
        own = folder / "head"  # of a run's folder
        return own if own.is_dir() else folder
    if folder.exists():
        raise PrismError(f"A head is a folder with config.json and model.safetensors, but {folder} is a file.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise PrismError(f"The head folder {folder} does not exist.")
    from huggingface_hub import snapshot_download

    try:
        wanted = ["config.json", "model.safetensors", "README.md"]
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=wanted))
    except Exception as error:  # the Hub's client raises many kinds: no network, no such repository, no access
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PrismError(
            f"There is no folder {folder}, and no head of this name came from the Hub: {reason}"
        ) from error
