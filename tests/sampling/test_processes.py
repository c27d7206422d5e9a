"""Two processes share the candidates of a prompt, or prompts, and find what one finds."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import forks, tiny
from tests.sampling.conftest import Setting
from tests.sampling.test_candidates import Branches
from tests.sampling.test_not_finite import poisoned
from tests.sampling.test_stopping import reference_of
from tests.works import works

import prism
from prism import team as alive
from prism.errors import PrismError
from prism.judge import Judge
from prism.sampling import STRATEGIES, Race
from prism.team import Team

PROMPTS = [tiny.PROMPT, tiny.OTHER_PROMPT, "a cat runs"]
SHARED: dict[str, Any] = {"n": 5, "seed": 3, "batch_size": 1}
RUNS: dict[str, dict[str, Any]] = {
    "one cut": {"schedule": [(3, 1)]},
    "cuts that leave candidates on one process": {"schedule": [(2, 3), (4, 2)], "seed": 0},
    "the best two": {"schedule": [(2, 4), (3, 2)], "top_k": 2},
    "full": {"strategy": "full", "keep_latents": True},
    "draft": {"strategy": "draft", "draft_steps": 2, "top_k": 2},
    "random": {"strategy": "random"},
    "more processes than candidates": {"schedule": [(3, 1)], "n": 1},
    "branches, all of one process": {"strategy": "branches", "top_k": 2},
    "a race": {"plan": Race(first=2, most_draws=2, each_draws=2), "n": 3},
    "rounds": {"schedule": [(2, 2)], "top_k": 2, "n": 3, "until": 0.9, "max_n": 6},
}
SPOILT: dict[str, dict[str, Any]] = {  # candidates with NaN from the third step on
    "dropped at a cut": {"schedule": [(4, 2)]},
    "dropped in the end": {"strategy": "full", "top_k": 2},
    "winners replaced": {"schedule": [(2, 4)], "top_k": 2},
    "first ones replaced": {"strategy": "none", "top_k": 2},
}


def subject() -> tuple[Any, Judge, dict[str, Any]]:
    pipe = tiny.wan("unipc")
    judge = Judge.untrained(pipe, tap=2, dim=16)
    judge.reference = reference_of(judge, [[1e3] * 4] * 2, [700.0])  # which no video comes near
    return pipe, judge, {**tiny.CALL_WAN, "output_type": "latent"}


def told(result: Any) -> dict[str, Any]:
    """What must be the same on one process and on two."""
    names = ("denoiser_rows", "head_calls", "vae_decodes")
    return {
        "winners": [pick.seed for pick in result.top],
        "scores": result.scores,
        "stop": None if result.stop is None else asdict(result.stop),
        "ledger": {name: round(getattr(result.ledger, name), 6) for name in names},
        "kept": sorted(result.candidate_latents or {}),
    }


def fail(error: Exception, *_: Any) -> None:
    raise error


def work(out: Path) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    STRATEGIES["branches"] = Branches
    pipe, judge, call = subject()
    shared: dict[str, Any] = {**SHARED, "distribute": "candidates"}
    found, latents, errors = {}, {}, {}
    for name, arguments in RUNS.items():
        result = prism.best_of_n(pipe, judge, tiny.PROMPT, **{**shared, **arguments}, **call)
        found[name], latents[name] = told(result), torch.cat([pick.latents for pick in result.top])
    with poisoned(Setting("wan", pipe, call), {3, 4, 6}, after=2):
        for name, arguments in SPOILT.items():
            result = prism.best_of_n(pipe, judge, tiny.PROMPT, **{**shared, **arguments}, **call)
            found[name], latents[name] = told(result), torch.cat([pick.latents for pick in result.top])
    results = prism.best_of_n(pipe, judge, PROMPTS, **{**shared, "distribute": "prompts"}, **call)
    for prompt, result in zip(PROMPTS, results):
        found[prompt], latents[prompt] = told(result), result.latents
    rank = Team.gathered().rank

    for name, failure in {"error": PrismError("The latents hold NaN."), "memory": torch.OutOfMemoryError()}.items():
        handle = pipe.transformer.register_forward_pre_hook(partial(fail, failure)) if rank == 1 else None
        try:
            prism.best_of_n(pipe, judge, tiny.PROMPT, **shared, **call)
        except PrismError as error:
            errors[name] = str(error)
        if handle is not None:
            handle.remove()
    try:
        prism.best_of_n(pipe, judge, PROMPTS[rank], **shared, **call)
    except PrismError as error:
        errors["other prompts"] = str(error)
    save_file(latents, out / f"{rank}.safetensors")
    (out / f"{rank}.json").write_text(json.dumps({"found": found, "errors": errors}))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("two")
    for run in forks.run(work, out):
        assert run.code == 0, run.err[-4000:]
    return [
        {**json.loads((out / f"{rank}.json").read_text()), "latents": load_file(out / f"{rank}.safetensors")}
        for rank in (0, 1)
    ]


def test_processes_of_torchrun_find_each_other(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import os\nfrom prism.team import Team\nteam = Team.gathered()\n"
        "print(team.agree(lambda: team.rank), flush=True)\nos._exit(0)  # how processes end is not asked here\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.count("[0, 1]") == 2


@works(
    "Threads and processes",
    "`torchrun` or `accelerate launch` with `distribute`",
    "exact",
    "Processes share candidates or prompts, and find what one process finds.",
)
def test_both_find_what_one_finds(two: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STRATEGIES, "branches", Branches)
    pipe, judge, call = subject()
    for name, arguments in RUNS.items():
        alone = prism.best_of_n(pipe, judge, tiny.PROMPT, **{**SHARED, **arguments}, **call)
        for each in two:
            assert each["found"][name] == json.loads(json.dumps(told(alone))), name
            assert torch.equal(each["latents"][name], torch.cat([pick.latents for pick in alone.top])), name
    crowded = two[0]["found"]["cuts that leave candidates on one process"]["scores"][0]["kept"]
    assert crowded == [0, 2, 4]  # all of process 0: one must have moved, with its recording, or it was computed again
    for prompt in PROMPTS:
        alone = prism.best_of_n(pipe, judge, prompt, **SHARED, **call)
        for each in two:
            assert each["found"][prompt] == json.loads(json.dumps(told(alone)))
            assert torch.equal(each["latents"][prompt], alone.latents)


def test_both_drop_what_one_drops(two: list[dict[str, Any]]) -> None:
    pipe, judge, call = subject()
    with poisoned(Setting("wan", pipe, call), {3, 4, 6}, after=2):
        for name, arguments in SPOILT.items():
            with pytest.warns(UserWarning, match="The candidate with seed [346] is dropped"):
                alone = prism.best_of_n(pipe, judge, tiny.PROMPT, **{**SHARED, **arguments}, **call)
            assert {pick.seed for pick in alone.top} <= {5, 7}, name
            for each in two:
                assert each["found"][name] == json.loads(json.dumps(told(alone))), name
                assert torch.equal(each["latents"][name], torch.cat([pick.latents for pick in alone.top])), name


def test_where_one_fails_both_do(two: list[dict[str, Any]]) -> None:
    assert "Process 1 failed: The latents hold NaN." in two[0]["errors"]["error"]
    assert two[1]["errors"]["error"] == "The latents hold NaN."
    for each in two:
        assert "ran out with a single candidate" in each["errors"]["memory"]
        assert "must be given the same call; process 0 has prompt = [" in each["errors"]["other prompts"]


def killed_with(victim: int) -> None:
    """What each of two processes does, of which one is killed."""
    alive.INTERVAL, alive.SILENCE = 0.2, 2.0
    team = Team.gathered()
    assert team.agree(lambda: team.rank) == [0, 1]
    if team.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        team.agree(lambda: None)
    except PrismError as error:
        print(error, flush=True)
        os._exit(5)


@works(
    "Threads and processes",
    "one of several processes is killed",
    "refused",
    "The others say so after three minutes without a sign of life, and do not wait for it.",
)
@pytest.mark.parametrize(("victim", "said"), [(1, "Process 1 has shown no sign of life"), (0, "ended; start the run")])
def test_nobody_waits_for_a_process_that_was_killed(victim: int, said: str) -> None:
    both = forks.run(killed_with, victim, timeout=120)
    assert said in both[1 - victim].out
    assert [run.code for run in both] == [-9 if rank == victim else 5 for rank in (0, 1)]


ENDING = """
from datetime import timedelta
from prism import team

shared = team.Team.gathered("cpu")
store, team.INTERVAL = team._store(), 0

class Slow:
    def add(self, key, value):
        if value and "alive" in key:
            try:
                store.wait(["never"], timedelta(milliseconds=20))
            except Exception:
                pass
        return store.add(key, value)

slow = Slow()
team._store = lambda: slow
team.meet()
"""


def test_signs_of_life_do_not_abort_a_process_that_ends() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    run = subprocess.run([sys.executable, "-c", ENDING], env={**os.environ, **shared}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_candidates_stay_where_they_are_as_far_as_that_is_fair() -> None:
    team = Team(size=3)
    before = team.owners(range(7), {})
    assert before == {0: 0, 1: 1, 2: 2, 3: 0, 4: 1, 5: 2, 6: 0}
    assert team.owners([0, 3, 6], before) == {0: 0, 3: 1, 6: 2}
    assert team.owners([1, 2, 5], before) == {1: 1, 2: 2, 5: 0}


def test_alone_nothing_is_shared() -> None:
    pipe, judge, call = subject()
    shared = prism.best_of_n(pipe, judge, tiny.PROMPT, distribute="candidates", **SHARED, **call)
    alone = prism.best_of_n(pipe, judge, tiny.PROMPT, **SHARED, **call)
    assert torch.equal(shared.latents, alone.latents)
