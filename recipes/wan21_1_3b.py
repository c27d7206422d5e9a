"""Wan2.1-1.3B as the paper trains it (section 3 and its ablations)."""

from __future__ import annotations

from prism.training import Recipe, TrainConfig


def paper() -> Recipe:
    """One head after block 12 of 30.

    The paper's: N_b = 12, N_q = 1, D = 1536, a 5-layer MLP, AdamW at 1e-4, eta = 5, t ~ U(0, T). It does not say how
    many steps, how large a batch, how many attention heads, nor how its videos were sampled: these are ours.
    """
    train = TrainConfig(
        learning_rate=1e-4,
        eta=5.0,
        t_low=0.0,
        t_high=1000.0,
        steps=5000,
        prompts_per_step=8,
        max_rows=8,  # a video is 32,760 tokens
    )
    return Recipe(
        backbone="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        call={"height": 480, "width": 832, "num_frames": 81, "num_inference_steps": 50, "guidance_scale": 5.0},
        taps=(12,),
        dim=1536,
        head={"num_queries": 1, "mlp_layers": 5},
        train=train,
    )
