"""The page: tabs over one pipeline and its judge, made of Gradio's blocks and fragments of our own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from prism.errors import PrismError
from prism.serving import annotate_tab, generate_tab, score_tab, web
from prism.serving.annotators import Annotation
from prism.serving.comparisons import Comparisons
from prism.serving.jobs import Jobs
from prism.serving.web import Shelf

TABS = ("generate", "score", "compare", "annotate")
FONT = ["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]


@dataclass
class Desk:
    """What the tabs work with; a part is None where no tab needs it."""

    title: str
    backbone: Any = None
    judge: Any = None
    call: dict[str, Any] = field(default_factory=dict)
    jobs: Jobs | None = None
    examples: Sequence[str] = ()
    comparisons: Comparisons | None = None
    annotation: Annotation | None = None
    shelf: Shelf = field(default_factory=Shelf)
    lock: Any = field(default_factory=threading.RLock)


def blocks(desk: Desk, tabs: Sequence[str] = TABS) -> Any:
    """The page as Gradio's `Blocks`.

    Raises:
        PrismError: where gradio is not installed.
    """
    gradio = imported()
    build: dict[str, Callable[[Any, Desk], None]] = {
        "generate": generate_tab.build,
        "score": score_tab.build,
        "compare": score_tab.build_compare,
        "annotate": annotate_tab.build,
    }
    with gradio.Blocks(title="PRISM", analytics_enabled=False, fill_width=True) as page:
        gradio.HTML(f'<div class="pz-brand"><h1>PRISM</h1><span>{desk.title}</span></div>')
        with gradio.Tabs():
            for name in tabs:
                with gradio.Tab(name.capitalize(), id=name):
                    build[name](gradio, desk)
    return page


def application(desk: Desk, tabs: Sequence[str] = TABS, users: Sequence[tuple[str, str]] = ()) -> Any:
    """The ASGI application of the page, its looks and scripts included."""
    gradio, room = imported(), resources.files("prism.serving")
    script = room.joinpath("page.js").read_text(encoding="utf-8")
    return web.application(
        blocks(desk, tabs),
        desk.shelf,
        users,
        theme=theme(gradio),
        css=room.joinpath("page.css").read_text(encoding="utf-8"),
        head=f'<link rel="icon" href="data:,"><script>{script}</script>',
    )


def imported() -> Any:
    """The gradio package, without its telemetry. Raises PrismError where it is not installed."""
    import os

    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise PrismError(web.MISSING) from error
    return gradio


def theme(gradio: Any) -> Any:
    """The colours of the reports, light and dark, and fonts that the machine has."""
    colours = {
        "body_background_fill": ("#f6f5f1", "#131417"),
        "background_fill_primary": ("#fffefb", "#1b1d21"),
        "background_fill_secondary": ("#f6f5f1", "#131417"),
        "body_text_color": ("#1d1f24", "#ececea"),
        "body_text_color_subdued": ("#6b6f78", "#9a9ea8"),
        "border_color_primary": ("#e4e2da", "#2e3138"),
        "block_background_fill": ("#fffefb", "#1b1d21"),
        "block_border_color": ("#e4e2da", "#2e3138"),
        "block_label_text_color": ("#6b6f78", "#9a9ea8"),
        "block_title_text_color": ("#1d1f24", "#ececea"),
        "input_background_fill": ("#ffffff", "#131417"),
        "input_border_color": ("#e4e2da", "#2e3138"),
        "input_border_color_focus": ("#3f3ec9", "#a3a5ff"),
        "button_primary_background_fill": ("#3f3ec9", "#a3a5ff"),
        "button_primary_background_fill_hover": ("#3332a8", "#b9baff"),
        "button_primary_text_color": ("#ffffff", "#14142b"),
        "button_secondary_background_fill": ("#fffefb", "#1b1d21"),
        "button_secondary_text_color": ("#1d1f24", "#ececea"),
        "color_accent_soft": ("#ecebfb", "#26274a"),
        "slider_color": ("#3f3ec9", "#a3a5ff"),
        "link_text_color": ("#3f3ec9", "#a3a5ff"),
    }
    both = {name: light for name, (light, _) in colours.items()}
    both |= {f"{name}_dark": dark for name, (_, dark) in colours.items()}
    base = gradio.themes.Base(primary_hue="indigo", neutral_hue="stone", radius_size="lg", font=FONT, font_mono=MONO)
    return base.set(
        **both, block_border_width="1px", input_border_width="1px", block_shadow="none", input_shadow="none"
    )
