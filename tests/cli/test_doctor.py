"""`prism doctor`: what it says of saved pipelines of three families, and of what is none."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from tests.works import works
from tests.zoo import VARIANTS
from tests.zoo.own import own

from prism import cli
from prism.backbone import Backbone
from prism.commands import checks
from prism.commands.doctor import _backbone, _peak, _size, _standalone
from prism.sampling import expected_rows


@pytest.mark.parametrize("variant", ["hunyuan", "ltx_i2v", "wan22_a14b_t2v"])
def test_doctor_says_what_a_folder_is_and_what_a_run_costs(variant, tmp_path, capsys):
    pipe, call = VARIANTS[variant]()
    pipe.save_pretrained(tmp_path / "pipe")
    plain = {name: value for name, value in call.items() if isinstance(value, int | float | str)}
    (tmp_path / "pipe" / "call.json").write_text(json.dumps(plain))
    assert cli.main(["doctor", str(tmp_path / "pipe"), "--n", "4", "--schedule", "3:1"]) == 0
    said = capsys.readouterr().out
    assert type(pipe).__name__ in said
    blocks = {"hunyuan": 4}.get(variant, 3)
    assert f"1 to {blocks}, " in said
    cfg = "one_batch" if variant == "ltx_i2v" else "two_calls"
    guided, share = variant != "hunyuan", {"hunyuan": 2}.get(variant, 1) / blocks
    rows = expected_rows("early", 4, 6, cfg, guided, share, ((3, 1),))
    assert f"early, 3:1              {rows:.0f} denoiser rows" in said
    assert "yes: 3 of 6 steps come after the first cut" in said
    assert ("used for t from 875 to 1000" in said or "used for t from 900 to 1000" in said) == (variant[:6] == "wan22_")
    assert "candidates that fit     " in said
    assert "train one (prism train) on labelled pairs; the toy world's took about 800" in said
    assert "a judge by itself       loads " in said


@pytest.mark.filterwarnings("ignore")
def test_the_head_of_a_sound_reads_the_sounds_tokens():
    said = dict(_backbone(Backbone(VARIANTS["stable_audio"]()[0]), "sounds"))
    assert said["text tokens"] == "none: the head reads the sound's"


def test_a_distilled_model_has_little_to_cut(capsys):
    assert cli.main(["doctor", "--steps", "4", "--no-run"]) == 0
    said = capsys.readouterr().out
    assert "little: of 4 steps, as a distilled model takes, the first cut comes at step 1" in said
    assert "or drafts at 69% of its cost" in said
    assert "drafts of 2 steps" in said
    assert "no: --no-run" in said


def test_the_embedded_model_is_counted_at_the_tap_of_its_head(capsys):
    assert cli.main(["doctor", "--no-run", "--schedule", "4:1"]) == 0
    said = capsys.readouterr().out
    assert "judge                   the one that ships, after block 5" in said
    assert "early, 4:1              89 denoiser rows" in said  # as metrics.json of prism sample has it: 88.7
    assert "1 threads" not in said


def test_a_size_that_does_not_fit_is_named(tmp_path, capsys):
    pipe, _ = VARIANTS["wan21_t2v_euler"]()
    pipe.save_pretrained(tmp_path / "pipe")
    (tmp_path / "pipe" / "call.json").write_text(json.dumps({"height": 17, "width": 32, "num_frames": 9}))
    assert cli.main(["doctor", str(tmp_path / "pipe")]) == 0
    said = capsys.readouterr().out
    assert "measured                no: " in said
    assert cli.main(["doctor", str(tmp_path / "pipe"), "--height", "32"]) == 0
    assert "a denoiser row          " in capsys.readouterr().out
    assert "(tried height 17, width 32, num_frames 9; choose another, as --height and --width)" in said


def test_memory_is_what_is_held_at_once():
    work = lambda: torch.ones(2**20).add(1).sum()  # noqa: E731  # two tensors of 4 MiB while it adds
    assert _peak(torch.device("cpu"), work) == pytest.approx(8 * 2**20, rel=0.01)


@pytest.mark.parametrize("variant", ["latte", "motif_video", "wan21_t2v_euler"])
def test_what_a_judge_by_itself_loads_is_what_it_then_holds(variant, tmp_path):
    """Blocks that run beside those that are read, and blocks of a decoder behind them, are told apart as in loading."""
    pipe, _ = VARIANTS[variant]()
    pipe.save_pretrained(tmp_path / "pipe")
    whole = Backbone(pipe)
    alone = Backbone.from_pretrained(str(tmp_path / "pipe"), up_to=whole.default_tap)
    held = sum(value.nbytes for value in (*alone.denoiser.parameters(), *alone.denoiser.buffers()))
    assert f"loads {_size(held)} of the denoiser's" in _standalone(whole)


def test_of_a_u_net_no_first_blocks_are_promised():
    assert "no first blocks can be loaded alone" in _standalone(Backbone(VARIANTS["svd"]()[0]))


def test_a_folder_that_is_no_pipeline(tmp_path, capsys):
    assert cli.main(["doctor", str(tmp_path)]) == 2
    assert "model_index.json" in capsys.readouterr().err


FILE = """
from dataclasses import replace
from prism.backbone import FAMILIES
from tests.zoo.own import OwnPipeline

family = replace(FAMILIES["wan"], name="own"{changes})
"""
SIZES = ["--height", "32", "--width", "48", "--num-frames", "9", "--steps", "4", "--device", "cpu"]


@works(
    "Families of one's own",
    "prism doctor --family FILE FOLDER",
    "works",
    "Checks the row on the pipeline as the tests check PRISM's own; a line a check, with the facts to look at.",
)
@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ("", {}),
        (', layout="BTCHW"', {"token grid": "layout"}),
        (', cfg="one_batch"', {"conditional rows": "look at cfg"}),
        (', clock="rising_flow"', {"noise levels": "look at clock"}),
        (", vae_mean_std=False", {"latents and videos": "look at vae_mean_std"}),
        (", patch=(1, 1, 1)", {"token grid": "tokens_before", "exact winner": "patch"}),
    ],
)
def test_doctor_checks_a_family_of_ones_own(changes, failing, tmp_path, capsys, families_put_back):
    own()[0].save_pretrained(tmp_path / "pipe")
    (tmp_path / "family.py").write_text(FILE.format(changes=changes))
    code = cli.main(["doctor", "--family", str(tmp_path / "family.py"), str(tmp_path / "pipe"), *SIZES])
    lines = capsys.readouterr().out.splitlines()
    assert code == (1 if failing else 0), lines
    told = {line[10:32].strip(): line for line in lines}
    assert set(told) == set(checks.CHECKS)
    for name, words in failing.items():
        assert told[name].split()[0] == "FAILS"
        assert words in told[name]
        assert len(told[name]) < 500
    if not failing:
        assert all(line.split()[0] == "holds" for line in lines)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("x = 1", "defines no `family`"),
        ("family = nothing", "could not be run: NameError: name 'nothing' is not defined"),
        (None, "does not exist"),
        ("family = (", "could not be run: SyntaxError: '(' was never closed"),
        ("from . import rows", "could not be run: ImportError: attempted relative import"),
        ("raise SystemExit(0)", "could not be run: SystemExit: 0"),
        ("family = 5", "defines no `family`, a prism.backbone.Family; its `family` is int"),
        ("from prism.backbone import FAMILIES\nmine = FAMILIES['wan']", "mine is one: call it `family`"),
    ],
)
def test_a_file_without_a_family(text, sentence, tmp_path, capsys):
    if text is not None:
        (tmp_path / "family.py").write_text(text)
    assert cli.main(["doctor", "--family", str(tmp_path / "family.py"), str(tmp_path)]) == 2
    assert sentence in capsys.readouterr().err
    assert cli.main(["doctor", "--family", str(tmp_path / "family.py")]) == 2
    assert "prism doctor --family FILE FOLDER" in capsys.readouterr().err


def test_a_file_may_import_what_lies_beside_it_and_has_to_bring_the_pipelines_class(
    tmp_path, capsys, families_put_back, monkeypatch
):
    monkeypatch.setattr("sys.path", list(sys.path))
    own()[0].save_pretrained(tmp_path / "pipe")
    (tmp_path / "beside_it.py").write_text(FILE.format(changes=""))
    arguments = ["doctor", "--family", str(tmp_path / "family.py"), str(tmp_path / "pipe"), *SIZES]
    (tmp_path / "family.py").write_text("from beside_it import family\n")
    assert cli.main(arguments) == 2
    assert "must import or define that class beside `family`" in capsys.readouterr().err
    (tmp_path / "family.py").write_text("from beside_it import OwnPipeline, family\n")
    assert cli.main(arguments) == 0
    assert cli.main(["doctor", "--family", str(tmp_path), str(tmp_path / "pipe")]) == 2
    assert "is a folder" in capsys.readouterr().err
