"""The pack's files: workflows fit the nodes, metadata fits the registry, sources are what ComfyUI's reviewers allow."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from integrations.comfyui import plans, preview

from prism.errors import PrismError
from prism.sampling import plan_files

PACK = Path(__file__).parents[1]
WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
# Nodes of ComfyUI that the workflows use: their outputs.
CORE = {
    **{"UNETLoader": ["MODEL"], "CLIPLoader": ["CLIP"], "VAELoader": ["VAE"], "CLIPTextEncode": ["CONDITIONING"]},
    **{"ModelSamplingSD3": ["MODEL"], "EmptyHunyuanLatentVideo": ["LATENT"], "KSampler": ["LATENT"]},
    **{"KSamplerAdvanced": ["LATENT"], "VAEDecode": ["IMAGE"], "CreateVideo": ["VIDEO"], "SaveVideo": []},
    "PreviewImage": [],
}
WIDGETS = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}
SAMPLERS = {"sampler_name": ["euler", "uni_pc"], "scheduler": ["simple"]}  # of ComfyUI, where the stand-ins have few


@pytest.fixture(scope="module")
def schemas(comfy: Any) -> dict[str, Any]:
    from integrations.comfyui import nodes

    several = (nodes.LoadJudge, nodes.EarlyBestOfN, nodes.ScoreLatent, nodes.SeedReport)
    return {schema.node_id: schema for schema in (node.GET_SCHEMA() for node in several)}


def wrong(flow: dict[str, Any], schemas: dict[str, Any]) -> list[str]:
    """What does not fit in a workflow of ComfyUI's API format."""
    outputs = CORE | {name: [each.io_type for each in schema.outputs] for name, schema in schemas.items()}
    said = [
        f"{number}: no node {node['class_type']}" for number, node in flow.items() if node["class_type"] not in outputs
    ]
    for number, node in flow.items():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[1] >= len(outputs[flow[value[0]]["class_type"]]):
                said.append(f"{number}.{name}: no output {value}")
        schema = schemas.get(node["class_type"])
        if schema is None:
            continue
        inputs = {each.id: each for each in schema.inputs}
        said += [f"{number}: no input {name}" for name in node["inputs"].keys() - inputs.keys()]
        said += [f"{number}: lacks {n}" for n, each in inputs.items() if not each.optional and n not in node["inputs"]]
        for name, value in node["inputs"].items():
            each = inputs.get(name)
            if each is None:
                continue
            if isinstance(value, list):
                linked = outputs[flow[value[0]]["class_type"]][value[1] : value[1] + 1]
                said += [f"{number}.{name}: {linked} for {each.io_type}"] * (linked != [each.io_type])
            elif each.io_type == "COMBO":
                said += [f"{number}.{name}: {value}"] * (value not in SAMPLERS.get(name, each.settings["options"]))
            else:
                low, high = each.settings.get("min", -1e30), each.settings.get("max", 1e30)
                fits = type(value) is WIDGETS.get(each.io_type)
                fits = fits and (isinstance(value, str | bool) or low <= value <= high)
                said += [f"{number}.{name}: {value!r}"] * (not fits)
    return said


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_fit_the_nodes(path: Path, schemas: dict[str, Any]) -> None:
    flow = json.loads(path.read_text(encoding="utf-8"))
    assert any(node["class_type"] in schemas for node in flow.values())
    assert wrong(flow, schemas) == []


def test_a_workflow_that_does_not_fit_is_told(schemas: dict[str, Any]) -> None:
    flow = json.loads((PACK / "workflows/wan21_best_of_8.json").read_text(encoding="utf-8"))
    best = flow["9"]["inputs"]
    del best["cfg"]
    best |= {"beam": 1, "look": "back", "steps": 0, "plan": 5, "model": ["3", 0], "vae": ["3", 2]}
    told = wrong(flow, schemas)
    assert len(told) == 8  # an output that is missing is also of no type
    assert any("lacks cfg" in each for each in told)


def test_metadata_fits_the_registry() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((PACK / "pyproject.toml").read_text(encoding="utf-8"))
    name = project["project"]["name"]
    assert len(name) < 100
    assert re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]*", name)
    assert "comfyui" not in name.lower()
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["project"]["version"])
    assert project["project"]["license"] == {"text": "Apache-2.0"}
    assert project["project"]["urls"]["Repository"].startswith("https://")
    assert {"PublisherId", "DisplayName"} <= project["tool"]["comfy"].keys()
    assert not any(re.search(r"[=<>~!]", each) for each in project["project"]["dependencies"])


def test_sources_are_plain_text_without_forbidden_calls() -> None:
    for path in [path for path in PACK.glob("*.py") if path.name != "by_hand.py"]:  # .comfyignore leaves that out
        path.read_bytes().decode("cp1252")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        called = {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not called & {"eval", "exec", "compile", "__import__"}, path
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not imported & {"subprocess", "os", "pickle", "ctypes"}, path


def test_the_pack_is_loaded_before_comfyui_is() -> None:
    source = (PACK / "__init__.py").read_text(encoding="utf-8")
    assert not any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(source).body)


# -- texts of nodes


def test_seeds_are_read() -> None:
    assert plans.seeds_of("3, 9,12-15 ", 0, 8) == [3, 9, 12, 13, 14, 15]
    assert plans.seeds_of("  ", 5, 3) == [5, 6, 7]
    assert plans.seeds_of(str(2**64 - 1), 0, 1) == [2**64 - 1]
    with pytest.raises(PrismError, match="found 2"):
        plans.seeds_of("", 2**64 - 1, 2)


def test_plans_are_read_of_texts_and_files(tmp_path: Path) -> None:
    assert plans.early_plan("3:4,6:1", 8, 30, "now", 700.0, 2).schedule == ((3, 4), (6, 1))
    assert plans.early_plan("", 8, 30, "now", 700.0, 2).schedule == ((6, 1),)
    assert plans.early_plan("3:4", 8, 30, "now", 700.0, 2).schedule == ((3, 4), (30, 1))
    settings = {"schedule": [[4, 1]], "look": "ahead", "judge_at": 600.0, "num_draws": 3}
    plan = {"budget": 4.0, "cost": 3.5, "n": 8, "strategy": "early", "settings": settings}
    about: dict[str, Any] = {"family": "wan", "backbone": {}, "call": {}, "num_inference_steps": 30, "head": "x"}
    path = tmp_path / "plan.json"

    def write(**changes: Any) -> str:
        path.write_text(json.dumps(plan_files.document(about, [{**plan, **changes}])), encoding="utf-8")
        return str(path)

    made = plans.early_plan(write(), 8, 30, "now", 700.0, 2)
    assert (made.schedule, made.look, made.level, made.num_draws) == (((4, 1),), "ahead", 600.0, 3)
    for changes, n, said in (
        ({"n": 4}, 8, "is for 4 candidates, and there are 8 seeds; give 4 seeds"),
        ({"strategy": "full", "settings": {}}, 8, "is of the strategy full, and this node runs early alone"),
    ):
        with pytest.raises(PrismError, match=said):
            plans.early_plan(write(**changes), n, 30, "now", 700.0, 2)


# -- strips


class Vae:
    """A VAE of ComfyUI, by the one method that is called."""


def vae(weights: torch.Tensor, video: bool) -> Any:
    """A VAE that is linear: latents are mean colours through `weights` (C, 3), and further channels of noise."""

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        cells = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)  # (T, 3, h, w)
        latents = torch.einsum("cd,tdhw->tchw", weights, cells) + 0.5
        return latents[::4].movedim(0, 1)[None] if video else latents

    made = Vae()
    made.encode = encode  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize("video", [True, False])
def test_the_map_from_latents_to_colours_is_fitted_once(video: bool) -> None:
    weights = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    linear = vae(weights, video)
    fitted = preview.fitted(linear)
    assert fitted.error is not None
    assert fitted.error < 1e-5
    picture = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(1))
    latents = linear.encode(picture)[0]
    wanted = torch.nn.functional.avg_pool2d(picture.movedim(-1, 1), 8)[0].movedim(0, -1)
    torch.testing.assert_close(fitted.frames(latents)[0], wanted, rtol=0, atol=1e-4)
    linear.encode = None  # not called again
    assert preview.fitted(linear) is fitted
    kept = len(preview._fitted)
    del linear
    assert len(preview._fitted) == kept - 1


def test_without_a_vae_comfyuis_own_colours_are_taken() -> None:
    own = preview.map_of(None, SimpleNamespace(latent_rgb_factors=[[1.0, 0.0, -1.0]], latent_rgb_factors_bias=None))
    assert own is not None
    assert own.frames(torch.full((1, 1, 1, 1), 0.5)).flatten().tolist() == [0.75, 0.5, 0.25]
    assert preview.map_of(None, SimpleNamespace()) is None
    assert preview.map_of(Vae(), SimpleNamespace()) is None  # it cannot encode


def test_strips_have_a_row_a_candidate() -> None:
    colours = preview.LinearMap(torch.eye(3), torch.zeros(3))
    latents = torch.zeros(3, 9, 4, 8)
    latents[0] = 1.0
    strip = preview.strip([("1. seed 7 ü", latents), ("2. seed 8", None), ("3. seed 9", latents[:, 0])], colours)
    assert strip.shape == (1, 3 * (preview.HEIGHT + 16), 6 * 2 * preview.HEIGHT, 3)
    assert strip[0, 16 + preview.HEIGHT // 2, 5].tolist() == [1.0, 0.0, 0.0]
    assert strip[0, 16 + 112 + 5, 5].tolist() == pytest.approx([0.35] * 3, abs=0.01)


def test_no_module_of_comfyui_is_left_behind() -> None:
    assert "comfy.model_management" not in sys.modules
