"""Plans as files: what `prism plan` writes, what `best_of_n` and `prism sample` read, and whether a plan fits a run.

A document has the format "prism-plans": the backbone, call and head that its plans were measured with, and a list of
plans with their budget, number of candidates, settings, cost and quality. It lies in plan.json of a run's folder, or in
plans.json of a head's.
"""

from __future__ import annotations

import difflib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from prism import files
from prism.backbone import Backbone
from prism.backbone.arguments import normalised
from prism.backbone.fingerprint import fits
from prism.errors import DRAWS, PrismError, number, quoted, whole
from prism.judge.scoring import head_digest
from prism.sampling import looks, planner
from prism.sampling.plan import Plan, Workload
from prism.sampling.planner import Run
from prism.sampling.strategies import STRATEGIES

FORMAT, SCHEMA = "prism-plans", 1
FILE, FILE_OF_HEAD = "plan.json", "plans.json"
Source = str | os.PathLike[str] | Mapping[str, Any]
_TEXTS = ("family", "head")
_NEAR = 1e-9


@dataclass(frozen=True)
class Filed:
    """A plan that was read or made for a budget.

    where: where it comes from, in words; a sentence where that is no file. budget: the one it was measured for; None
    where it was not. document: the whole file; None where it comes from none.
    """

    run: Run
    where: str
    budget: float | None = None
    document: Mapping[str, Any] | None = None

    def sentence(self) -> str:
        """What the plan is and where it comes from, for people."""
        plan, n = self.run.plan, self.run.n
        words = [f"{n} candidate{'s' if n > 1 else ''}", plan.strategy, *differing(plan)]
        start = self.where
        if self.budget is not None:
            start = f"The plan for a budget of {self.budget:g} plain samples, from {self.where}"
        return f"{start}: {', '.join(words)}."


def settings_of(plan: Plan) -> dict[str, Any]:
    """The fields of a plan as JSON."""
    settings: dict[str, Any] = json.loads(json.dumps({field.name: getattr(plan, field.name) for field in fields(plan)}))
    return settings


def differing(plan: Plan) -> list[str]:
    """The settings of a plan that are not its strategy's defaults, in words: ["keep 1", "schedule 3:4,6:1"]."""
    defaults, settings = settings_of(type(plan)()), settings_of(plan)
    if plan.strategy != "early" and settings.get("judge_at") == looks.DEFAULT_JUDGE_AT:
        del settings["judge_at"]
    return [f"{name} {_shown(value)}" for name, value in settings.items() if value != defaults[name]]


def document(about: Mapping[str, Any], plans: Sequence[Mapping[str, Any]], **extra: Any) -> dict[str, Any]:
    """The document of some plans.

    about: family, backbone (its fingerprint), call, num_inference_steps and head (its digest), with which they were
    measured. plans: each with budget, strategy, settings, n, cost, and what was measured of it.
    """
    names = ("family", "backbone", "call", "num_inference_steps", "head")
    return {
        "format": FORMAT,
        "schema": SCHEMA,
        **{name: about[name] for name in names},
        **extra,
        "plans": [dict(plan) for plan in plans],
    }


def read(source: Source) -> tuple[dict[str, Any], str]:
    """A checked document, and its place in words.

    source: plan.json or a folder that holds one (of a run) or plans.json (of a head), or the document itself.
    Raises PrismError for anything else, another version, and plans of unknown strategies or settings.
    """
    if isinstance(source, Mapping):
        return check(dict(source), "the plan"), "the plan"
    path = _located(Path(source))
    where = f"the file {files.shown(path)}"
    return check(files.read_json(path), where), where


def check(content: Any, where: str) -> dict[str, Any]:
    """The document, if every field of it can be used."""
    start = where[0].upper() + where[1:]
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise PrismError(f"{start} holds no plans; name a plan.json that prism plan wrote.")
    if content.get("schema") != SCHEMA:
        raise PrismError(
            f"{start} has schema {quoted(content.get('schema'), 60)}; this version of prism reads schema {SCHEMA}."
        )
    for name in _TEXTS:
        if not isinstance(content.get(name), str):
            raise PrismError(f"The field {name!r} of {where} must be a text; found {quoted(content.get(name), 60)}.")
    for name in ("backbone", "call"):
        if not isinstance(content.get(name), dict):
            raise PrismError(f"The field {name!r} of {where} must be an object; found {quoted(content.get(name), 60)}.")
    whole(f"The field 'num_inference_steps' of {where}", content.get("num_inference_steps"))
    plans = content.get("plans")
    if not isinstance(plans, list) or not plans or not all(isinstance(plan, dict) for plan in plans):
        raise PrismError(f"The field 'plans' of {where} must list plans; found {quoted(plans, 60)}.")
    for row, plan in enumerate(plans, 1):
        budget = number(f"The budget of plan {row} of {len(plans)} in {where}", plan.get("budget"), 1)
        name = f"the plan for budget {budget:g} in {where}"
        number(f"The cost of {name}", plan.get("cost"), 0)
        run_of(plan, content["num_inference_steps"], name)
    return content


def run_of(plan: Mapping[str, Any], num_steps: int, where: str) -> Run:
    """The run that an entry of a document describes. Raises PrismError for one that is none."""
    strategy, settings = plan.get("strategy"), plan.get("settings")
    n = whole(f"The number n of {where}", plan.get("n"), 1, 10_000)
    if not isinstance(strategy, str) or strategy not in STRATEGIES:
        raise PrismError(
            f"The strategy of {where} is {quoted(strategy, 60)}; this version of prism has {', '.join(STRATEGIES)}."
        )
    kind = STRATEGIES[strategy]
    if kind.needs_oracle():
        raise PrismError(f"The strategy of {where} is {strategy}, which needs a function that no file holds.")
    names = [field.name for field in fields(kind)]
    if not isinstance(settings, dict):
        raise PrismError(f"The settings of {where} must be an object; found {quoted(settings, 100)}.")
    for foreign in settings.keys() - set(names):
        near = difflib.get_close_matches(str(foreign), names, 1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names) or 'none'}."
        raise PrismError(f"The strategy {strategy} of {where} has no setting {quoted(foreign, 60)}; {hint}")
    try:
        made = kind(**settings)
        if getattr(made, "judge_at", None) is not None:
            number("judge_at", made.judge_at, 0, 1000, above=True)  # type: ignore[attr-defined]
        if hasattr(made, "num_draws"):
            whole("num_draws", made.num_draws, 1, DRAWS)
        made = made.checked(n, 1, num_steps, {})
        made.settled(Workload(n, (2,) * num_steps))
    except PrismError as error:
        raise PrismError(f"The settings of {where} cannot be used: {error}") from error
    except (TypeError, ValueError) as error:
        raise PrismError(f"The settings of {where} cannot be used: {quoted(error, 100)}.") from error
    return Run(n, made)


def opened(plan: Plan | Source | None, budget: float | None = None) -> Filed | None:
    """The plan that a document holds for a budget in costs of one plain sample; None where `plan` is no document.

    budget: None: the document must hold a single plan. Raises PrismError for a budget beside a `Plan`.
    """
    budget = None if budget is None else checked_budget(budget)
    if isinstance(plan, str | os.PathLike | Mapping):
        content, where = read(plan)
        return _chosen(content, where, budget)
    if isinstance(plan, Plan) and budget is not None:
        raise PrismError("A budget chooses among the plans of a file, and plan is a single one; leave one of them out.")
    return None


def within(budget: float, backbone: Backbone, judge: Any, call: Mapping[str, Any]) -> Filed:
    """The plan for a budget where no file is named.

    It is one of those that the head carries; else the default cut of early, with as many candidates as fit.
    """
    budget = checked_budget(budget)
    carried = getattr(judge, "plans", None)
    if carried is not None:
        where = "the plans that the head carries"
        content = check(carried, where)
        steps_differ = content["num_inference_steps"] != backbone.num_inference_steps(dict(call))
        if not steps_differ and min(plan["cost"] for plan in content["plans"]) <= budget + _NEAR:
            return _chosen(content, where, budget)
    whole_call = {**normalised(dict(call)), "output_type": "latent"}
    steps = backbone.steps({**whole_call, **backbone.batch([""], [0], whole_call)})
    load = Workload.of(backbone, call, 1, getattr(judge, "tap", 0), steps)
    weights = {"overall": 1.0} if "overall" in judge.dimensions else dict.fromkeys(judge.dimensions, 1.0)
    load = replace(load, looks=looks.defaults(backbone, judge, weights, steps, looks.DEFAULT_JUDGE_AT))
    if carried is None:
        why = "The head carries no plans"
    elif steps_differ:
        why = f"The plans that the head carries are for {content['num_inference_steps']} steps"
    else:
        why = "All plans that the head carries cost more"
    where = f"{why}: the default cut, with as many candidates as {budget:g} plain samples pay for"
    return Filed(planner.largest(load, budget, steps), where)


def checked_budget(budget: Any) -> float:
    """A budget in costs of one plain sample. Raises PrismError for one that does not pay for a sample."""
    value = number("budget", budget)
    if value < 1:
        raise PrismError(f"budget is {value:g} plain samples, and one video costs 1; give 1 or more.")
    return value


def check_fits(plan: Filed, backbone: Backbone, judge: Any, call: Mapping[str, Any]) -> None:
    """Refuse a plan that was measured on another family, architecture or number of steps; warn of another call or head.

    Plans that come from no document fit every run.
    """
    content = plan.document
    if content is None:
        return
    start = plan.where[0].upper() + plan.where[1:]
    family, steps = content["family"], content["num_inference_steps"]
    if family != backbone.family.name:
        raise PrismError(
            f"{start} is for {quoted(family, 60)}, and this pipeline is of the family {backbone.family.name}; plan "
            "anew with prism plan."
        )
    for was, present in fits(content["backbone"], backbone)[0]:
        raise PrismError(f"{start} is for the {was}, and this pipeline has {present}; plan anew with prism plan.")
    asked = backbone.num_inference_steps(dict(call))
    if asked != steps:
        raise PrismError(
            f"{start} is for {steps} steps, and this call makes {asked}; call with num_inference_steps={steps} "
            f"(--steps {steps}), or plan anew with prism plan."
        )
    for name in ("guidance_scale", "height", "width", "num_frames"):
        was, now = (each.get(name, backbone.default(name)) for each in (content["call"], call))
        if was != now:
            warnings.warn(
                f"{start} was measured with {name} {was}, and this call has {now}: another plan may be better.",
                stacklevel=3,
            )
    if plan.run.plan.needs_judge() and hasattr(judge, "members") and head_digest(judge) != content["head"]:
        warnings.warn(f"{start} was measured with another head: another plan may be better.", stacklevel=3)


def _chosen(content: Mapping[str, Any], where: str, budget: float | None) -> Filed:
    plans = sorted(content["plans"], key=lambda plan: (plan["budget"], plan["cost"]))
    if budget is None:
        if len(plans) > 1:
            budgets = ", ".join(f"{plan['budget']:g}" for plan in plans)
            raise PrismError(f"{where[0].upper() + where[1:]} holds plans for the budgets {budgets}; name a budget.")
        affordable = plans
    else:
        affordable = [plan for plan in plans if plan["cost"] <= budget + _NEAR]
        fitting = [plan for plan in affordable if plan["budget"] <= budget + _NEAR]
        affordable = fitting or affordable[:1]
    if not affordable:
        raise PrismError(
            f"{where[0].upper() + where[1:]} holds no plan within the budget {budget:g}; the cheapest costs "
            f"{min(plan['cost'] for plan in plans):.3g} plain samples."
        )
    plan = affordable[-1]
    return Filed(run_of(plan, content["num_inference_steps"], where), where, plan["budget"], content)


def _located(path: Path) -> Path:
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:
        raise PrismError(f"The plan {quoted(str(path), 120)} cannot be read: {quoted(error, 80)}.") from error
    if not is_folder:
        if not exists:
            raise PrismError(f"The plan {files.shown(path)} does not exist; name a plan.json that prism plan wrote.")
        return path
    for each in (path / FILE, path / FILE_OF_HEAD, path / "head" / FILE_OF_HEAD):
        if each.is_file():
            return each
    raise PrismError(f"The folder {files.shown(path)} holds no {FILE}; name one that prism plan wrote.")


def _shown(value: Any) -> str:
    """A setting in words: cuts as 3:4,6:1."""
    if isinstance(value, list) and value and all(isinstance(cut, list) and len(cut) == 2 for cut in value):
        return ",".join(f"{step}:{keep}" for step, keep in value)
    return f"{value:g}" if isinstance(value, int | float) else str(value)
