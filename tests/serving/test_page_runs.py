"""The queue of runs behind the page: real runs of a tiny pipeline that wait, are cancelled, fail and are read back."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch
from tests import tiny

from prism.backbone import Backbone
from prism.cli import main
from prism.commands.page import _make, _seen
from prism.commands.sample import Loaded, Sampling
from prism.errors import PrismError
from prism.judge import Judge
from prism.sampling.plan import Candidate
from prism.serving import fragments, web
from prism.serving.jobs import Jobs, Wish, seen_cut, win_probabilities


@pytest.fixture(scope="module")
def loaded():
    backbone = Backbone(tiny.wan("euler"))
    return Loaded(backbone, {**tiny.CALL_WAN, "output_type": "np"}, "tiny", Judge.untrained(backbone, tap=1, dim=16))


def desk(loaded, out, make=None):
    models = Sampling(backbone="tiny", head="tiny")
    make = partial(_make, loaded, models) if make is None else make
    return Jobs(out, make, partial(_seen, seen_cut, loaded.judge), threading.RLock())


def test_a_run_is_watched_listed_and_read_back(loaded, tmp_path):
    jobs, shelf = desk(loaded, tmp_path), web.Shelf()
    job = jobs.submit(Wish("A <b>cat</b> & a dog", n=3, schedule="2:2,4:1", look="ahead", seed=5))
    assert jobs.wait(job.name, 120).state == "done", job.error
    assert (job.name, job.rows) == ("0001-a-b-cat-b-a-dog", job.expected)
    assert [(cut.step, len(cut.candidates), sum(c.kept for c in cut.candidates)) for cut in job.cuts] == [
        (2, 3, 2),
        (4, 2, 1),
    ]
    for cut in job.cuts:
        assert [c.deciding for c in cut.candidates] == sorted((c.deciding for c in cut.candidates), reverse=True)
        assert sum(c.win for c in cut.candidates) == pytest.approx(
            len(cut.candidates) / 2
        )  # what one wins, others lose
        assert all(c.video is not None for c in cut.candidates)
    winner = job.cuts[-1].candidates[0].seed
    assert job.metrics["top"][0]["seed"] == winner
    shown = "".join(
        (fragments.head(job), fragments.cuts(job, shelf), fragments.winner(job, shelf), fragments.ledger(job))
    )
    assert "A &lt;b&gt;cat&lt;/b&gt; &amp; a dog" in shown
    assert "<b>cat" not in shown
    assert f"Seed {winner} wins" in shown
    again = desk(loaded, tmp_path)
    (read,) = again.all()
    assert (read.name, read.state, read.wish.prompt) == (job.name, "done", job.wish.prompt)
    assert [[c.seed for c in cut.candidates] for cut in read.cuts] == [
        [c.seed for c in cut.candidates] for cut in job.cuts
    ]
    assert "Seed" in fragments.cuts(read, shelf)
    assert again.submit(Wish("next", n=1, schedule="")).name == "0002-next"
    again.close()
    jobs.close()


def test_runs_wait_for_each_other_and_are_cancelled(loaded, tmp_path):
    entered, go = threading.Event(), threading.Event()

    def make(wish, folder, watch):
        entered.set()
        go.wait(60)
        return partial(_make, loaded, Sampling(backbone="tiny", head="tiny"))(wish, folder, watch)

    jobs = desk(loaded, tmp_path, make)
    first, second = jobs.submit(Wish("one", n=2)), jobs.submit(Wish("two", n=2))
    assert entered.wait(60)
    assert (first.state, second.state, jobs.ahead_of(second)) == ("running", "waiting", 1)
    assert jobs.cancel(second.name)
    assert second.state == "cancelled"
    assert jobs.cancel(first.name)
    go.set()
    assert jobs.wait(first.name, 60).state == "cancelled"
    assert not list(tmp_path.iterdir())  # nothing half-written
    assert not jobs.cancel(first.name)
    third = jobs.submit(Wish("three", n=2, schedule="9999:1"))
    assert jobs.wait(third.name, 60).state == "failed"
    assert "9999" in third.error
    with pytest.raises(PrismError, match="Say what the video should show"):
        jobs.submit(Wish("  "))
    jobs.close()


def test_win_probabilities_are_those_of_the_pairs(loaded):
    scores = torch.randn(4, len(loaded.judge.dimensions), generator=torch.Generator().manual_seed(0)).double()
    weights = [0.0] * (scores.shape[1] - 1) + [1.0]
    wins = win_probabilities(loaded.judge, scores, weights)
    for i in range(4):
        each = []
        for j in set(range(4)) - {i}:
            better, tie, _ = loaded.judge.probabilities((scores[i] - scores[j])[None])[0, -1].tolist()
            each.append(better + tie / 2)
        assert float(wins[i]) == pytest.approx(sum(each) / 3)
    cut = {"step": 1, "t": 1.0, "candidates": [Candidate(0, 9)], "kept": [], "dropped": []}
    cut["scores"] = {name: [0.0] for name in loaded.judge.dimensions}
    assert seen_cut(loaded.judge, {loaded.judge.dimensions[0]: 1.0}, cut, {}).candidates[0].win is None


def test_addresses_cannot_be_guessed_and_others_than_loopback_need_a_user(tmp_path):
    shelf, path = web.Shelf(), tmp_path / "wan-14b-seed-3.mp4"
    path.write_bytes(b"x")
    address = shelf.file(path, "clip.mp4")
    assert "wan" not in address
    _, token, _ = address.split("/")
    assert (len(token), shelf.get(token)) == (32, path)
    assert web.Shelf().file(path) != address
    assert shelf.get("0" * 32) is None
    assert web.users_of((), "127.0.0.1") == web.users_of((), "::1") == web.users_of((), "localhost") == []
    (tmp_path / "users").write_text("# people\nada:x:y\n\nbo:z\n")
    assert web.users_of((str(tmp_path / "users"), "cy:1"), "0.0.0.0") == [("ada", "x:y"), ("bo", "z"), ("cy", "1")]
    (tmp_path / "none").write_text("# nobody yet\n")
    (tmp_path / "latin").write_bytes("jos\u00e9:1\n".encode("latin-1"))
    for texts, host, words in (
        ((), "0.0.0.0", "lets others reach the page; give --auth"),
        (("secret",), "127.0.0.1", "The --auth is neither a file that is there nor USER:PASSWORD"),
        ((str(tmp_path / "none"),), "127.0.0.1", "names no user; write one USER:PASSWORD a line"),
        ((str(tmp_path / "latin"),), "127.0.0.1", "cannot be read as text in UTF-8"),
    ):
        with pytest.raises(PrismError, match=words) as error:
            web.users_of(texts, host)
        assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--tabs", "generate,draw"], "The --tabs are generate,draw; choose of generate, score, compare, annotate."),
        (["--host", "0.0.0.0"], "lets others reach the page"),
        (["--port", "70000"], "--port must be a whole number from 0 to 65,535"),
        (["--pairs-per-prompt", "0"], "--pairs-per-prompt must be a whole number of at least 1; found 0."),
        (["--out", "README.md"], "The --out README.md is a file; name a folder for the runs."),
        (["--tabs", "annotate", "--pairs", "nowhere"], "There is no file or folder nowhere with pairs to compare."),
        (["--tabs", "annotate", "--dimensions", "prompt"], "cannot have this name: a name with a colon"),
        (["--tabs", "annotate", "--repeats", "2"], "--repeats must be a number from 0 to 1"),
        (["--tabs", "annotate", "--answers", "a.txt"], "The --answers a.txt must end in .csv."),
        (["--tabs", "annotate", "--pairs", "docs"], "; two clips of one prompt are needed"),
    ],
)
def test_mistakes_are_sentences(words, sentence, capsys):
    assert main(["page", *words]) == 2
    assert sentence in capsys.readouterr().err
