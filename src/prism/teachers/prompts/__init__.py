"""Questions of teachers, verbatim as their authors published them, one file each: the models were trained on them.

videoreward.txt     KwaiVGI/VideoAlign at 219ab9d, prompt_template.py, "detailed_special" (MIT)
hpsv3.txt           MizzenAI/HPSv3, package hpsv3 1.0.0, data_collator_qwen.py, INSTRUCTION and its special token (MIT)
unifiedreward.txt   CodeGoat24/UnifiedReward at ff6f520, qwen_point_score_video_generation.py (MIT)
unifiedreward2.txt  the same, UnifiedReward-2.0-inference/point_score_APS_video_generation.py (MIT)
videoscore.txt      TIGER-AI-Lab/VideoScore at 8e44973, examples/run_videoscore.py (MIT)
videoscore2.txt     TIGER-AI-Lab/VideoScore2 at e6abe26, vs2_inference.py (model: Apache 2.0)
"""

from __future__ import annotations

from importlib import resources

BLANK = "{text_prompt}"


def filled(name: str, prompt: str) -> str:
    """A question with a prompt in its blank."""
    before, blank, after = text(name).partition(BLANK)
    return before + (prompt if blank else "") + after


def text(name: str) -> str:
    """A question with its blank, {text_prompt}."""
    return resources.files(__name__).joinpath(f"{name}.txt").read_bytes().decode("utf-8")
