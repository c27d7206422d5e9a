"""Every tab of the page used in Chromium as a person would, wide and narrow, light and dark."""

from __future__ import annotations

import csv
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tests import tiny, zoo
from tests.serving import browser

from prism.backbone import Backbone
from prism.commands.page import _make, _seen
from prism.commands.sample import Loaded, Sampling
from prism.files import read_json
from prism.judge import Judge
from prism.serving import comparisons, page, web
from prism.serving.annotators import Annotation
from prism.serving.jobs import Jobs, seen_cut
from prism.video import read_video, write_video

pytestmark = [  # gradio takes seconds to import, and each process collects all files: it is looked for alone
    pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed"),
    pytest.mark.skipif(find_spec("playwright") is None, reason="playwright is not installed"),
    pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no Chromium"),
    pytest.mark.filterwarnings("ignore"),  # of gradio, uvicorn and starlette
]
CALL = {**tiny.CALL_WAN, "output_type": "np"}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A page of a tiny pipeline with all tabs, Chromium, and the folder of its clips and answers."""
    folder = tmp_path_factory.mktemp("page")
    for number in range(6):
        frames = np.random.default_rng(number).random((9, CALL["height"], CALL["width"], 3))
        write_video(folder / f"clip-{number}.mp4", frames, 8)
        (folder / f"clip-{number}.txt").write_text("a cat" if number % 2 else "a dog")
    backbone = Backbone(tiny.wan("euler"))
    judge, pairs = Judge.untrained(backbone, tap=1, dim=16), comparisons.opened(folder)
    desk = page.Desk("tiny", backbone, judge, CALL, comparisons=pairs)
    desk.jobs = _queue(desk, folder / "runs")
    desk.annotation = Annotation(pairs.pairs, folder / "answers.csv", ("VQ", "overall"), 0.2, root=folder)
    server = web.Server(page.application(desk), "127.0.0.1", 0).start()
    with browser.chromium() as chromium:
        yield server.url, chromium, folder, desk
    server.stop()
    desk.jobs.close()


def _queue(desk, out):
    loaded, models = Loaded(desk.backbone, desk.call, desk.title, desk.judge), Sampling(backbone="tiny", head="tiny")
    return Jobs(out, partial(_make, loaded, models), partial(_seen, seen_cut, desk.judge), desk.lock)


def test_all_tabs_wide_and_light(served):
    url, chromium, folder, desk = served
    visit = browser.Visit(chromium, url)
    tab = visit.tab
    visit.generate("a cat", "2:2,4:1", n=3)
    tab.wait_for_selector(".pz-winner video")
    assert tab.locator(".pz-cut").count() == 2
    assert tab.locator(".pz-cut").last.locator(".pz-tile.lost").count() == 1
    assert tab.locator(".pz-tile img").count() == 5
    (run,) = desk.jobs.all()
    assert f"Seed {run.metrics['top'][0]['seed']} wins" in tab.inner_text("#pz-won")
    with tab.expect_download() as download:
        tab.click("text=Download all")
    assert download.value.suggested_filename == "0001-a-cat.zip"
    assert "Denoiser rows" in tab.inner_text("#pz-ledger")

    visit.open("Score")
    visit.drop("#pz-clips", [folder / "clip-0.mp4"])
    tab.fill("#pz-asked textarea", "a dog")
    tab.click("#pz-score")
    tab.wait_for_selector(".pz-clip img")
    assert "no reference to compare with" in tab.inner_text("#pz-scores")

    visit.open("Compare")
    visit.drop("#pz-left", [folder / "clip-0.mp4"])
    visit.drop("#pz-right", [folder / "clip-2.mp4"])
    tab.fill("#pz-both input, #pz-both textarea", "a dog")
    tab.click("#pz-compare")
    tab.wait_for_selector("#pz-pair .pz-stage")
    assert tab.inner_text("#pz-verdict").strip() == ""  # hidden until one's own opinion is given
    for question in tab.query_selector_all("#pz-pair .pz-question"):
        question.query_selector("[data-choice=tie]").click()
    tab.click("#pz-pair [data-act=next]")
    tab.wait_for_selector("#pz-verdict table")
    assert "P(left)" in tab.inner_text("#pz-verdict")

    visit.open("Generate")
    with desk.lock:  # the queue waits for it
        visit.generate("to be cancelled", n=2)
        tab.click("#pz-head [data-act=cancel]")
        assert desk.jobs.get("0002-to-be-cancelled").stop.wait(browser.SECONDS)
    tab.wait_for_selector("#pz-head .cancelled")
    assert not (folder / "runs" / "0002-to-be-cancelled").exists()
    assert tab.locator("#pz-runs button").count() == 2
    tab.click("#pz-runs [data-run='0001-a-cat']")
    tab.wait_for_selector(".pz-winner video")
    assert (visit.errors, visit.outside) == ([], [])
    assert visit.overflow() <= 0
    visit.context.close()


def test_annotation_by_keyboard_narrow_and_dark(served):
    url, chromium, folder, desk = served
    visit = browser.Visit(chromium, url, 390, dark=True)
    tab = visit.tab
    visit.open("Annotate")
    tab.fill("#pz-name input, #pz-name textarea", "Ada")
    tab.click("#pz-start")
    total = len(desk.annotation.items("Ada"))
    for number in range(total):
        tab.wait_for_function(
            "n => document.querySelector('#pz-board .pz-foot')?.innerText.includes(n)", arg=f"{number + 1} of"
        )
        assert "clip-" not in tab.inner_html("#pz-board")  # neither file nor model is told
        visit.press("ArrowLeft", "ArrowDown", "Enter")
        if number == 2:  # taken back, and given again
            tab.wait_for_function("document.querySelector('#pz-board .pz-foot').innerText.includes('4 of')")
            visit.press("Backspace")
            tab.wait_for_function("document.querySelector('#pz-board .pz-foot').innerText.includes('3 of')")
            visit.press("3", "1", "Enter")
    tab.wait_for_selector("text=are judged")
    rows = list(csv.DictReader((folder / "answers.csv").read_text().splitlines()))
    repeats = list(csv.DictReader((folder / "answers-again.csv").read_text().splitlines()))
    assert (len(rows), len(repeats)) == (6, total - 6)
    taken = rows + repeats
    choices = {"left": {"path_A": "A", "path_B": "B"}, "right": {"path_A": "B", "path_B": "A"}}
    changed = [row for row in taken if row["VQ"] == choices["right"][row["left"]]]
    assert [row["Overall"] == choices["left"][row["left"]] for row in changed] == [True]
    assert all(row["VQ"] == choices["left"][row["left"]] for row in taken if row not in changed)
    assert all(0 < float(row["seconds"]) < 60 for row in taken)
    tab.click("text=Agreement")
    tab.wait_for_selector("#pz-agreement table")
    assert "Ada" in tab.inner_text("#pz-agreement")
    assert (visit.errors, visit.outside) == ([], [])
    assert visit.overflow() <= 0
    ground = tab.evaluate("getComputedStyle(document.querySelector('gradio-app')).backgroundColor")
    assert ground == "rgb(19, 20, 23)"
    for name in ("Generate", "Score", "Compare"):
        visit.open(name)
        assert visit.overflow() <= 0
    visit.context.close()


def test_a_picture_to_start_from_and_a_login(served, tmp_path):
    """Image to video behind --auth: the picture arrives to the last bit, and the winner is the stock call's from it."""
    chromium = served[1]
    pipe, call = zoo.VARIANTS["wan21_i2v"]()
    backbone, call = Backbone(pipe), {**call, "output_type": "np"}
    desk = page.Desk("tiny", backbone, Judge.untrained(backbone, tap=1, dim=16), call)
    desk.jobs = _queue(desk, tmp_path / "runs")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
    picture.save(tmp_path / "start.png")
    server = web.Server(page.application(desk, ("generate",), [("ada", "secret")]), "127.0.0.1", 0).start()
    try:
        context = chromium.new_context()
        tab = context.new_page()
        tab.set_default_timeout(browser.SECONDS * 1000)
        tab.goto(server.url)
        for password in ("wrong", "secret"):
            tab.fill("[data-testid=textbox]", "ada")
            tab.fill("[data-testid=password]", password)
            with tab.expect_response("**/login*") as answer:
                tab.click("button:has-text('Login')")
            assert answer.value.ok == (password == "secret")
            assert desk.jobs.all() == []
        tab.wait_for_selector("#pz-prompt textarea")
        tab.set_input_files("#pz-image input[type=file]", tmp_path / "start.png")
        tab.wait_for_selector("#pz-image img")
        tab.fill("#pz-prompt textarea", "a cat")
        tab.fill("#pz-n input[type=number]", "2")
        tab.click("#pz-generate")
        tab.wait_for_selector(".pz-winner video")
        context.close()
    finally:
        server.stop()
        desk.jobs.close()
    (run,) = desk.jobs.all()
    assert (np.asarray(Image.open(read_json(run.folder / "config.json")["image"])) == np.asarray(picture)).all()
    made = np.asarray(read_video(run.folder / "winner.mp4"))

    def distance(image):
        """Of the winner from the stock call's video: a shared batch rounds, and MPEG-4 makes it more."""
        generator = torch.Generator().manual_seed(run.metrics["top"][0]["seed"])
        frames = pipe(prompt="a cat", generator=generator, **{**call, "image": image}).frames[0]
        write_video(tmp_path / "stock.mp4", frames, 8)
        return np.abs(made - np.asarray(read_video(tmp_path / "stock.mp4"))).mean()

    assert distance(picture) < 0.003
    assert distance(ImageOps.invert(picture)) > 0.01
