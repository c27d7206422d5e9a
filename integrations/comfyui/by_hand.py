"""What needs a real ComfyUI, run by hand: its classes beside diffusers', a judge's scores, every sampler's winner.

`python -m integrations.comfyui.by_hand /path/to/ComfyUI` in the repository, in an environment that has what ComfyUI
imports. Models are tiny and random, on the CPU; nothing is downloaded.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prism.backbone.families import FAMILIES
from prism.judge import Judge
from prism.sampling.plan import judging_noise

from . import self_check
from .families import MATCHES

WAN = {
    **{"image_model": "wan2.1", "model_type": "t2v", "dim": 1536, "out_dim": 16, "num_heads": 12, "ffn_dim": 8960},
    **{"num_layers": 30, "patch_size": (1, 2, 2), "freq_dim": 256, "in_dim": 16, "eps": 1e-6},
    **{"window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True},
}
TWO_STREAMS = {
    **{"vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24},
    **{"axes_dim": [16, 56, 56], "qkv_bias": True, "guidance_embed": True, "in_channels": 16, "out_channels": 16},
}
HUNYUAN = {
    **{"image_model": "hunyuan_video", "patch_size": [1, 2, 2], "depth": 20, "depth_single_blocks": 40, "theta": 256},
    **{**TWO_STREAMS, "byt5": False, "meanflow": False},
}
FLUX = {"image_model": "flux", "patch_size": 2, "depth": 19, "depth_single_blocks": 38, "theta": 10000, **TWO_STREAMS}
LTX = {"image_model": "ltxv", "num_layers": 28, "attention_head_dim": 64, "cross_attention_dim": 2048}
CLASSES = {
    **{"WanModel": "wan", "HunyuanVideo": "hunyuan_video", "LTXVModel": "lightricks"},
    **{"QwenImageTransformer2DModel": "qwen_image", "Flux": "flux"},
}
VARIANTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("wan", "Wan 2.1 T2V", WAN),
    ("wan", "Wan 2.1 I2V", {**WAN, "model_type": "i2v", "in_dim": 36}),
    ("wan", "Wan 2.1 first-last", {**WAN, "model_type": "i2v", "in_dim": 36, "flf_pos_embed_token_number": 514}),
    ("wan", "Wan 2.2 5B", {**WAN, "in_dim": 48, "out_dim": 48}),
    ("hunyuan-video", "HunyuanVideo T2V", HUNYUAN),
    ("hunyuan-video", "HunyuanVideo I2V", {**HUNYUAN, "in_channels": 33}),
    ("ltx-video", "LTX-Video to 0.9.1", LTX),
    ("ltx-video-condition", "LTX-Video from 0.9.5", {**LTX, "causal_temporal_positioning": True}),
    ("qwen-image", "Qwen-Image", {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60}),
    ("flux", "Flux.1 dev", FLUX),
    ("flux", "Flux.1 schnell", {**FLUX, "guidance_embed": False}),
)


def main(folder: str) -> int:
    """Print what was compared; 1 where anything differs."""
    if not (Path(folder) / "comfyui_version.py").is_file():
        sys.exit(f"{folder or 'No folder'} is no ComfyUI; give the folder that holds its main.py.")
    sys.path.insert(0, folder)
    sys.argv = [*sys.argv[:1], "--cpu"]
    options: Any = importlib.import_module("comfy.options")
    options.enable_args_parsing()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    version = importlib.import_module("comfyui_version").__version__
    print(f"ComfyUI {version}, diffusers {importlib.import_module('diffusers').__version__}, torch {torch.__version__}")
    wrong = 0
    for name, label, config in VARIANTS:
        match = next(match for match in MATCHES if name in match.families)
        module: Any = importlib.import_module(f"comfy.ldm.{CLASSES[match.kind]}.model")
        error = self_check.difference(match, FAMILIES[name], getattr(module, match.kind), config)
        wrong += error > self_check.TOLERANCE
        print(f"{label}: relative difference {error:.2g}")
    return int(bool(wrong + nodes_of_a_tiny_wan()))


def nodes_of_a_tiny_wan() -> int:
    """Run the nodes on a tiny Wan of ComfyUI's own classes; returns the number of differences."""
    from comfy import model_patcher, samplers, supported_models

    comfy_nodes: Any = importlib.import_module("nodes")
    from . import nodes

    tiny = _of_the_repository("tiny")
    pipe, small = (
        tiny.wan(),
        {"dim": 24, "num_heads": 2, "ffn_dim": 32, "num_layers": 3, "freq_dim": 64, "text_dim": 32},
    )
    settings = supported_models.WAN21_T2V({**WAN, **small})
    settings.set_inference_dtype(torch.float32, None)
    base = settings.get_model({}, device="cpu")
    generator = torch.Generator().manual_seed(5)
    self_check.fill(base.diffusion_model, generator)
    mapped = MATCHES[0].state(base.diffusion_model.state_dict())
    pipe.transformer.load_state_dict({n: mapped.get(n, v) for n, v in pipe.transformer.state_dict().items()})
    judge = Judge.untrained(pipe, tap=2, seed=3)
    texts = torch.randn(2, 12, tiny.TEXT_WIDTH, generator=generator)
    texts[0, 7:], texts[1, 3:] = 0.0, 0.0
    positive, negative = [[texts[:1], {}]], [[texts[1:], {}]]
    cpu = torch.device("cpu")
    patcher = model_patcher.ModelPatcher(base, load_device=cpu, offload_device=cpu)
    with tempfile.TemporaryDirectory() as temporary:
        judge.save_pretrained(Path(temporary) / "judge")
        loaded = nodes.LoadJudge.execute(str(Path(temporary) / "judge"))[0]
    latents = torch.randn(1, 16, 3, 4, 4, generator=generator)
    found = nodes.ScoreLatent.execute(patcher, loaded, positive, {"samples": latents}, 699.0, 1, 0)[0]
    noise = torch.randn(latents.shape, generator=judging_noise(0))
    embeds = {"prompt_embeds": texts[:1], "negative_prompt_embeds": texts[1:]}
    noisy = 0.301 * base.process_latent_in(latents) + 0.699 * noise
    wanted = judge.score(noisy, None, 699.0, **tiny.CALL_WAN, **embeds)[0]
    error = float((torch.tensor(list(found["candidates"][0]["scores"].values())) - wanted).abs().max())
    print(f"a judge's scores in ComfyUI and in diffusers: largest difference {error:.2g}")
    empty, exact, several = {"samples": torch.zeros(1, 16, 3, 4, 4)}, 0, samplers.KSampler.SAMPLERS
    for sampler in several:
        for look in ("now", "ahead", "ahead-conditional"):
            call = (
                patcher,
                loaded,
                positive,
                negative,
                empty,
                11,
                4,
                8,
                3.0,
                sampler,
                "simple",
                1.0,
                "3:2,5:1",
                look,
                "",
            )
            latent, scores, _ = nodes.EarlyBestOfN.execute(*call).args
            alone = (patcher, scores["seed"], 8, 3.0, sampler, "simple", positive, negative, empty)
            plain: Tensor = comfy_nodes.common_ksampler(*alone)[0]["samples"]
            same = torch.equal(latent["samples"], plain)
            exact += same
            if not same:
                print(
                    f"{sampler}, look {look}: differs from KSampler by {float((latent['samples'] - plain).abs().max())}"
                )
    print(f"winners equal to KSampler's latent bit for bit: {exact} of {3 * len(several)}")
    return int(error > 1e-5) + 3 * len(several) - exact


def _of_the_repository(name: str) -> Any:
    """A module of the repository's tests; ComfyUI has tests of its own under that name."""
    spec = importlib.util.spec_from_file_location(f"prism_tests_{name}", Path(__file__).parents[2] / f"tests/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main("".join(sys.argv[1:2])))
