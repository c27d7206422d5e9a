"""The command line on tiny real pipelines: what it writes, and one sentence for every mistake."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import stores, tiny
from tests.zoo import VARIANTS

from prism import Judge, cli, files, video
from prism.report.metrics import validate

PROMPT = tiny.PROMPT


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny backbone, a head for it, a head for another backbone, and a store."""
    folder = tmp_path_factory.mktemp("cli")
    pipe = tiny.wan("unipc")
    pipe.save_pretrained(folder / "backbone")
    files.write_json(folder / "backbone" / "call.json", tiny.CALL_WAN)
    Judge.untrained(pipe, dim=32).save_pretrained(folder / "head", {"seed": 3})
    Judge.untrained(tiny.cogvideox(), dim=32).save_pretrained(folder / "other-head")
    stores.make(folder / "store")
    return folder


def sample(place, out, *arguments, prompt=PROMPT, head="head"):
    models = ["--backbone", str(place / "backbone"), "--head", str(place / head)]
    return cli.main(["sample", "--prompt", prompt, "--n", "3", *models, "--out", str(out), *arguments])


@pytest.fixture
def written(monkeypatch) -> dict[str, np.ndarray]:
    """Frames by the name of the file that they are written to. Files do not tell: on some processors the encoder gives
    other bytes for the same frames now and then."""
    found, real = {}, video.write_video

    def write(path, frames, fps, **options):
        found[path.name] = np.asarray(frames)
        real(path, frames, fps, **options)

    monkeypatch.setattr(video, "write_video", write)
    return found


def test_sample_writes_the_stock_pipelines_video(place, tmp_path, capsys, written):
    out = tmp_path / "out"
    assert sample(place, out, "--schedule", "2:2,4:1", "--batch-size", "1", "--seed", "5") == 0
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "metrics.json", "report.html", "winner.mp4"]
    metrics = files.read_json(out / "metrics.json")
    validate(metrics)
    assert metrics["seeds"] == [5, 6, 7]
    assert [cut["step"] for cut in metrics["cuts"]] == [2, 4]
    assert [len(cut["kept"]) for cut in metrics["cuts"]] == [2, 1]
    assert metrics["cuts"][-1]["kept"] == [metrics["winner"]]
    (row,) = metrics["best_of_n"]
    assert (row["strategy"], row["schedule"], row["head_seed"]) == ("early", [[2, 2], [4, 1]], 3)
    assert row["denoiser_rows"] == metrics["ledger"]["denoiser_rows"] < 3 * 6 * 2
    assert row["vae_decodes"] == 1
    assert files.read_json(out / "config.json")["call"] == tiny.CALL_WAN

    generator = torch.Generator("cpu").manual_seed(metrics["seeds"][metrics["winner"]])
    stock = tiny.wan("unipc")(PROMPT, generator=generator, **tiny.CALL_WAN).frames[0]
    assert np.array_equal(written["winner.mp4"], stock)
    assert np.abs(video.read_video(out / "winner.mp4") - stock).mean() < 0.02
    assert f"seed {metrics['seeds'][metrics['winner']]}" in capsys.readouterr().out


def test_flags_override_call_json(place, tmp_path):
    out = tmp_path / "out"
    size = ["--num-frames", "5", "--height", "16", "--guidance-scale", "1", "--steps", "4"]
    assert sample(place, out, "--strategy", "draft", "--draft-steps", "2", "--judge-at", "600", *size) == 0
    call = files.read_json(out / "config.json")["call"]
    changed = {"num_frames": 5, "height": 16, "guidance_scale": 1.0, "num_inference_steps": 4}
    assert call == {**tiny.CALL_WAN, **changed}
    assert video.read_video(out / "winner.mp4").shape == (5, 16, 32, 3)
    (row,) = files.read_json(out / "metrics.json")["best_of_n"]
    assert (row["draft_steps"], row["judge_at"], row["num_inference_steps"]) == (2, 600, 4)


def test_another_family_and_no_judge(tmp_path, written):
    """CogVideoX gives pictures unless told otherwise; the strategy none needs no head."""
    pipe = tiny.cogvideox()
    pipe.save_pretrained(tmp_path / "backbone")
    files.write_json(tmp_path / "backbone" / "call.json", tiny.CALL_COGVIDEOX)
    command = ["sample", "--prompt", PROMPT, "--backbone", str(tmp_path / "backbone"), "--strategy", "none"]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
    generator = torch.Generator("cpu").manual_seed(0)
    stock = pipe(PROMPT, generator=generator, output_type="np", **tiny.CALL_COGVIDEOX).frames[0]
    assert np.array_equal(written["winner.mp4"], stock)
    assert np.abs(video.read_video(tmp_path / "out" / "winner.mp4") - stock).mean() < 0.05  # noise does not compress
    (row,) = files.read_json(tmp_path / "out" / "metrics.json")["best_of_n"]
    assert (row["judge"], row["head_calls"], row["strategy"]) == (None, 0, "none")


def test_weights_decide_and_are_reported(place, tmp_path):
    assert sample(place, tmp_path / "a", "--select-by", "VQ:1,TA:-2", "--schedule", "3:1") == 0
    (cut,) = files.read_json(tmp_path / "a" / "metrics.json")["cuts"]
    expected = [vq - 2 * ta for vq, ta in zip(cut["dimensions"]["VQ"], cut["dimensions"]["TA"])]
    assert list(cut["scores"].values()) == pytest.approx(expected)
    assert cut["kept"] == [expected.index(max(expected))]


def test_train_then_eval_then_resume_and_overwrite(place, tmp_path, capsys):
    common = ["--data", str(place / "store"), "--backbone", str(place / "backbone")]
    run, steps = tmp_path / "run", ["--dim", "32", "--steps", "4", "--prompts-per-step", "2"]
    with pytest.warns(UserWarning, match="6 training prompts: too few to learn from; the study needed some 800"):
        assert cli.main(["train", *common, "--out", str(run), *steps]) == 0
    assert {"head", "history.json", "metrics.json", "config.json", "report.html"} <= {p.name for p in run.iterdir()}
    validate(files.read_json(run / "metrics.json"))
    weights = files.sha256(run / "head" / "model.safetensors")
    told = capsys.readouterr().out
    rows = files.read_json(run / "metrics.json")["accuracy"]
    assert {row["t"] for row in rows} == {899, 699, 499}
    assert {row["set"] for row in rows} == {"validation"}
    assert all(f" {level} " in told for level in (899, 699, 499))
    assert (run / "head" / "model.safetensors").stat().st_mode & 0o044
    measured = files.read_json(run / "metrics.json")["accuracy"]
    assert files.read_json(run / "head" / "evaluation.json") == {"accuracy": measured}
    assert f"| {measured[0]['set']} | {measured[0]['t']:g} |" in (run / "head" / "README.md").read_text()

    evaluation = ["eval", *common, "--head", str(run), "--timesteps", "900,0"]
    assert cli.main([*evaluation, "--out", str(tmp_path / "eval")]) == 0
    metrics = files.read_json(tmp_path / "eval" / "metrics.json")
    validate(metrics)
    assert {row["t"] for row in metrics["accuracy"]} == {900, 0}
    assert "pairwise accuracy" in capsys.readouterr().out

    assert cli.main(["train", *common, "--out", str(run), *steps]) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main(["train", *common, "--out", str(run), *steps, "--resume"]) == 0
    assert cli.main(["train", *common, "--out", str(run), *steps, "--overwrite"]) == 0
    assert files.sha256(run / "head" / "model.safetensors") == weights
    assert cli.main(["train", *common, "--out", str(place / "store"), *steps, "--overwrite"]) == 2
    assert "holds a latent store, so it is not replaced" in capsys.readouterr().err
    assert (place / "store" / "store.json").exists()


BAD_OPTIONS = {
    "empty prompt": (["--prompt", " "], "prompt is empty"),
    "no candidates": (["--n", "0"], "--n must be a whole number from 1 to 10,000; found 0"),
    "no schedule": (["--schedule", "five"], 'schedule "five" is not a list of STEP:KEEP'),
    "keeps more than it has": (["--schedule", "2:9"], "keeps 9 candidates at step 2, and only 3"),
    "cuts after the last step": (["--schedule", "7:1"], "cuts at step 7, and the run has steps 1 to 6"),
    "out of order": (["--schedule", "4:2,3:1"], "cuts at step 3 after step 4"),
    "keeps none": (["--schedule", "4:0"], "keeps 0 candidates"),
    "unknown strategy": (["--strategy", "best"], 'no strategy "best"'),
    "oracle": (["--strategy", "oracle"], "needs a measured truth"),
    "long draft": (["--strategy", "draft", "--draft-steps", "9"], "longer than the run of 6"),
    "judge at nothing": (
        ["--strategy", "full", "--judge-at", "0"],
        "--judge-at must be a number above 0, at most 1,000",
    ),
    "unknown dimension": (["--select-by", "beauty"], "'beauty'"),
    "bad weights": (["--select-by", "VQ:x"], "neither a dimension nor a list"),
    "no such backbone": (["--backbone", "nowhere"], "nowhere"),
    "no such head": (["--head", "nowhere"], "The head folder nowhere does not exist"),
    "a pipeline for a head": (["--head", "BACKBONE"], "holds no head: its config.json does not exist"),
    "a head for a pipeline": (["--backbone", "HEAD"], "holds no diffusers pipeline: its model_index.json does not"),
    "embedded head for it": (["--head"], "embedded head fits only the embedded backbone"),
    "no such device": (["--device", "abacus"], "The device abacus cannot be used"),
    "no such dtype": (["--dtype", "int4"], "The --dtype is int4"),
    "no speed": (["--fps", "0"], "--fps must be a number from 0.1 to 240; found 0.0"),
}


def refused(code, capsys, out, sentence):
    """Code 2, one sentence on stderr that names the matter, nothing written."""
    captured = capsys.readouterr()
    assert code == 2, captured
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("prism: ")
    assert sentence in line
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_bad_option_gives_one_sentence(case, place, tmp_path, capsys):
    arguments, sentence = BAD_OPTIONS[case]
    options = {"--prompt": PROMPT, "--n": "3", "--backbone": str(place / "backbone"), "--head": str(place / "head")}
    options["--out"] = str(tmp_path / "out")
    if len(arguments) == 1:
        del options[arguments[0]]
    else:
        folders = {"HEAD": str(place / "head"), "BACKBONE": str(place / "backbone")}
        options |= {flag: folders.get(value, value) for flag, value in zip(arguments[::2], arguments[1::2])}
    code = cli.main(["sample", *(part for option in options.items() for part in option)])
    refused(code, capsys, tmp_path / "out", sentence)


@pytest.mark.parametrize("command", ["train", "eval", "study"])
def test_the_embedded_candidates_are_refused_for_another_backbone(command, place, tmp_path, capsys):
    arguments = ["--backbone", str(place / "backbone"), "--out", str(tmp_path / "out")]
    code = cli.main([command, *arguments, *(["--head", str(place / "head")] if command == "eval" else [])])
    refused(code, capsys, tmp_path / "out", "name a store of this backbone's own videos with --data")


def test_an_image_that_is_needed_is_asked_for(tmp_path, capsys):
    pipe, _ = VARIANTS["wan21_i2v"]()
    pipe.save_pretrained(tmp_path / "in" / "backbone")
    arguments = ["--prompt", PROMPT, "--backbone", str(tmp_path / "in" / "backbone"), "--strategy", "none"]
    (tmp_path / "work").mkdir()
    capsys.readouterr()
    code = cli.main(["sample", *arguments, "--out", str(tmp_path / "work" / "out")])
    refused(code, capsys, tmp_path / "work" / "out", "starts from an image; give --image FILE")


def test_a_head_for_another_backbone_is_refused(place, tmp_path, capsys):
    code = sample(place, tmp_path / "out", head="other-head")
    refused(code, capsys, tmp_path / "out", "CogVideoXTransformer3DModel")


@pytest.mark.parametrize("damage", ["truncated", "altered", "pickle", "NaN", "missing"])
def test_a_damaged_head_is_refused(damage, place, tmp_path_factory, tmp_path, capsys):
    head = tmp_path_factory.mktemp("damaged") / "head"
    head.mkdir()
    for name in ("config.json", "model.safetensors"):
        (head / name).write_bytes((place / "head" / name).read_bytes())
    path = head / "model.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "altered":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "pickle":
        path.write_bytes(pickle.dumps({"weights": [1.0]}))
    elif damage == "NaN":
        save_file({name: value * float("nan") for name, value in load_file(path).items()}, path)
    else:
        path.unlink()
    sentence = {"missing": "does not exist", "truncated": "altered", "NaN": "holds NaN or infinity"}.get(damage, damage)
    code = sample(place, tmp_path / "out", head=head)
    refused(code, capsys, tmp_path / "out", sentence)


def test_nan_in_a_candidate_names_its_seed(place, tmp_path_factory, tmp_path, capsys):
    broken = tmp_path_factory.mktemp("nan") / "backbone"
    pipe = tiny.wan("unipc")
    pipe.transformer.proj_out.bias.data.fill_(float("nan"))
    pipe.save_pretrained(broken)
    files.write_json(broken / "call.json", tiny.CALL_WAN)
    options = ["--backbone", str(broken), "--head", str(place / "head"), "--n", "2", "--seed", "11"]
    other = pytest.warns(UserWarning, match="was trained on other weights of this architecture")
    with other, pytest.warns(UserWarning, match="The candidate with seed 1[12] is dropped"):
        code = cli.main(["sample", "--prompt", PROMPT, *options, "--out", str(tmp_path / "out")])
    refused(
        code, capsys, tmp_path / "out", "No candidate has finite latents and scores, of those with the seeds 11, 12"
    )


def test_an_existing_folder_is_refused_and_kept(place, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("1")
    assert sample(place, tmp_path / "out") == 2
    assert "exists already" in capsys.readouterr().err
    assert sample(place, tmp_path / "out", "--overwrite") == 2
    assert "nothing that PRISM made" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine").read_text() == "1"
    assert sample(place, tmp_path / "new") == 0
    assert sample(place, tmp_path / "new", "--overwrite") == 0
    (tmp_path / "new" / "mine").write_text("1")
    capsys.readouterr()
    assert sample(place, tmp_path / "new", "--overwrite") == 2
    assert "holds mine, which no run made" in capsys.readouterr().err
    assert (tmp_path / "new" / "mine").read_text() == "1"


def test_an_unwritable_folder_is_refused(place, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert sample(place, tmp_path / "file" / "out") == 2
    assert "cannot be made" in capsys.readouterr().err


def test_a_missing_asset_is_named(monkeypatch, tmp_path, capsys):
    from prism.shapeworld import generator as assets

    monkeypatch.setattr(assets, "ROOT", tmp_path / "assets")
    (tmp_path / "work").mkdir()
    code = cli.main(["sample", "--prompt", PROMPT, "--out", str(tmp_path / "work" / "out")])
    refused(code, capsys, tmp_path / "work" / "out", "is missing; install the package again")


def test_a_planted_leak_fails_the_run(place, tmp_path, capsys):
    leaky = tmp_path / "leaky"
    leaky.mkdir()
    for path in (place / "store").iterdir():
        (leaky / path.name).write_bytes(path.read_bytes())
    pairs = pq.read_table(leaky / "pairs.parquet").to_pylist()
    pairs[0]["split"] = "test"
    pq.write_table(pa.Table.from_pylist(pairs), leaky / "pairs.parquet")
    (tmp_path / "work").mkdir()
    out, backbone = tmp_path / "work" / "out", str(place / "backbone")
    code = cli.main(["train", "--data", str(leaky), "--backbone", backbone, "--out", str(out), "--dim", "32"])
    refused(code, capsys, out, pairs[0]["prompt"])


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_ctrl_c_and_sigterm_end_the_command_and_leave_nothing(place, tmp_path, number, word):
    models = ["--backbone", str(place / "backbone"), "--head", str(place / "head")]
    command = [sys.executable, "-m", "prism", "sample", "--prompt", PROMPT, "--n", "2", "--steps", "900", *models]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "out")],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    while not list(tmp_path.iterdir()):  # the temporary folder: work has begun
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + number, stderr
    assert stderr.strip().splitlines()[-1] == f"prism: {word}"
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def usual_interrupts():
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, found)


@pytest.mark.parametrize("number", [errno.EFBIG, errno.EIO, errno.EROFS, errno.ENOSPC])
@pytest.mark.parametrize("named", [False, True])
def test_what_the_system_refuses_gets_a_sentence(monkeypatch, tmp_path, capsys, number, named):
    from prism.commands import sample as experiment

    def run(*_):
        raise OSError(number, os.strerror(number), *(["some/file"] if named else []))

    monkeypatch.setattr(experiment, "run", run)
    assert cli.main(["sample", "--prompt", PROMPT, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("prism: ")
    assert told.count("\n") == 1
    assert "space left" in told if number == errno.ENOSPC else os.strerror(number) in told


@pytest.mark.usefixtures("usual_interrupts")
def test_an_interrupt_that_a_library_turned_into_an_error_is_still_one(monkeypatch, tmp_path, capsys):
    from prism.commands import sample as experiment
    from prism.errors import PrismError

    def run(*_):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise PrismError("The file is truncated.") from None

    monkeypatch.setattr(experiment, "run", run)
    assert cli.main(["sample", "--prompt", PROMPT, "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "prism: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_version_and_unknown_commands(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("prism ")
    assert cli.main(["sing"]) == 2
    assert cli.main(["sample", "--prompt", "x"]) == 2  # --out is missing


@pytest.mark.parametrize("flags", [[], ["--resume"], ["--overwrite"]])
def test_an_empty_output_folder_will_do(place, tmp_path, flags):
    (tmp_path / "run").mkdir()
    common = ["--data", str(place / "store"), "--backbone", str(place / "backbone")]
    size = ["--dim", "16", "--tap", "1,2", "--steps", "2", "--prompts-per-step", "1"]
    assert cli.main(["train", *common, *size, "--out", str(tmp_path / "run"), *flags]) == 0
    assert len(files.read_json(tmp_path / "run" / "head" / "config.json")["members"]) == 2
    if "--resume" not in flags:
        (tmp_path / "eval").mkdir()
        evaluation = ["eval", *common, "--head", str(tmp_path / "run"), "--timesteps", "0", "--out"]
        assert cli.main([*evaluation, str(tmp_path / "eval"), *flags]) == 0
        (tmp_path / "sample").mkdir()
        assert sample(place, tmp_path / "sample", *flags) == 0
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".") or path.suffix == ".parts"]


@pytest.mark.parametrize("tap", ["4,x", "", "0", "2,99"])
def test_a_bad_tap_gets_a_sentence(place, tmp_path, capsys, tap):
    common = ["--data", str(place / "store"), "--backbone", str(place / "backbone"), "--out", str(tmp_path / "run")]
    refused(cli.main(["train", *common, "--tap", tap]), capsys, tmp_path / "run", "tap")


@pytest.mark.parametrize("words", [["--version"], ["data", "check", "pairs.csv"]])
def test_output_that_nobody_reads_ends_without_a_word(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\n")
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert cli.main(words) == 141
    assert capsys.readouterr().err == ""
