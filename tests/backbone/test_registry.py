"""A family of one's own: registered, brought by an installed package, looked up through bases, and refused shortly."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import Kandinsky5I2VPipeline, WanPipeline
from tests import forks, tiny
from tests.works import works
from tests.zoo import VARIANTS
from tests.zoo.own import OwnPipeline, OwnTransformer, own

import prism
from prism import cli
from prism.backbone import FAMILIES, Backbone, register, registry
from prism.errors import PrismError
from prism.judge import Judge


@pytest.fixture(autouse=True)
def _put_back(families_put_back: None) -> None: ...


class TunedWan(WanPipeline):  # type: ignore[misc]
    """A user's subclass."""


class TunedKandinsky(Kandinsky5I2VPipeline):  # type: ignore[misc]
    """A subclass of a pipeline of which a fact is told by its class."""


@works("Families of one's own", "a subclass of a supported pipeline", "exact", "It is of its base's family.")
@pytest.mark.parametrize(("kind", "variant"), [(TunedWan, "wan21_t2v_euler"), (TunedKandinsky, "kandinsky5_i2v")])
def test_a_subclass_is_of_its_bases_family(kind: type, variant: str) -> None:
    pipe, call = VARIANTS[variant]()
    plain = Backbone(pipe)
    tuned = Backbone(kind(**pipe.components))
    assert tuned.family is plain.family
    one, other = (b.condition([tiny.PROMPT], **call) for b in (plain, tuned))
    assert (one.given is None) == (other.given is None) == (variant != "kandinsky5_i2v")


@works(
    "Families of one's own",
    "register(family, pipeline=YourPipeline)",
    "exact",
    "Memory, folders and first blocks alone find the row.",
)
def test_a_registered_family_is_found_in_memory_and_in_folders(tmp_path: Path) -> None:
    pipe, call = own()
    with pytest.raises(PrismError, match=r"OwnPipeline is not supported yet. Nearest is 'wan'"):
        Backbone(pipe)
    pipe.save_pretrained(tmp_path / "pipe")
    with pytest.raises(PrismError, match="OwnPipeline is not supported yet"):
        Backbone.from_pretrained(str(tmp_path / "pipe"))
    row = register(replace(FAMILIES["wan"], name="own"), pipeline=OwnPipeline)
    assert FAMILIES["own"] is row is Backbone(pipe).family
    assert row.pipelines == ("OwnPipeline",)
    whole = Backbone.from_pretrained(str(tmp_path / "pipe"))
    assert isinstance(whole.pipe, OwnPipeline)
    assert isinstance(whole.denoiser, OwnTransformer)
    judge = Judge.untrained(whole, dim=16)
    found = prism.best_of_n(whole.pipe, judge, tiny.PROMPT, n=2, batch_size=1, output_type="latent", **call)
    alone = whole.pipe(tiny.PROMPT, generator=torch.Generator().manual_seed(found.seed), output_type="latent", **call)
    assert torch.equal(found.video, alone[0][0])
    some = Backbone.from_pretrained(str(tmp_path / "pipe"), up_to=1)
    latents, call = found.latents, {**call, "output_type": "latent"}
    one, other = (b.tokens(latents, b.condition([tiny.PROMPT], **call), 500.0, 1).visual for b in (whole, some))
    assert torch.equal(one, other)


def test_what_is_known_is_not_replaced_unasked() -> None:
    wan = FAMILIES["wan"]
    mine = replace(wan, tap=0.5)
    with pytest.raises(PrismError, match="There is a family 'wan' already; give yours another name, or replace=True"):
        register(mine)
    with pytest.raises(PrismError, match="WanPipeline is of the family 'wan' already; give replace=True"):
        register(replace(mine, name="mine"))
    assert register(wan) == wan  # the same again is nothing new
    register(replace(mine, name="mine"), pipeline="WanPipeline", replace=True)
    assert Backbone(tiny.wan()).family.name == "mine"
    for wrong, sentence in (({"family": {}}, "found dict"), ({"family": mine, "pipeline": ()}, "is of no pipeline")):
        with pytest.raises(PrismError, match=sentence):
            register(**wrong)  # type: ignore[arg-type]


def test_a_pipeline_registered_by_its_name_alone_cannot_be_loaded_from_a_folder(tmp_path: Path) -> None:
    own()[0].save_pretrained(tmp_path / "pipe")
    register(replace(FAMILIES["wan"], name="own"), pipeline="OwnPipeline")
    with pytest.raises(PrismError, match=r"OwnPipeline is none of diffusers'.*register its family with the class"):
        Backbone.from_pretrained(str(tmp_path / "pipe"))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("Kandinsky5V2VPipeline", "kandinsky-5"),
        ("QwenImageTurboPipeline", "qwen-image"),
        ("SomethingElse", None),
        ("X" * 5000, None),
    ],
)
def test_the_refusal_is_short_and_names_the_nearest(name: str, nearest: str | None) -> None:
    with pytest.raises(PrismError) as refusal:
        registry.family_named(name)
    told = str(refusal.value)
    assert len(told) <= 300
    assert "docs/backbones.md" in told
    assert (f"Nearest is {nearest!r}" in told) if nearest else ("Nearest" not in told)


def test_the_nearest_is_told_by_the_denoiser() -> None:
    """By its blocks and its text embedder, whatever the pipeline is called."""

    foo = SimpleNamespace(components={"transformer": tiny.cogvideox().transformer})
    with pytest.raises(PrismError, match="Nearest is 'cogvideox'"):
        registry.family_of(foo)


ROWS = """
from dataclasses import replace
from prism.backbone import FAMILIES
row = replace(FAMILIES["wan"], name="{name}", pipelines=("{pipeline}",))
def rows():
    from tests.zoo.own import OwnPipeline
    return {{OwnPipeline: row}}
def broken():
    raise RuntimeError("a bug in a package")
"""


def installed(folder: Path, **points: str) -> None:
    """A package in a folder, with entry points."""
    info = folder / "their_rows-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-rows\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[prism.families]", *lines]) + "\n")
    (folder / "their_rows.py").write_text(ROWS.format(name="theirs", pipeline="TheirPipeline"))


@works(
    "Families of one's own",
    "an installed package with an entry point in the group prism.families",
    "works",
    "Commands find its rows.",
)
def test_an_entry_point_is_found_and_a_broken_one_is_warned_of(tmp_path: Path, monkeypatch: Any) -> None:
    installed(tmp_path, a="their_rows:broken", b="their_rows:row", c="their_rows:rows", d="their_rows:nothing")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert registry.family_named("WanPipeline").name == "wan"  # of what is known nothing is loaded
    assert "their_rows" not in sys.modules
    with pytest.warns(UserWarning, match="The entry point") as said:
        assert registry.family_named("TheirPipeline").name == "theirs"
    told = [str(w.message) for w in said if "entry point" in str(w.message)]
    assert "'a' of their-rows in the group 'prism.families' gives no family (RuntimeError: a bug in a pack" in told[0]
    assert len(told) == 2  # c: the same row for a further pipeline; d: there is no such object
    sys.modules.pop("their_rows")


def doctor(site: Path, pipe: Path) -> int:
    sys.path.insert(0, str(site))
    return cli.main(["doctor", str(pipe), "--no-run", "--device", "cpu"])


def test_a_command_finds_what_an_entry_point_brings(tmp_path: Path) -> None:
    installed(tmp_path / "site", own="their_rows:rows")
    pipe, _ = own()
    pipe.save_pretrained(tmp_path / "pipe")
    (done,) = forks.run(doctor, tmp_path / "site", tmp_path / "pipe", count=1)
    assert done.code == 0, done.err
    assert "OwnPipeline (Wan 2.1, Wan 2.2)" in done.out


def test_one_row_is_registered_for_further_pipelines() -> None:
    """It was refused as another family of that name."""
    row = replace(FAMILIES["wan"], name="own")
    first = register(row, pipeline=OwnPipeline)
    both = register(row, pipeline="OtherPipeline")
    assert both.pipelines == FAMILIES["own"].pipelines == ("OwnPipeline", "OtherPipeline")
    assert first.pipelines == ("OwnPipeline",)
    assert registry.family_named("OwnPipeline") is registry.family_named("OtherPipeline") is both
    assert register(row, pipeline=OwnPipeline).pipelines == both.pipelines
    with pytest.raises(PrismError, match="There is a family 'own' already"):
        register(replace(row, tap=0.5), pipeline="ThirdPipeline")
    for wrong in (5, own()[0], [5], ""):
        with pytest.raises(
            PrismError, match="is of no pipeline; give `pipeline`, a class or its name, or a list of these"
        ):
            register(row, pipeline=wrong)  # type: ignore[arg-type]


ENDS = """
from prism.backbone import FAMILIES
from dataclasses import replace
row = replace(FAMILIES["wan"], name="ends", pipelines=("TheirPipeline",))
number = 5
def ends():
    raise SystemExit(3)
"""


@works(
    "Families of one's own",
    "plugins that end the program, name a missing module or attribute, give no family, or claim another's pipeline",
    "warned",
    "The warning names the package and its entry point; all else goes on.",
)
def test_whatever_a_plugin_does_the_others_go_on(tmp_path: Path, monkeypatch: Any) -> None:
    """One that raised SystemExit, as a module of commands may, ended the caller's program."""
    points = {"a": "ends:ends", "b": "ends:number", "c": "nowhere:row", "d": "ends:nothing", "e": "their_rows:row"}
    installed(tmp_path, **points, f="ends:row", g="their_rows:rows")
    (tmp_path / "ends.py").write_text(ENDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._register_entry_points.cache_clear()
    with pytest.warns(UserWarning, match="The entry point") as said:
        assert registry.family_named("TheirPipeline").name == "theirs"
    reasons = [str(each.message) for each in said]
    words = ("SystemExit: 3", "'int' object", "No module named", "has no attribute 'nothing'", "of the family 'theirs'")
    assert len(reasons) == len(words)
    for place, word in zip("abcdf", words):
        assert any(f"entry point '{place}' of their-rows" in reason and word in reason for reason in reasons), place
    registry._register_entry_points.cache_clear()
