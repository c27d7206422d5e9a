"""`prism improve` refuses what cannot be before it loads a model, and its page says what came of a run."""

from __future__ import annotations

import re

import pytest

from prism import cli, runs
from prism.commands import improve
from prism.errors import PrismError
from prism.report import improve_page
from prism.rewards.settings import ImproveConfig


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--control", "luck"), "The --control is luck; choose one of random, worst."),
        (("--recipe", "luck"), "--recipe must be one of pairs, winners, weighted; found luck."),
        (("--backbone", "nowhere"), "No prompts are named to tune on; give --prompts FILE."),
        (("--rank", "0"), "--rank must be a whole number from 1 to 1,000,000; found 0."),
        (("--t-low", "900", "--t-high", "800"), "--t-low must be below --t-high; found 900 and 800."),
        (("--levels", "high"), 'The --levels "high" are not numbers apart by commas; write for example 899,699,0.'),
        (("--num-prompts", "-1"), "--num-prompts must be a whole number from 0 to 1,000,000,000; found -1."),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_made(words, sentence, tmp_path, capsys):
    assert cli.main(["improve", "--out", str(tmp_path / "out"), *words]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_errors_of_the_library_name_the_commands_options(tmp_path):
    with pytest.raises(
        PrismError, match=r'^The --outer "nonsense" names no head, no function and no teacher; write the'
    ):
        improve._outer(improve.Judges(outer="nonsense"), None, {}, ImproveConfig(), False, None)
    for change, words in (
        ({"config": {"steps": 5}}, "differs in --tuning-steps: it was 4 and is now 5;"),
        ({"config": {"t_low": 3}}, "differs in --t-low: it was None and is now 3;"),
        ({"outer_files": "b"}, "differs in --outer: it was 'a' and is now 'b';"),
    ):
        identity = {"command": "improve", "config": {"steps": 4}, "outer_files": "a"}
        runs.claim(tmp_path, identity, True).release()
        (tmp_path / "metrics.json").write_text("{}")  # the folder holds a run now
        other = {**identity, **change, "config": {**identity["config"], **change.get("config", {})}}
        with pytest.raises(PrismError, match=re.escape(words)), improve._in_flags():
            runs.claim(tmp_path, other, True)


def test_a_digest_of_a_judges_folder_is_of_its_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = improve._digest(tmp_path)
    (tmp_path / "README.md").write_text("No part of it.")
    assert improve._digest(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert improve._digest(tmp_path) != before


def measure(name, gain, interval):
    row = {"measure": name, "before": 0.8, "mean": 0.8 + gain, "gain": gain, "gain_ci95": interval}
    return {**row, "gain_sd": 2 * gain, "spread": 0.5, "prompts": 40}


def metrics(**more):
    measures = [measure("judge", 0.5, [0.4, 0.6]), measure("outer", -0.01, None), measure("light", 0.02, [-0.01, 0.05])]
    entry = {"step": 10, "loss": 0.69, "winner_loss": 0.4, "loser_loss": 0.5, "ref_winner_loss": 0.41}
    entry |= {"ref_loser_loss": 0.49, "implicit_acc": 0.7, "kl_div": 1e-5, "grad_norm": 2.0, "learning_rate": 1e-4}
    facts = {"reward_avg": 1.0, "reward_std_mean": 0.3, "zero_std_ratio": 0.1, "group_size": 4.0}
    facts |= {"trained_prompt_num": 9, "prompts": 10}
    row = {"arm": "judge", "round": 1, **facts, "tuning": entry, "measures": measures}
    against = {"arm": "random", "round": 1, "measure": "light", "difference": 0.03, "difference_ci95": [0.01, 0.05]}
    return {
        "rounds": [row, {**row, "arm": "random"}],
        "tuning": [{"arm": arm, "round": 1, **entry, "step": step} for arm in ("judge", "random") for step in (10, 20)],
        "against": [against],
        "untuned_best_of_n": [{"n": 2, "measure": "light", "gain": 0.04, "gain_ci95": None}],
        "cost": {"total_rows": 900.0, "samples_worth": 30.0, "rows_per_sample": 30.0},
        "measured": {"outer": "another", "rewards": ["light"]},
        "retrained": {},
        "stopped": "",
        "kept": 1,
        **more,
    }


def test_the_page_says_what_came_out_rewards_first():
    said = improve_page.verdict(metrics())
    assert said.startswith(
        "The mean of light changed by +0.02 on 40 test prompts after round 1 (95 % interval −0.01 to "
    )
    assert "zero is within it" in said
    assert "The outer judge (another) changed by −0.01" in said
    assert "The judge's own score changed by +0.5 " in said
    assert "Over the control on random picks it gained +0.03 by light (+0.01 … +0.05)." in said
    assert improve_page.verdict(metrics(stopped="It stopped.")).endswith("It stopped.")
    second = {
        **metrics()["rounds"][0],
        "round": 2,
        "measures": [measure(n, -9.0, None) for n in ("judge", "outer", "light")],
    }
    rejected = metrics(rounds=[*metrics()["rounds"], second], stopped="It stopped.")
    assert improve_page.verdict(rejected) == improve_page.verdict(metrics(stopped="It stopped."))  # of the kept round
    none = improve_page.verdict({**rejected, "kept": 0})
    assert none.startswith("No round was kept, so that there is no lora/; these numbers are of round 2, which was")
    unscored = {
        **measure("light", 0.0, None),
        "before": None,
        "mean": None,
        "gain": None,
        "gain_sd": None,
        "prompts": 0,
    }
    row = metrics()["rounds"][0]
    bare = metrics(rounds=[{**row, "measures": [*row["measures"][:2], unscored]}], against=[])
    assert "On no test prompt have all videos a finite score of light." in improve_page.verdict(bare)
    assert "light" in improve_page.measures_table(bare["rounds"]).markdown()
    titles = [section.title for section in improve_page.sections(metrics())]
    assert titles[0] == "What the rounds gained"
    assert "Against the controls" in titles
    markdown = improve_page.tuning_table(metrics()["rounds"]).markdown()
    assert "0.4 (0.41) | 0.5 (0.49)" in markdown
    assert "up to 30 videos by Best-of-2, or 10 by Best-of-4" in improve_page.cost_sentence(metrics()["cost"])
