"""Whole configurations of a judge's training, as Python functions that return them.

Copy one, change what you need, and train:

    from recipes import wan21_1_3b

    recipe = wan21_1_3b.paper()
    pipe = WanPipeline.from_pretrained(recipe.backbone, torch_dtype=torch.bfloat16).to("cuda")
    prism.train("candidates", recipe.judge(pipe), recipe.train, "runs/wan")

A file of such functions, with `from prism.training import Recipe, TrainConfig`, is what `prism train --recipe` takes.
"""

from __future__ import annotations

from prism.training import Recipe as Recipe
