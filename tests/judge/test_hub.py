"""A judge is pushed to the Hub and loaded from it; its card says what is known of it.

The Hub is a server of our own (`tests/judge/stand_in.py`). Its address is read when huggingface_hub is imported, so
what talks to it runs in a Python of its own, once for all of this file's tests.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from tests import stores, tiny
from tests.judge.stand_in import TOKEN, StandIn

import prism
from prism import files
from prism.errors import PrismError
from prism.judge import Judge, QueryHead
from prism.judge.hub import model_card, with_reference
from prism.judge.reference import Reference

DIMENSIONS = ("VQ", "MQ", "overall")
ROOT = Path(__file__).parents[2]


def row(t: float, dimension: str, share: float | None, ci95: Any = None, **changes: Any) -> dict[str, Any]:
    known = {"set": "test", "pairs": 120, "prompts": 30, "judge": "prism"}
    return {"t": t, "dimension": dimension, "without_ties": share, "without_ties_ci95": ci95, **known, **changes}


ROWS = [row(899, "VQ", 0.625, [0.55, 0.7]), row(899, "overall", None), row(499, "VQ", 0.75)]


def judge_of(seed: int = 0) -> Judge:
    judge = Judge.untrained(tiny.wan(), tap=2, dim=16, dimensions=DIMENSIONS, seed=seed)
    judge.trained_on = {"seed": 0, "pairs": 120, "prompts": 30, "store": {"name": "some"}, "prompt_keys": ["key-0"]}
    judge.trained_on |= {"config": {"t_low": 200.0, "t_high": 900.0}}
    return judge


def scores_of(judge: Judge) -> list[list[float]]:
    latents = torch.randn(2, 16, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    return judge.score(latents, tiny.PROMPT, 500, **tiny.CALL_WAN).tolist()


def sentence_of(action: Any) -> str:
    try:
        action()
    except PrismError as error:
        return str(error)
    return "nothing was refused"


def lines_of_the_page(pipe: Any) -> dict[str, Any]:
    """Run the lines on sharing in docs/judge.md as printed."""
    page = (ROOT / "docs" / "judge.md").read_text(encoding="utf-8")
    code = page.partition("### Sharing one\n\n```python\n")[2].partition("```")[0]
    judge = Judge.untrained(pipe, tap=2, dim=16, dimensions=("VQ", "MQ"))
    names = {"prism": prism, "pipe": pipe, "judge": judge}
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        os.environ["HF_TOKEN"] = TOKEN
        stores.make(Path("candidates"))
        exec(compile(code, "docs/judge.md", "exec"), names)
        saved = sorted(path.name for path in Path("shared/head").iterdir())
    return {
        "scores": [scores_of(names["again"]), scores_of(judge)],
        "saved": saved,
        "rows": len(names["again"].evaluation),
    }


def talk(hub: StandIn) -> dict[str, Any]:
    """All that is asked of the Hub in this file."""
    said: dict[str, Any] = {}
    pipe = tiny.wan()
    judge, measured = judge_of(), np.ones((1, 2, 3))
    judge.reference = Reference((500,), DIMENSIONS, measured, measured, ("key", "key"), {"clips": 2})
    said["addresses"] = [judge.push_to_hub("someone/head", token=TOKEN, evaluation=ROWS, license="mit")]
    said["pushed"] = sorted(hub.branches["someone/head"]["main"])
    said["card"] = hub.branches["someone/head"]["main"]["README.md"].decode()
    loaded = Judge.from_pretrained("someone/head", pipe)
    said["scores"], said["evaluation"], said["fetched"] = scores_of(loaded), loaded.evaluation, sorted(hub.fetched)
    said["reference"] = loaded.reference.facts
    judge_of(1).push_to_hub("someone/head", token=TOKEN, revision="wider", private=True, commit_message="Another")
    said["branch"] = scores_of(Judge.from_pretrained("someone/head", pipe, revision="wider"))
    said["main again"] = scores_of(Judge.from_pretrained("someone/head", pipe))
    said["on the branch"] = sorted(hub.branches["someone/head"]["wider"])
    judge_of(1).push_to_hub("someone/head", token=TOKEN)
    said["after another push"] = sorted(hub.branches["someone/head"]["main"])
    judge_of().push_to_hub("someone/hidden", private=True, token=TOKEN)
    said["hidden"] = scores_of(Judge.from_pretrained("someone/hidden", pipe, token=TOKEN))
    said["private"] = sorted(hub.private)
    hub.put("someone/pickle", {"config.json": b"{}", "pytorch_model.bin": pickle.dumps({}), "model.py": b"1 / 0"})
    hub.put("someone/closed", {"config.json": b"{}"})
    hub.private.add("someone/closed")
    hub.put("someone/else", {"README.md": b"words", "model.bin": pickle.dumps({})})
    load = lambda name, **more: sentence_of(lambda: Judge.from_pretrained(name, pipe, **more))  # noqa: E731
    said["refused"] = {
        "missing": load("someone/nothing"),
        "hidden": load("someone/closed"),
        "revision": load("someone/head", revision="older"),
        "pickle": load("someone/pickle"),
        "no head": load("someone/else"),
        "no token": sentence_of(lambda: judge_of().push_to_hub("someone/new")),
        "name": sentence_of(lambda: judge_of().push_to_hub("no name", token=TOKEN)),
    }
    said["fetched at all"], said["messages"] = sorted(set(hub.fetched)), hub.messages
    said["page"] = lines_of_the_page(pipe)
    said["private then"] = sorted(hub.private)
    hub.close()
    said["refused"] |= {
        "no network": load("someone/nothing"),
        "no network to push": sentence_of(lambda: judge_of().push_to_hub("someone/head", token=TOKEN)),
    }
    said["from the cache"] = scores_of(Judge.from_pretrained("someone/head", pipe, revision="wider"))
    return said


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    place = tmp_path_factory.mktemp("hub")
    code = "from tests.judge import stand_in; import os; server = stand_in.StandIn()\n"
    code += "os.environ['HF_ENDPOINT'] = server.address\n"
    code += "import json; from tests.judge import test_hub; print(json.dumps(test_hub.talk(server)))\n"
    offline = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(place), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": ""}
    environment = {**os.environ, **offline, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_a_judge_that_was_pushed_scores_as_before(said):
    assert said["scores"] == said["hidden"] == scores_of(judge_of())
    assert said["evaluation"] == ROWS
    names = [".gitattributes", "README.md", "config.json", "evaluation.json", "model.safetensors", "reference.json"]
    assert said["pushed"] == names
    assert said["reference"] == {"clips": 2}
    assert "/someone/head/commit/" in said["addresses"][0]
    assert said["private"] == ["someone/hidden"]


def test_the_lines_of_the_page_run_as_printed(said):
    page = said["page"]
    assert page["scores"][0] == page["scores"][1]
    assert page["saved"] == ["README.md", "config.json", "evaluation.json", "model.safetensors"]
    assert page["rows"] > 0
    assert "user/head" in said["private then"]


def test_a_branch_and_a_message_are_the_users(said):
    assert said["branch"] == said["from the cache"] == scores_of(judge_of(1)) != said["main again"]
    assert said["main again"] == said["scores"]
    assert said["messages"][:2] == ["Upload a PRISM judge", "Another"]


def test_accuracies_of_earlier_weights_do_not_stay_on_the_hub(said):
    assert not {"evaluation.json", "reference.json"} & set(said["after another push"])


def test_only_safetensors_and_json_are_fetched(said):
    assert said["fetched"] == ["config.json", "evaluation.json", "model.safetensors", "reference.json"]
    assert said["fetched at all"] == said["fetched"]


SENTENCES = {
    "missing": "no head of this name came from the Hub: the repository does not exist, or it is private or gated",
    "hidden": "the repository does not exist, or it is private or gated and the token gives no access to it",
    "revision": "the repository has no revision older",
    "pickle": "does not describe a PRISM head",
    "no head": "The repository someone/else on the Hub holds no head: it has no config.json",
    "no token": "The judge did not reach someone/new on the Hub: the token is missing or gives no such right",
    "name": 'must be named "user/name"; found no name',
    "no network": "no head of this name came from the Hub: the Hub cannot be reached",
    "no network to push": "The judge did not reach someone/head on the Hub: the Hub cannot be reached",
}


@pytest.mark.parametrize("name", SENTENCES)
def test_what_the_hub_does_not_give_or_take_is_one_sentence(said, name):
    sentence = said["refused"][name]
    assert SENTENCES[name] in sentence
    assert "\n" not in sentence


def test_no_network_where_it_is_forbidden(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PrismError, match="HF_HUB_OFFLINE forbids network access"):
        Judge.from_pretrained("someone/prism-head-that-is-not", tiny.wan())
    with pytest.raises(PrismError, match="did not reach someone/head on the Hub: HF_HUB_OFFLINE"):
        judge_of().push_to_hub("someone/head", token=TOKEN)


def test_the_card_says_what_is_known(said):
    card = ModelCard(said["card"])
    assert (card.data.library_name, card.data.license) == ("prism", "mit")
    assert {"prism", "diffusers"} <= set(card.data.tags)
    results = {result.metric_name: result for result in card.data.eval_results}
    assert results.keys() == {"accuracy without ties, VQ, t = 899", "accuracy without ties, VQ, t = 499"}
    first = results["accuracy without ties, VQ, t = 899"]
    assert (first.metric_value, first.metric_args["ci95"], first.dataset_split) == (0.625, [0.55, 0.7], "test")
    assert "| test | 899 | 62.5% (55.0% to 70.0%) | - | - | 120 | 30 |" in card.text
    assert "| test | 499 | 75.0% | - | - | 120 | 30 |" in card.text
    assert 'trained on | 120 pairs of 30 prompts of the store "some"' in card.text
    assert "t from 200 to 900" in card.text
    assert "after block 2" in card.text
    assert "Known limits" in card.text
    assert "key-0" not in said["card"]


def test_the_card_names_no_licence_and_no_accuracy_that_nobody_gave(tmp_path):
    judge_of().save_pretrained(tmp_path / "head")
    card = ModelCard.load(tmp_path / "head" / "README.md")
    assert card.data.license is None
    assert card.data.base_model is None
    assert card.data.eval_results is None
    assert "Not measured for this folder" in card.text
    assert not (tmp_path / "head" / "evaluation.json").exists()


def test_the_card_names_the_pipeline_and_its_revision(tmp_path):
    judge = judge_of()
    judge.save_pretrained(tmp_path / "said", base_model="someone/wan@v2")
    card = ModelCard.load(tmp_path / "said" / "README.md")
    assert card.data.base_model == "someone/wan"
    assert 'WanPipeline.from_pretrained("someone/wan", revision="v2")' in card.text
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--someone--tiny-wan" / "snapshots" / commit
    judge.backbone.pipe.save_pretrained(snapshot)
    loaded = type(judge.backbone.pipe).from_pretrained(snapshot)
    Judge.untrained(loaded, dim=16).save_pretrained(tmp_path / "found")
    card = ModelCard.load(tmp_path / "found" / "README.md")
    assert card.data.base_model == "someone/tiny-wan"
    assert f"| base model | someone/tiny-wan, revision {commit} |" in card.text


def test_accuracies_are_kept_until_a_head_changes(tmp_path):
    store, judge = stores.make(tmp_path / "store"), Judge.untrained(tiny.wan(), dim=16, dimensions=("VQ", "MQ"))
    rows = prism.evaluate(judge, store, "test", (899, 499), progress=False)
    judge.save_pretrained(tmp_path / "head", evaluation=rows)
    assert files.read_json(tmp_path / "head" / "evaluation.json") == {"accuracy": json.loads(json.dumps(rows))}
    loaded = Judge.from_pretrained(tmp_path / "head", tiny.wan())
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_bytes() == (tmp_path / "head" / "README.md").read_bytes()
    with torch.no_grad():
        loaded.head.query.add_(1)
    loaded.save_pretrained(tmp_path / "trained")
    assert not (tmp_path / "trained" / "evaluation.json").exists()


ODD = [
    ("text", "evaluation must be a list"),
    ([1], "evaluation must be a list"),
    ([row(1001, "VQ", 0.5)], r"row 0: t must be a number from 0 to 1,000; found 1001"),
    ([*ROWS, row(5, "VQ", 1.5)], "row 3: without_ties and its interval must be a number from 0 to 1"),
    ([row(5, "VQ", 0.5, [0.4])], r"without_ties_ci95 must be \[low, high\] or null"),
    ([row(5, "V|Q", 0.5)], "dimension must be a name"),
    ([row(5, "VQ", 0.5, pairs=None)], "pairs must be a whole number"),
]


@pytest.mark.parametrize(("rows", "sentence"), ODD)
def test_accuracies_that_make_no_sense_are_refused(tmp_path, rows, sentence):
    with pytest.raises(PrismError, match=sentence):
        judge_of().save_pretrained(tmp_path / "given", evaluation=rows)
    judge_of().save_pretrained(tmp_path / "read")
    files.write_json(tmp_path / "read" / "evaluation.json", {"accuracy": rows})
    with pytest.raises(PrismError, match=r"evaluation\.json"):
        Judge.from_pretrained(tmp_path / "read", tiny.wan())


@pytest.mark.parametrize("option", ["license", "base_model"])
def test_words_of_the_card_are_texts(tmp_path, option):
    for value in (3, "", "a\nb"):
        with pytest.raises(PrismError, match=f"{option} must be a text"):
            judge_of().save_pretrained(tmp_path / "head", **{option: value})


def test_a_head_by_itself_is_no_model_of_the_hub():
    assert not hasattr(QueryHead, "from_pretrained")
    assert not hasattr(QueryHead, "push_to_hub")


def test_the_card_of_the_embedded_head_is_made_by_this_code():
    """From its config.json and the accuracies of the full run, as the paragraph below the card says."""
    folder = Path(prism.__file__).parent / "shapeworld" / "assets" / "head"
    rows = files.read_json(ROOT / "docs/evidence/metrics.json")["accuracy"]
    rows = [row for row in rows if (row["judge"], row["head_seed"]) == ("prism", 0)]
    config = files.read_json(folder / "config.json")
    reference = Reference.read(folder / "reference.json", config["dimensions"], config["weights_sha256"])
    card = model_card(config, rows, "apache-2.0", None, reference)
    low, middle, high = np.sort(reference.scores[1, :, 2])[[9, 199, 389]]  # of 400; the percentiles lie just above
    assert "\n| 499 | " in card
    assert all(abs(a - b) < 0.05 for a, b in zip((low, middle, high), reference.intervals()["499"]["TA"]))
    assert with_reference(model_card(config, rows, "apache-2.0", None), reference) == card
    assert with_reference(card, reference) == card
    assert with_reference("A card of my own.", reference).startswith("A card of my own.\n\n## Reference\n")
    assert (folder / "README.md").read_text(encoding="utf-8").startswith(card)
