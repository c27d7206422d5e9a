"""The model card of a saved head: what it is, what it goes onto, what it was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import diffusers

TEMPLATE = """---
library_name: prism
license: apache-2.0
tags:
- prism
- diffusers
- reward-model
- video-generation
---

# PRISM head for {denoiser}

A preference head that scores the *noisy* latents of a frozen video diffusion model from its own hidden states after
block {taps}, one score per dimension: {dimensions}. Higher is better; only differences within a prompt mean something.
It holds no part of the backbone ({pipeline}: {denoiser}, {vae}), and is refused by others.

```python
import prism
{made}  # the backbone it was trained on
judge = prism.Judge.from_pretrained("path/or/id of this head", pipe)
result = prism.best_of_n(pipe, judge, "a prompt", n=8, schedule=[(5, 1)])
```

| | |
|---|---|
{heads}
| ties | Bradley-Terry with ties, eta = {eta:g} |

## Trained on

```json
{trained_on}
```

Method: "Through the PRISM: Preference Representation in Intermediate States of Video Diffusion Models",
arXiv 2606.20310.
"""
HEAD = (
    "| head | after block {tap}, tokens of width {width}: {aggregation}, {num_queries} query, {num_heads} heads, "
    "width {dim}, {mlp_layers}-layer MLP |"
)


def model_card(config: Mapping[str, Any]) -> str:
    """README.md of a head from its config.json."""
    # The prompts' hashes are for the leak check, not for reading.
    trained_on = {name: value for name, value in config["trained_on"].items() if name != "prompt_keys"}
    backbone = config["backbone"]
    pipeline = str(backbone.get("pipeline"))
    of_diffusers = f"from diffusers import {pipeline}\n\npipe = {pipeline}.from_pretrained(...)"
    members = config.get("members", [config])
    return TEMPLATE.format(
        taps=" and ".join(str(tap) for tap in sorted({member["tap"] for member in members})),
        heads="\n".join(HEAD.format(**member) for member in members),
        eta=config["eta"],
        dimensions=", ".join(config["dimensions"]),
        denoiser=backbone.get("denoiser"),
        pipeline=pipeline,
        made=of_diffusers if hasattr(diffusers, pipeline) else f"\npipe = {pipeline}(...)",
        vae=backbone.get("vae"),
        trained_on=json.dumps(trained_on, indent=2, ensure_ascii=False),
    )
