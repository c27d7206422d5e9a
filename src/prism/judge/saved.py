"""A judge as a folder: config, weights, a model card, accuracies, a reference; written, read and checked."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from prism import files, runs
from prism.backbone import Backbone
from prism.backbone.fingerprint import fits
from prism.errors import PrismError, number, quoted, whole
from prism.judge import hub
from prism.judge.head import AGGREGATIONS, LARGEST, OPTIONS, QueryHead
from prism.judge.reference import Reference

if TYPE_CHECKING:
    from prism.judge.judge import Judge

FORMAT, SCHEMAS = "prism-head", (1, 2)
PLANS = "plans.json"  # of `prism plan`, which `prism.sampling.plan_files` reads
DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True)
class SavedJudge:
    """A judge's folder, read and checked, not yet put onto a backbone; ``heads`` are (tap, head, share)."""

    folder: Path
    heads: Sequence[tuple[int, QueryHead, float]]
    dimensions: Sequence[str]
    eta: float
    trained_on: Mapping[str, Any]
    calibration: Mapping[str, Any]
    backbone: Mapping[str, Any]
    evaluation: Sequence[Mapping[str, Any]]
    reference: Reference | None
    plans: Mapping[str, Any] | None = None

    @property
    def last_tap(self) -> int:
        return max(tap for tap, _, _ in self.heads)


def write(
    judge: Judge,
    folder: str | os.PathLike[str],
    overwrite: bool,
    evaluation: Sequence[Mapping[str, Any]],
    licence: str | None,
    base_model: str | None,
) -> None:
    """Write a judge's folder, which appears whole. With `overwrite` it replaces a judge's folder, and no other.

    base_model: on the Hub; None: where the pipeline was loaded from.
    """
    config = describe(judge) | {"trained_on": judge.trained_on}
    tensors = {
        f"{index}.{name}" if config["schema"] == 2 else name: value
        for index, member in enumerate(judge.members)
        for name, value in member.head.state_dict().items()
    }
    _check_plain(config, "What the judge was trained on")
    _check_plain(evaluation, "The evaluation of the judge")
    for name, value in (("license", licence), ("base_model", base_model)):
        if value is not None and (not isinstance(value, str) or not value.strip() or not value.isprintable()):
            raise PrismError(f"{name} must be a text; found {quoted(value, 80)}.")
    _check_trained_on(config["trained_on"], "what the judge was trained on")
    with runs.new(folder, overwrite, FORMAT) as temporary:
        weights = temporary / "model.safetensors"
        # Copies: an average may hold a head twice, and files do not share memory.
        save_file({name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}, weights)
        digest = files.sha256(weights)
        files.write_json(temporary / "config.json", {**config, "weights_sha256": digest})
        if judge.reference is not None:
            judge.reference.save(temporary, digest)
        if judge.plans is not None:
            files.write_json(temporary / PLANS, judge.plans)
        origin = base_model or hub.origin(judge.backbone.pipe)
        note_evaluation(temporary, evaluation, licence, origin, judge.reference)


def note_evaluation(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    licence: str | None = None,
    base_model: str | None = None,
    reference: Reference | None = None,
) -> None:
    """Write accuracies beside a head, where there are any, and the model card that shows them."""
    if rows:
        files.write_json(folder / "evaluation.json", {"accuracy": list(rows)})
    with files.new_file(folder / "README.md") as card:
        text = hub.model_card(files.read_json(folder / "config.json"), rows, licence, base_model, reference)
        card.write_text(text, encoding="utf-8")


def note_reference(folder: Path, reference: Reference) -> Path:
    """Write a reference into a head's folder, and into its model card; returns the path of reference.json."""
    path = reference.save(folder, files.read_json(folder / "config.json")["weights_sha256"])
    card = folder / "README.md"
    with contextlib.suppress(OSError, UnicodeDecodeError):  # a user may have removed it, or written another
        text = hub.with_reference(card.read_text(encoding="utf-8"), reference)
        with files.new_file(card) as work:
            work.write_text(text, encoding="utf-8")
    return path


def read(source: str | os.PathLike[str], revision: str | None, token: str | bool | None = None) -> SavedJudge:
    """Read a judge's folder, or its snapshot from the Hub.

    Raises PrismError where a file is missing, truncated, altered or a pickle, or describes no possible judge.
    """
    folder = _locate(source, revision, token)
    path, weights = folder / "config.json", folder / "model.safetensors"
    config = files.read_json(path)
    schema = config.get("schema") if isinstance(config, dict) and config.get("format") == FORMAT else None
    if type(schema) is not int or schema not in SCHEMAS:
        raise PrismError(f"The file {path} does not describe a PRISM head of schema {' or '.join(map(str, SCHEMAS))}.")
    several = schema == 2
    entries = field(config, "members", list, path) if several else [config]
    dimensions, eta, trained_on, fingerprint = described(config, path)
    heads = [_head(entry, len(dimensions), several, path) for entry in entries]
    if not heads:
        raise PrismError(f"The field 'members' of {path} lists no head.")
    if abs(sum(share for _, _, share in heads) - 1) > 1e-3:
        raise PrismError(f"The shares of the members in {path} must add up to 1.")
    saved = SavedJudge(
        folder,
        heads,
        dimensions,
        eta,
        trained_on,
        _calibration(config.get("calibration"), dimensions, path),
        fingerprint,
        _evaluation(folder / "evaluation.json"),
        _reference(folder / "reference.json", dimensions, config.get("weights_sha256")),
        _plans(folder / PLANS),
    )
    # Before the tensors: the header tells a pickle from a truncated file.
    header = _by_member(files.safetensors_header(weights), several)
    for index, (_, head, _) in enumerate(heads):
        stored = header.pop(str(index), {})
        head.check_shapes({name: shape for name, (_, shape) in stored.items()}, weights)
        for name, (dtype, _) in stored.items():
            if dtype not in DTYPES:
                raise PrismError(
                    f"The tensor {name} in {weights} is {dtype}; a head's are {', '.join(DTYPES.values())}."
                )
    if header:
        raise PrismError(
            f"The file {weights} holds tensors of a member {quoted(min(header), 80)}, which its config.json does not "
            "list."
        )
    tensors = _by_member(files.load_safetensors(weights), several)
    if files.sha256(weights) != config.get("weights_sha256"):
        raise PrismError(f"The file {weights} is not the one its config.json was written for; it was altered.")
    for index, (_, head, _) in enumerate(heads):
        head.load_tensors(tensors[str(index)], weights)
        head.eval()
    return saved


def check_fingerprint(saved: SavedJudge, backbone: Backbone) -> None:
    """Refuse a backbone that the heads cannot be used on; warn of one on which they may be less accurate."""
    refusals, differences = fits(saved.backbone, backbone)
    for trained, loaded in refusals:
        raise PrismError(
            f"The head in {saved.folder} was trained on the {trained}, this pipeline has {loaded}; load the backbone "
            "it was trained on."
        )
    for clause in differences:
        warnings.warn(
            f"The head in {saved.folder} was trained on {clause}; check its accuracy on this backbone before relying "
            "on it.",
            stacklevel=3,
        )


# -- config.json, field by field


def describe(judge: Judge) -> dict[str, Any]:
    """Describe a judge apart from its weights and its training, as JSON."""
    members = [
        {**{name: getattr(member.head, name) for name in OPTIONS}, "tap": member.tap, "share": member.share}
        for member in judge.members
    ]
    single = [member["share"] for member in members] == [1.0]
    if single:
        del members[0]["share"]
    return {
        "format": FORMAT,
        "schema": 1 if single else 2,
        **(members[0] if single else {"members": members}),
        "dimensions": list(judge.dimensions),
        "eta": judge.eta,
        "backbone": judge.backbone.fingerprint(),
        **({"calibration": judge.calibration} if judge.calibration else {}),
    }


def described(config: Mapping[str, Any], path: Path) -> tuple[list[str], float, dict[str, Any], Mapping[str, Any]]:
    """Read the fields of every judge's config.json: dimensions, eta, training provenance, backbone's fingerprint."""
    _check_plain(config, f"The file {path}")
    return (
        _dimensions(config, path),
        number(f"The field 'eta' of {path}", field(config, "eta", object, path), 1.0, 1e6, above=True),
        _check_trained_on(field(config, "trained_on", object, path), path) or {},
        _fingerprint(field(config, "backbone", dict, path), path),
    )


def field(config: Mapping[str, Any], name: str, kind: type, path: Path) -> Any:
    """Return a required field of this type."""
    if name not in config:
        raise PrismError(f"The file {path} lacks the field {name!r}.")
    if not isinstance(config[name], kind):
        words = "an object" if kind is dict else "a list" if kind is list else "a text"
        raise PrismError(f"The field {name!r} of {path} must be {words}; found {quoted(config[name], 80)}.")
    return config[name]


def _head(entry: Any, num_dimensions: int, several: bool, path: Path) -> tuple[int, QueryHead, float]:
    """Make a (tap, head, share) of the size that its entry states, without weights."""
    if not isinstance(entry, dict):
        raise PrismError(f"The field 'members' of {path} must list objects; found {quoted(entry, 80)}.")

    def label(name: str) -> str:
        return f"The field {name!r} of {path}"

    sizes = {name: whole(label(name), field(entry, name, object, path), 1, most) for name, most in LARGEST.items()}
    chunk_size = entry.get("chunk_size")
    if chunk_size is not None:
        chunk_size = whole(label("chunk_size"), chunk_size, 1, 2**31)
    aggregation = field(entry, "aggregation", str, path)
    if aggregation not in AGGREGATIONS:
        raise PrismError(
            f"{label('aggregation')} must be one of {', '.join(AGGREGATIONS)}; found {quoted(aggregation, 80)}."
        )
    if sizes["num_dimensions"] != num_dimensions:
        raise PrismError(
            f"{label('num_dimensions')} is {sizes['num_dimensions']}, and 'dimensions' names {num_dimensions} of them."
        )
    tap = whole(label("tap"), field(entry, "tap", object, path), 1, 2**16)
    share = number(label("share"), field(entry, "share", object, path), 0.0, 1.0, above=True) if several else 1.0
    with torch.device("meta"):  # no memory, and no draw from the global generator
        return tap, QueryHead(**sizes, aggregation=aggregation, chunk_size=chunk_size), share


def _dimensions(config: Mapping[str, Any], path: Path) -> list[str]:
    names: list[str] = field(config, "dimensions", list, path)
    bad = [name for name in names if not isinstance(name, str) or not name.strip() or not name.isprintable()]
    if bad or not names or len(set(names)) != len(names) or max(map(len, names)) > 100:
        raise PrismError(
            f"The field 'dimensions' of {path} must list different names of up to 100 characters; found "
            f"{quoted(names, 80)}."
        )
    return names


def _calibration(value: Any, dimensions: Sequence[str], path: Path) -> dict[str, dict[str, float | None]]:
    """Check a calibration: dimension -> {"temperature", "eta", "tie_threshold"}."""
    calibration = {} if value is None else value
    if not isinstance(calibration, dict) or not calibration.keys() <= set(dimensions):
        raise PrismError(
            f"The field 'calibration' of {path} must be an object with a field for each of {', '.join(dimensions)}; "
            f"found {quoted(value, 80)}."
        )
    for name, fields in calibration.items():
        where = f"of the calibration of {name} in {path}"
        if not isinstance(fields, dict) or not {"temperature", "eta"} <= fields.keys():
            raise PrismError(f"The fields 'temperature' and 'eta' {where} must be there; found {quoted(fields, 80)}.")
        number(f"The field 'temperature' {where}", fields["temperature"], 0.0, 1e6, above=True)
        number(f"The field 'eta' {where}", fields["eta"], 1.0, 1e6, above=True)
        if fields.get("tie_threshold") is not None:
            number(f"The field 'tie_threshold' {where}", fields["tie_threshold"])
    return calibration


def _fingerprint(backbone: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    for name in ("denoiser", "vae"):
        if backbone.get(name) is None:
            raise PrismError(f"The field 'backbone' of {path} lacks {name!r}, the class that the head belongs to.")
    for name, value in backbone.items():
        table = name in ("needs", "settings")
        parts = value.values() if isinstance(value, dict) else [None]
        if not (all(isinstance(part, dict) for part in parts) if table else isinstance(value, str | None)):
            words = "an object of objects" if table else "a text"
            raise PrismError(f"The field {quoted(name, 40)} of the backbone in {path} must be {words}.")
    return backbone


def _check_trained_on(value: Any, where: Any) -> Any:
    """Check the fields of `trained_on` that evaluation and scoring read; return `value` unchanged."""
    if value is not None and not isinstance(value, dict):
        raise PrismError(f"The field 'trained_on' of {where} must be an object; found {quoted(value, 80)}.")
    fields = value or {}
    config = fields.get("config")
    low, high = (config.get(name) for name in ("t_low", "t_high")) if isinstance(config, dict) else (None, None)
    wrong = {
        "prompt_keys": "a list of texts" if not _all(fields.get("prompt_keys", []), str) else "",
        "members": "a list of objects" if not _all(fields.get("members", []), dict) else "",
        "config": "an object" if not isinstance(config, dict | None) else "",
        "seed": "a whole number" if not isinstance(fields.get("seed"), int | None) else "",
        "source": "a text" if not isinstance(fields.get("source"), str | None) else "",
        "config.t_low and .t_high": "numbers"
        if not all(isinstance(t, int | float | None) for t in (low, high))
        else "",
    }
    for name, words in wrong.items():
        if words:
            raise PrismError(f"The field 'trained_on.{name}' of {where} must be {words}.")
    for member in fields.get("members", []):
        _check_trained_on(member, where)
    return value


def _all(value: Any, kind: type) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, kind) for item in value)


def _check_plain(value: Any, name: str) -> None:
    """Refuse values that JSON cannot hold: NaN, texts that are not Unicode, nesting without end."""
    try:
        json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise PrismError(f"{name} holds what is no plain JSON: {quoted(error, 120)}.") from error


def _evaluation(path: Path) -> list[dict[str, Any]]:
    """Read the accuracies beside a head. Folders of earlier versions, and of heads not yet measured, have none."""
    if not os.path.lexists(path):
        return []
    evaluation = files.read_json(path)
    _check_plain(evaluation, f"The file {path}")
    return hub.check_rows(
        evaluation.get("accuracy") if isinstance(evaluation, dict) else None, f"The accuracy in {path}"
    )


def _reference(path: Path, dimensions: Sequence[str], weights_sha256: Any) -> Reference | None:
    return Reference.read(path, dimensions, weights_sha256) if os.path.lexists(path) else None


def _plans(path: Path) -> dict[str, Any] | None:
    plans = files.read_json(path) if os.path.lexists(path) else None
    if not isinstance(plans, dict | None):
        raise PrismError(f"The file {path} holds no plans; delete it, or write it anew with prism plan --save-to.")
    return plans


def _by_member(tensors: Mapping[str, Any], several: bool) -> dict[str, dict[str, Any]]:
    """Group values by the index of the member whose tensors they describe, under the names that its head uses."""
    members: dict[str, dict[str, Any]] = {}
    for name, value in tensors.items():
        index, _, inner = name.partition(".") if several else ("0", "", name)
        members.setdefault(index, {})[inner] = value
    return members


def _locate(source: str | os.PathLike[str], revision: str | None, token: str | bool | None) -> Path:
    """The local folder of a head: `source` itself, or its snapshot from the Hub."""
    try:
        folder = Path(source)
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, TypeError, ValueError) as error:  # a name that is too long or contains a null character
        raise PrismError(
            f"The head folder {quoted(source, 80)} cannot be read: {getattr(error, 'strerror', None) or error}."
        ) from error
    if is_folder:
        inner = folder / "head"  # of a run's folder
        folder = inner if inner.is_dir() else folder
        if not os.path.lexists(folder / "config.json"):
            raise PrismError(
                f"The folder {folder} holds no head: its config.json does not exist; name the folder that prism train "
                "wrote."
            )
        return folder
    if exists:
        raise PrismError(f"A head is a folder with config.json and model.safetensors, but {folder} is a file.")
    if not hub.REPOSITORY.fullmatch(str(source)):
        raise PrismError(
            f"The head folder {folder} does not exist; name the folder that prism train wrote, or an id on the Hub "
            "(owner/name)."
        )
    return hub.fetch(str(source), revision, token)
