"""Pipelines outside the matrix: near copies of its lines, and images whose rows say nothing that its lines do not.

Their winner is the stock call's to the bit; a row of its own is checked as `prism doctor --family` does.
"""

from __future__ import annotations

import pytest
from tests import tiny
from tests.zoo import further_images, kandinsky2, last_images, near_copies

from prism.backbone import Backbone
from prism.commands import checks
from prism.commands.subject import Subject

# diffusers' own, of what Kandinsky's combined pipelines hand to their decoder.
pytestmark = pytest.mark.filterwarnings("ignore:.*callback_steps.*:FutureWarning")


def _subject(built: tuple[object, dict[str, object]], texts: tuple[str, str] | None = None) -> Subject:
    pipe, call = built
    return Subject(Backbone(pipe), {**call, "num_inference_steps": 4}, texts or (tiny.PROMPT, tiny.OTHER_PROMPT))


@pytest.mark.parametrize("name", near_copies.BUILDERS)
def test_the_winner_of_a_near_copy_is_the_stock_calls(name: str) -> None:
    # A tiny MoVQ's norms magnify rounding where a masked picture is constant, for some prompts beyond the tolerance.
    texts = (tiny.OTHER_PROMPT, tiny.PROMPT) if name == "kandinsky22_inpaint_combined" else None
    subject = _subject(near_copies.BUILDERS[name](), texts)
    checks.conditional_rows(subject)
    checks.winner(subject)


@pytest.mark.parametrize("name", [*further_images.BUILDERS, *last_images.BUILDERS, *kandinsky2.ROWS])
def test_the_row_of_a_further_image_pipeline_holds(name: str) -> None:
    build = (further_images.BUILDERS | last_images.BUILDERS | kandinsky2.BUILDERS)[name]
    subject = _subject(build(), last_images.TEXTS.get(name))
    assert [line for line in checks.run_all(subject) if not line[1]] == []
