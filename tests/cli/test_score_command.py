"""`prism score` and `prism reference`: which clips are taken, what is printed and written, what is refused."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr
from tests import forks, stores, tiny
from tests.zoo.latte_to_qwen import ltx_i2v

from prism import Judge, cli, files
from prism.backbone import Backbone
from prism.clips import FramePolicy, read_clip
from prism.commands.scores import Journal
from prism.preference.readers import read_clips
from prism.shapeworld import pipeline
from prism.shapeworld.generator import asset_folder
from prism.video import write_video

PROMPT = tiny.PROMPT
POLICY = FramePolicy(num_frames=9, height=32, width=32)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A tiny backbone, its head, a store, and clips: two with their prompts beside, and a table."""
    folder, rng = tmp_path_factory.mktemp("score"), np.random.default_rng(0)
    pipe = tiny.wan()
    pipe.save_pretrained(folder / "backbone")
    files.write_json(folder / "backbone" / "call.json", tiny.CALL_WAN)
    Judge.untrained(pipe, tap=2, dim=16, dimensions=("VQ", "MQ")).save_pretrained(folder / "head", {"seed": 3})
    stores.make(folder / "store")
    (folder / "clips" / "more").mkdir(parents=True)
    for name in ("a", "more/b"):
        write_video(folder / "clips" / f"{name}.mp4", rng.uniform(size=(9, 32, 40, 3)), 8)
        (folder / "clips" / f"{name}.txt").write_text(f"{PROMPT}\n")
    with (folder / "clips" / "list.csv").open("w", newline="") as stream:
        rows = [
            ["prompt", "video", "note"],
            [PROMPT, "a.mp4", "x"],
            ["another", "a.mp4", ""],
            [PROMPT, "more/b.mp4", ""],
        ]
        csv.writer(stream).writerows(rows)
    return folder


def score(place, *words, head="head"):
    models = ["--backbone", str(place / "backbone"), "--head", str(place / head)]
    return cli.main(["score", *map(str, words), *models])


def table(path) -> list[dict[str, str]]:
    with Path(path).open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def clips(place, tmp_path) -> Path:
    shutil.copytree(place / "clips", tmp_path / "clips")
    return tmp_path / "clips"


@pytest.mark.filterwarnings("ignore:This judge is untrained")
class TestScore:
    def test_a_folder_a_table_and_clips_have_the_same_scores(self, place, tmp_path, capsys):
        options = ["--t", "600,300", "--draws", "2", "--seed", "4"]
        assert score(place, place / "clips", *options, "--out", tmp_path / "folder.csv") == 0
        assert score(place, place / "clips" / "list.csv", *options, "--out", tmp_path / "table.csv") == 0
        both = [place / "clips" / "more" / "b.mp4", place / "clips" / "a.mp4"]
        assert score(place, *both, "--prompt", PROMPT, *options, "--out", tmp_path / "clips.json") == 0
        shown = capsys.readouterr().out
        assert "This head has no reference" in shown
        assert "a.mp4" in shown
        assert "±" in shown
        folder, listed = table(tmp_path / "folder.csv"), table(tmp_path / "table.csv")
        document = files.read_json(tmp_path / "clips.json")
        assert [Path(row["video"]).name for row in folder] == ["a.mp4"] * 4 + ["b.mp4"] * 4
        assert [row["video"] for row in listed[::4]] == ["a.mp4", "a.mp4#2", "more/b.mp4"]
        assert {row["prompt"] for row in listed[4:8]} == {"another"}
        judge = Judge.from_pretrained(place / "head", Backbone.from_pretrained(str(place / "backbone")))
        by_hand = judge.score_video(
            [str(each) for each in both[::-1]], PROMPT, [600, 300], 2, 4, POLICY, **tiny.CALL_WAN
        )
        expected = by_hand.scores.flatten().tolist(), by_hand.errors.flatten().tolist()
        for found in (folder, listed[:4] + listed[8:], [c for clip in document["clips"][::-1] for c in clip["scores"]]):
            np.testing.assert_allclose([float(row["score"]) for row in found], expected[0], atol=2e-5)
            np.testing.assert_allclose([float(row["standard_error"]) for row in found], expected[1], atol=2e-5)
            assert [(float(row["t"]), row["dimension"]) for row in found[:4]] == [
                *((600, "VQ"), (600, "MQ"), (300, "VQ"), (300, "MQ"))
            ]
        assert (document["seed"], document["draws"], document["frames"]["num_frames"]) == (4, 2, 9)
        assert "percentile" not in folder[0]

    def test_a_reference_gives_percentiles_and_probabilities(self, place, tmp_path, capsys):
        shutil.copytree(place / "head", tmp_path / "head")
        words = ["--head", tmp_path / "head", "--backbone", place / "backbone", "--data", place / "store"]
        words = ["reference", *map(str, words), "--draws", "2", "--t", "600,300"]
        assert cli.main(words) == 0
        said = capsys.readouterr().out
        assert "16 clips of 4 prompts, 2 draws" in said
        document = files.read_json(tmp_path / "head" / "reference.json")
        low, middle, high = np.percentile(np.array(document["scores"])[1, :, 0], (2.5, 50, 97.5))
        assert f"95 % of the clips from {low:+.2f} to {high:+.2f}" in said
        card = (tmp_path / "head" / "README.md").read_text()
        assert 'Scores of 16 clips of 4 prompts (split test of the store "store"), means over 2 noise draws' in card
        assert f"| 300 | {low:+.2f} to {high:+.2f}, median {middle:+.2f} |" in card
        assert document["weights_sha256"] == files.sha256(tmp_path / "head" / "model.safetensors")
        assert document["facts"]["command"].startswith("prism reference --split test --draws 2")
        assert cli.main(words) == 2
        assert "has a reference already; replace it with --overwrite" in capsys.readouterr().err
        assert cli.main([*words, "--overwrite"]) == 0
        assert files.read_json(tmp_path / "head" / "reference.json") == document
        own = np.array(document["scores"])
        known = next(row["prompt"] for row in stores.LatentStore.open(place / "store").videos.to_pylist()[::-1])
        for prompt, of, rows in ((PROMPT + " left", "all", slice(None)), (known, "prompt", slice(12, 16))):
            capsys.readouterr()
            words = [place / "clips" / "a.mp4", "--prompt", prompt, "--out", tmp_path / f"{of}.csv"]
            assert score(place, *words, "--draws", "2", head=tmp_path / "head") == 0
            shown = capsys.readouterr().out
            assert "among clips of store (test) at t = 600, 300" in " ".join(shown.split())
            assert f"At t = 300, 95 % of them score {low:+.2f} to {high:+.2f} in VQ" in " ".join(shown.split())
            assert ("The reference lacks the prompts of 1 of 1 clips" in " ".join(shown.split())) == (of == "all")
            for row in table(tmp_path / f"{of}.csv"):
                level, d = [600, 300].index(int(row["t"])), ["VQ", "MQ"].index(row["dimension"])
                below = 100 * np.mean(own[level, rows, d] < float(row["score"]))
                assert (float(row["percentile"]), row["reference_of"]) == (pytest.approx(below), of)
                assert int(row["reference_clips"]) == len(own[0, rows])
                assert 0 < float(row["win_probability"]) < 1
        assert score(place, *words[:3], "--t", "450", "--out", tmp_path / "other.csv", head=tmp_path / "head") == 0
        assert {row["percentile"] for row in table(tmp_path / "other.csv")} == {""}

    def test_clips_that_cannot_be_read_are_told_and_the_exit_code_says_so(self, place, clips, capsys):
        (clips / "c.mp4").write_bytes(b"no video")
        (clips / "c.txt").write_text("a cat")
        write_video(clips / "short.mp4", np.zeros((4, 32, 32, 3)), 8)
        (clips / "short.txt").write_text("a cat")
        out = clips / "scores.json"
        assert score(place, clips, "--draws", "1", "--out", out) == 1
        told = capsys.readouterr().err
        assert told.count("prism: left out: ") == 2
        assert "short.mp4 has 4 frames; the frame policy takes 9" in told.replace("'", "")
        document = files.read_json(out)
        assert [Path(each["video"]).name for each in document["unread"]] == ["c.mp4", "short.mp4"]
        assert [Path(each["video"]).name for each in document["clips"]] == ["a.mp4", "b.mp4"]
        assert {cell["standard_error"] for cell in document["clips"][0]["scores"]} == {None}  # one draw
        assert score(place, clips / "c.mp4", clips / "gone.mp4", "--prompt", "x", "--out", clips / "none.csv") == 2
        assert "None of the 2 clips could be read" in capsys.readouterr().err
        assert not list(clips.glob("none*"))

    def test_a_run_that_was_killed_goes_on(self, place, clips, tmp_path, monkeypatch, capsys):
        out, words = tmp_path / "s.csv", [clips / "list.csv", "--draws", "1", "--t", "500"]
        assert score(place, *words, "--out", tmp_path / "whole.csv") == 0
        whole, calls = Judge.score_video, []

        def breaks(self, *args, **kwargs):
            calls.append(args)
            if len(calls) in (2, 4):
                raise KeyboardInterrupt
            return whole(self, *args, **kwargs)

        monkeypatch.setattr(Judge, "score_video", breaks)
        assert score(place, *words, "--out", out) == 130
        assert not out.exists()
        with Journal.path(out).open("a") as stream:
            stream.write('{"video": "more/b.mp4", "pro')  # a line that a kill broke
        assert score(place, *words, "--out", out) == 2
        assert "go on with --resume" in capsys.readouterr().err
        assert score(place, *words, "--out", out, "--seed", "1", "--resume") == 2
        assert "seed was 0 and is now 1" in capsys.readouterr().err
        assert score(place, *words, "--out", out, "--resume") == 130
        assert score(place, *words, "--out", out, "--resume") == 0
        assert len(calls) == 5
        assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()
        assert sorted(each.name for each in tmp_path.glob("*s.csv*")) == ["s.csv"]
        assert score(place, *words, "--out", out) == 2
        assert "exists already" in capsys.readouterr().err
        assert score(place, *words, "--out", out, "--overwrite") == 0

    def test_processes_share_the_clips_and_any_number_goes_on(self, place, clips, tmp_path):
        """The file is that of one process; rows that killed processes noted are taken over, each once."""
        (clips / "bad.mp4").write_bytes(b"no video")
        with (clips / "list.csv").open("a", newline="") as stream:
            csv.writer(stream).writerows([[f"prompt {n}", "more/b.mp4", ""] for n in range(3)] + [["x", "bad.mp4", ""]])
        words = [clips / "list.csv", "--draws", "1", "--t", "500"]
        assert score(place, *words, "--out", tmp_path / "one.json") == 1
        whole, out = files.read_json(tmp_path / "one.json"), tmp_path / "two.json"
        facts = {name: whole[name] for name in whole if name not in ("schema", "command", "clips", "unread")}
        for rank, places in enumerate(((), (0,), (4, 1))):  # of three processes that were killed
            journal = Journal(out, facts, rank)
            if rank == 0:
                assert journal.begin(False) == {}
            for row in places:
                journal.add(whole["clips"][row])
        with Journal.path(out, 2).open("a") as stream:
            stream.write('{"video": "more/b.mp4", "pro')
        Journal.path(out, 3).write_text('{"jour')
        models = ["--backbone", str(place / "backbone"), "--head", str(place / "head"), "--out", str(out), "--resume"]
        both = forks.run(cli.main, ["score", *map(str, words), *models])
        assert [process.code for process in both] == [1, 0], both
        assert [process.err.count("prism: left out: ") for process in both] == [1, 0]
        assert [process.out.count("Scores: ") for process in both] == [1, 0]
        assert files.read_json(out) == whole
        assert sorted(each.name for each in tmp_path.iterdir() if each.is_file()) == ["one.json", "two.json"]

    @pytest.mark.parametrize("line", ["[]", '{"video": 1}', "nonsense", '{"journal": 3}', '{"video":"a","prompt":"b"}'])
    def test_a_list_of_done_clips_that_lies_is_refused(self, place, tmp_path, capsys, monkeypatch, line):
        out = tmp_path / "s.csv"
        monkeypatch.setattr(Judge, "score_video", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        words = [place / "clips" / "a.mp4", "--draws", "1", "--out", out]
        assert score(place, *words) == 130
        with Journal.path(out).open("a") as stream:
            stream.write(f"{line}\n")
        assert score(place, *words, "--resume") == 2
        assert "is no list of scored clips, or was altered" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:This judge is untrained")
def test_a_pipeline_that_starts_from_an_image_takes_it_from_a_flag_or_a_table(tmp_path, capsys):
    pipe, call = ltx_i2v()
    pipe.save_pretrained(tmp_path / "backbone")
    call.pop("image").save(tmp_path / "image.png")
    files.write_json(tmp_path / "backbone" / "call.json", call)
    Judge.untrained(pipe, dim=16, dimensions=("VQ",)).save_pretrained(tmp_path / "head")
    video = np.random.default_rng(0).uniform(size=(call["num_frames"], call["height"], call["width"], 3))
    write_video(tmp_path / "clip.mp4", video, 8)
    (tmp_path / "list.csv").write_text("prompt,video,image\na cat,clip.mp4,image.png\na cat,clip.mp4,gone.png\n")
    (tmp_path / "two.csv").write_text("prompt,video,image\na cat,clip.mp4,image.png\na dog,clip.mp4,gone.png\n")
    words = [tmp_path / "clip.mp4", "--prompt", "a cat", "--draws", "1"]
    assert score(tmp_path, *words) == 2
    assert (
        "clip.mp4 has no image; give --image FILE, or a table with a column image (LTXImageToVideoPip"
        in capsys.readouterr().err
    )
    assert score(tmp_path, *words, "--image", tmp_path / "image.png", "--out", tmp_path / "flag.csv") == 0
    assert score(tmp_path, tmp_path / "list.csv", "--draws", "1", "--out", tmp_path / "list-out.csv") == 0
    flag, listed = table(tmp_path / "flag.csv"), table(tmp_path / "list-out.csv")
    assert [row["score"] for row in flag] == [row["score"] for row in listed]
    assert listed[0]["image"] == str(tmp_path / "image.png")
    assert score(tmp_path, tmp_path / "two.csv", "--draws", "1") == 1
    assert "gone.png" in capsys.readouterr().err


REFUSED = {
    "nothing": ([], "Which clips to score is not said"),
    "no prompt": (["{clips}/c.mp4"], "c.mp4 has no prompt; give --prompt, a text file of the same name"),
    "prompt beside a table": (["{clips}/list.csv", "--prompt", "x"], "has a prompt for each clip; leave --prompt out"),
    "an image": (["{clips}/a.mp4", "--image", "x.png"], "WanPipeline takes no image; leave --image out"),
    "out": (["{clips}/a.mp4", "--out", "x.txt"], "must end in .csv or .json"),
    "a folder as out": (["{clips}/a.mp4", "--out", "{clips}/folder.csv"], "is a folder; name a file"),
    "levels": (["{clips}/a.mp4", "--t", "high"], 'The --t "high" are not numbers apart by commas'),
    "a level": (["{clips}/a.mp4", "--t", "1001"], "The --t hold 1001"),
    "draws": (["{clips}/a.mp4", "--draws", "0"], "--draws must be a whole number from 1 to 1,000; found 0"),
    "a climbing path": (["{clips}/climbs.jsonl"], "leads out of the data's folder"),
    "a bad table": (["{clips}/twice.csv"], "twice"),
    "an empty table": (["{clips}/empty.csv"], "There is no clip in"),
    "a pickle": (["{clips}/set.pkl"], "prism: The video"),
    "no file": (["{clips}/none.mp4"], "none.mp4 does not exist; name a file or a folder"),
    "another column": (["{clips}/other.csv"], "other.csv has the columns of no known format"),
}


@pytest.mark.filterwarnings("ignore:This judge is untrained")
@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_one_sentence(place, clips, capsys, case):
    words, sentence = REFUSED[case]
    shutil.copy(clips / "a.mp4", clips / "c.mp4")
    (clips / "folder.csv").mkdir()
    (clips / "climbs.jsonl").write_text(json.dumps({"prompt": "a", "video": "../../secret.mp4"}))
    (clips / "twice.csv").write_text("prompt,video,video\na,b,c\n")
    (clips / "empty.csv").write_text("prompt,video\n,a.mp4\n")
    (clips / "other.csv").write_text("words,clip\na,b\n")
    (clips / "set.pkl").write_bytes(b"\x80\x04.")
    words = [word.format(clips=clips) for word in words]
    words += ["--prompt", "x"] if case == "a pickle" else []
    assert score(place, *words) == 2
    told = capsys.readouterr().err.splitlines()
    assert sentence in told[-1], told


def test_tables_of_every_kind_name_clips(clips):
    rows = {"prompt": ["a", "b", None], "video": ["a.mp4", "more/b.mp4", "a.mp4"], "image": ["a.txt", None, None]}
    pq.write_table(pa.table(rows), clips / "plain.parquet")
    data = [(clips / name).read_bytes() for name in ("a.mp4", "more/b.mp4")]
    pq.write_table(pa.table({"prompt": ["a", "b"], "video": data}), clips / "embedded.parquet")
    (clips / "rated.jsonl").write_text(
        '{"prompt": "a", "path": "a.mp4", "VQ": 3}\n{"prompt": "b", "path": "more/b.mp4"}'
    )
    (clips / "pairs.csv").write_text("prompt,chosen,rejected\na,a.mp4,more/b.mp4\n")
    for name in ("plain.parquet", "embedded.parquet", "rated.jsonl", "pairs.csv"):
        found = read_clips(clips / name)
        frames = [
            read_clip(found.source(row["path"], row["frames"]), POLICY).frames for row in found.videos.to_pylist()
        ]
        wanted = [read_clip(str(clips / each), POLICY).frames for each in ("a.mp4", "more/b.mp4")]
        assert np.array_equal(frames, wanted)
        assert len(found.votes) == (name == "pairs.csv")
    assert read_clips(clips / "plain.parquet").videos["image"].to_pylist() == ["a.txt", None]
    assert sum(map(len, read_clips(clips / "plain.parquet").dropped.values())) == 1


def test_the_shipped_head_has_a_reference_that_its_command_gives(tmp_path):
    """The first clips of the shipped reference, scored anew: on another processor they agree to rounding."""
    from prism.judge.reference import measure

    judge = Judge.from_pretrained(asset_folder("head"), pipeline())
    shipped = judge.reference
    assert shipped.levels == (699, 499)
    assert shipped.facts["command"] in (asset_folder("head") / "reference.log").read_text().replace(
        "--head src/prism/shapeworld/assets/head --t 699,499 --draws 4 --seed 0",
        "--split test --draws 4 --most 1000 --seed 0 --t 699,499",
    )
    few = measure(judge, asset_folder("candidates"), "test", [699], 4, 0, most=8, progress=False)
    rows = [place for place, key in enumerate(shipped.prompts) if key in few.prompts]
    np.testing.assert_allclose(few.scores[0], shipped.scores[0, rows], atol=2e-3)


def test_places_follow_the_referee_within_prompts_and_not_across_them():
    """The figures of docs/scoring.md: of the shipped reference, whose clips the referee scored."""
    reference = Judge.from_pretrained(asset_folder("head"), pipeline()).reference
    rows = stores.LatentStore.open(asset_folder("candidates")).videos.to_pylist()
    rows = [row for row in rows if row["split"] == "test"]
    truth, (_, prompts) = np.array([row["overall"] for row in rows]), np.unique(reference.prompts, return_inverse=True)
    judged = reference.scores[reference.levels.index(499), :, reference.dimensions.index("overall")]
    assert spearmanr(judged, truth).statistic == pytest.approx(-0.11, abs=0.01)
    apart = [each - (np.bincount(prompts, each) / np.bincount(prompts))[prompts] for each in (judged, truth)]
    assert spearmanr(*apart).statistic == pytest.approx(0.63, abs=0.01)
    shares = [share for by_name in reference.facts["between_prompts"].values() for share in by_name.values()]
    assert (round(min(shares), 2), round(max(shares), 2)) == (0.72, 0.93)


def test_the_page_runs_as_printed(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "scoring.md").read_text(encoding="utf-8")
    first = page.partition("```\n")[2].partition("```")[0].splitlines()[0]
    words = first.split(" ", 2)
    assert words[:2] == ["prism", "score"]
    import prism
    from prism.video import frames

    pipe = pipeline()
    video = pipe("a red circle moves left", **{**prism.shapeworld.CALL, "num_inference_steps": 2}, output_type="np")
    write_video(tmp_path / "clip.mp4", frames(video.frames[0]), 8)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["score", *shlex.split(words[2])]) == 0
    said = capsys.readouterr().out
    assert "overall" in said
    assert " %, 0." in said
