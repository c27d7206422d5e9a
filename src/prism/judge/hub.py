"""A judge on the Hub: upload, download and model card. Only safetensors and JSON are downloaded."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, errors, snapshot_download

from prism.backbone.pipeline import config_of
from prism.errors import PrismError, listed, number, quoted, whole
from prism.judge.checks import trained_range

if TYPE_CHECKING:
    from prism.judge.reference import Reference

OPTIONAL = ["evaluation.json", "reference.json", "plans.json"]  # files that only some heads have
FETCHED = ["config.json", "model.safetensors", *OPTIONAL]
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})")  # of the Hub's cache


# -- upload and download


def upload(
    folder: Path,
    repo_id: str,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
) -> str:
    """Make the repository (and its branch `revision`) where it is missing, and put a judge's folder there as one
    commit; return the commit's address.
    """
    if not isinstance(repo_id, str) or not REPOSITORY.fullmatch(repo_id):
        raise PrismError(f'The repository on the Hub must be named "user/name"; found {quoted(repo_id, 80)}.')
    try:
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            delete_patterns=OPTIONAL,  # such files in the repository belong to earlier weights
        )
    except Exception as error:  # the Hub's client raises many kinds
        raise PrismError(f"The judge did not reach {repo_id} on the Hub: {why(error, revision)}.") from error
    return commit.commit_url


def fetch(repo_id: str, revision: str | None, token: str | bool | None) -> Path:
    """Download a judge's repository; return its snapshot in the Hub's cache."""
    try:
        folder = Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=FETCHED))
    except Exception as error:  # the Hub's client raises many kinds
        raise PrismError(
            f"There is no folder {repo_id}, and no head of this name came from the Hub: {why(error, revision)}."
        ) from error
    if not (folder / "config.json").is_file():
        raise PrismError(f"The repository {repo_id} on the Hub holds no head: it has no config.json.")
    return folder


def why(error: Exception, revision: str | None) -> str:
    """Explain an error of the Hub's client in a clause."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no revision {quoted(revision, 80)}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the repository does not exist, or it is private or gated and the token gives no access to it"
    if status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError):
        return "the token is missing or gives no such right; log in with `hf auth login`, or give token="
    if any(isinstance(each, errors.OfflineModeIsEnabled) for each in (error, error.__cause__)):
        return "HF_HUB_OFFLINE forbids network access"
    if isinstance(error, errors.LocalEntryNotFoundError) or "Connect" in type(error).__name__:
        return "the Hub cannot be reached; check the network"
    return quoted((str(error).strip() or type(error).__name__).splitlines()[0], 200).rstrip(".")


# -- model card


def check_rows(rows: Any, where: str) -> list[dict[str, Any]]:
    """Check and copy the rows "accuracy" of metrics.json, as `prism.evaluate` returns them."""
    checked = listed(where, rows, Mapping, "the rows that prism.evaluate returns")
    for index, row in enumerate(checked):
        name = f"{where}, row {index}:"
        number(f"{name} t", row.get("t"), 0, 1000)
        for field in ("pairs", "prompts"):
            whole(f"{name} {field}", row.get(field), 0)
        for field in ("dimension", "set"):
            if not isinstance(row.get(field), str) or not row[field].isprintable() or "|" in row[field]:
                raise PrismError(f"{name} {field} must be a name; found {quoted(row.get(field), 80)}.")
        interval = row.get("without_ties_ci95")
        if interval is not None and (not isinstance(interval, list | tuple) or len(interval) != 2):
            raise PrismError(f"{name} without_ties_ci95 must be [low, high] or null; found {quoted(interval, 80)}.")
        for value in (row.get("without_ties"), *(interval or ())):
            if value is not None:
                number(f"{name} without_ties and its interval", value, 0, 1)
    return [dict(row) for row in checked]


def origin(pipe: Any) -> str | None:
    """The repository that a pipeline was loaded from, "user/name" or "user/name@commit"; None where it has none."""
    names = [_name(pipe), *(_name(part) for part in getattr(pipe, "components", {}).values())]
    for name in names:
        if snapshot := _SNAPSHOT.search(Path(name).as_posix()):
            return "{}/{}@{}".format(*snapshot.groups())
    return next((name for name in names[:1] if REPOSITORY.fullmatch(name) and not os.path.exists(name)), None)


def _name(part: Any) -> str:
    name = config_of(part).get("_name_or_path") or getattr(part, "name_or_path", "")
    return name if isinstance(name, str) else ""


def model_card(
    config: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    licence: str | None,
    base_model: str | None,
    reference: Reference | None = None,
) -> str:
    """README.md of a head, from its config.json, the rows of its evaluation and its reference.

    base_model: "user/name" or "user/name@revision"; None where unknown.
    """
    backbone, trained_on = config["backbone"], config["trained_on"]
    pipeline = str(backbone.get("pipeline"))
    model, _, revision = (base_model or "").partition("@")
    loaded = f'"{model}"' + (f', revision="{revision}"' if revision else "") if model else "..."
    loading = f"from diffusers import {pipeline}\n\npipe = {pipeline}.from_pretrained({loaded})"
    members = config.get("members", [config])
    low, high = trained_range(trained_on)
    data = ModelCardData(
        library_name="prism",
        license=licence,
        base_model=model or None,
        tags=["prism", "diffusers", "reward-model", "video-generation"],
        model_name=f"PRISM head for {backbone.get('denoiser')}",
        eval_results=_results(rows) or None,
    )
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        taps=" and ".join(str(tap) for tap in sorted({member["tap"] for member in members})),
        heads="\n".join(HEAD.format(**member) for member in members),
        eta=f"{config['eta']:g}",
        dimensions=", ".join(config["dimensions"]),
        denoiser=backbone.get("denoiser"),
        pipeline=pipeline,
        vae=backbone.get("vae"),
        loading=loading if hasattr(diffusers, pipeline) else f"\npipe = {pipeline}(...)",
        base_model=(f"{model}, revision {revision}" if revision else model) or "not known: not loaded from the Hub",
        data=_data(trained_on),
        levels=f"t from {low:g} to {high:g}, of 0 (clean) to 1000 (noise)",
        accuracy=_accuracy(rows, config["dimensions"]),
        reference="" if reference is None else f"{_reference(reference)}\n",
        # The prompts' hashes are for the leak check, not for reading.
        trained_on=json.dumps(
            {name: value for name, value in trained_on.items() if name != "prompt_keys"}, indent=2, ensure_ascii=False
        ),
    )
    return f"{card}\n"


def with_reference(card: str, reference: Reference) -> str:
    """A head's README.md with its section on a reference in place of an earlier one; all else stays as it is."""
    section = f"{_reference(reference)}\n"
    if (earlier := re.search(r"^## Reference\n.*?(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)) is not None:
        return card[: earlier.start()] + section + card[earlier.end() :]
    limits = re.search(r"^## Known limits$", card, re.MULTILINE)
    return card[: limits.start()] + section + card[limits.start() :] if limits else f"{card.rstrip()}\n\n{section}"


def _reference(reference: Reference) -> str:
    """The section on a reference: its set, and by level and dimension the interval and the median of its scores."""
    facts, intervals = reference.facts, reference.intervals()
    store = facts.get("store")
    name = store.get("name") if isinstance(store, Mapping) else None
    origin = f'split {quoted(str(facts.get("split")), 60)} of the store "{quoted(str(name), 60)}"'
    prompts, draws = (_count(facts.get(each)) for each in ("prompts", "num_draws"))
    lines = [f"| t | {' | '.join(reference.dimensions)} |", "|---" * (len(reference.dimensions) + 1) + "|"]
    for t, by_name in intervals.items():
        cells = (f"{low:+.2f} to {high:+.2f}, median {middle:+.2f}" for low, middle, high in by_name.values())
        lines.append(f"| {t} | {' | '.join(cells)} |")
    words = (
        f"Scores of {len(reference.prompts):,} clips of {prompts} prompts ({origin}), means over {draws} noise draws.\n"
        "`prism score` reads other clips beside those in `reference.json`. The interval that holds 95 % of them:"
    )
    return "\n".join(("## Reference", "", words, "", *lines, ""))


def _count(value: Any) -> str:
    """A whole number from a file, or that it is not known."""
    return f"{value:,}" if type(value) is int else "an unknown number of"


def _data(trained_on: Mapping[str, Any]) -> str:
    store = trained_on.get("store")
    name = store.get("name") if isinstance(store, Mapping) else store
    counts = [f"{trained_on[key]:,} {key}" for key in ("pairs", "prompts") if type(trained_on.get(key)) is int]
    return " of ".join([*counts, *([f'the store "{name}"'] if isinstance(name, str) else [])]) or "not known"


def _results(rows: Iterable[Mapping[str, Any]]) -> list[EvalResult]:
    """Accuracy without ties, for the Hub's tables."""
    return [
        EvalResult(
            task_type="reward-modeling",
            dataset_type="preference-pairs",
            dataset_name=f"pairs of the {row['set']} set",
            dataset_split=row["set"],
            metric_type="accuracy",
            metric_name=f"accuracy without ties, {row['dimension']}, t = {row['t']:g}",
            metric_value=row["without_ties"],
            metric_args={"t": row["t"], "dimension": row["dimension"], "ci95": row.get("without_ties_ci95")},
        )
        for row in rows
        if row.get("without_ties") is not None
    ]


def _accuracy(rows: Sequence[Mapping[str, Any]], dimensions: Sequence[str]) -> str:
    """A Markdown table with a line per set and noise level, and a column per dimension."""
    if not rows:
        return "Not measured for this folder: measure it (`prism eval`) before you rely on it."
    lines = [f"| set | t | {' | '.join(dimensions)} | pairs | prompts |", "|---" * (len(dimensions) + 4) + "|"]
    for subset, t in dict.fromkeys((row["set"], row["t"]) for row in rows):
        by_dimension = {row["dimension"]: row for row in rows if (row["set"], row["t"]) == (subset, t)}
        first = next(iter(by_dimension.values()))
        counts = f"{max(row['pairs'] for row in by_dimension.values())} | {first['prompts']}"
        shares = " | ".join(_share(by_dimension.get(name, {})) for name in dimensions)
        lines.append(f"| {subset} | {t:g} | {shares} | {counts} |")
    return "\n".join(lines)


def _share(row: Mapping[str, Any]) -> str:
    share, interval = row.get("without_ties"), row.get("without_ties_ci95")
    if share is None:
        return "-"
    return f"{share:.1%}" + (f" ({interval[0]:.1%} to {interval[1]:.1%})" if interval else "")


TEMPLATE = """---
{{ card_data }}
---

# PRISM head for {{ denoiser }}

A preference head that scores the *noisy* latents of a frozen video diffusion model from its own hidden states after
block {{ taps }}, one score per dimension: {{ dimensions }}. Higher is better; only differences within a prompt mean
something. It holds no part of the backbone ({{ pipeline }}: {{ denoiser }}, {{ vae }}), and goes onto no other classes.

```python
import prism
{{ loading }}  # the backbone it was trained on
judge = prism.Judge.from_pretrained("path/or/id of this head", pipe)
result = prism.best_of_n(pipe, judge, "a prompt", n=8, schedule=[(5, 1)])
```

| | |
|---|---|
| base model | {{ base_model }} |
{{ heads }}
| ties | Bradley-Terry with ties, eta = {{ eta }} |
| trained on | {{ data }} |
| noise levels | {{ levels }} |

## Accuracy

Share of the decided pairs that are judged right at each noise level, with its 95 % bootstrap interval over prompts.
Chance is 50 %.

{{ accuracy }}

{{ reference }}## Known limits

- Scores of different prompts, noise levels or judges cannot be compared.
- It fits this denoiser's and VAE's classes and shapes alone. Other weights, such as a finetune, give a warning:
  measure it there.
- At noise levels it was not trained on, scores mean nothing. The closer to pure noise, the less can be seen.
- It prefers what its labels preferred. Prompts and videos unlike its training data are outside what was measured.

## Trained on

```json
{{ trained_on }}
```

Method: "Through the PRISM: Preference Representation in Intermediate States of Video Diffusion Models",
arXiv 2606.20310.
"""
HEAD = (
    "| head | after block {tap}, tokens of width {width}: {aggregation}, {num_queries} query, {num_heads} heads, "
    "width {dim}, {mlp_layers}-layer MLP |"
)
