"""Every variant of every family as a tiny real pipeline: name -> a function that builds it, and its call arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests import tiny
from tests.zoo import (
    conditioned,
    controlled,
    cosmos_and_more,
    editing,
    images,
    kandinsky6,
    latte_to_qwen,
    ltx2,
    more_images,
    sana_wm,
    sounds,
    unets,
    wan_to_kandinsky,
)
from tests.zoo.bare import bare
from tests.zoo.opensora import opensora

MEASURED: dict[str, dict[str, Any]] = {}  # by variant, what the matrix found
Builder = Callable[[], tuple[Any, dict[str, Any]]]

VARIANTS: dict[str, Builder] = {
    "wan21_t2v_euler": lambda: (tiny.wan("euler"), {**tiny.CALL_WAN, "width": 48}),
    "wan21_t2v_unipc": lambda: (tiny.wan("unipc"), {**tiny.CALL_WAN, "width": 48}),
    "cogvideox_ddim": lambda: (tiny.cogvideox("ddim"), {**tiny.CALL_COGVIDEOX, "width": 48}),
    "cogvideox_dpm": lambda: (tiny.cogvideox("dpm"), {**tiny.CALL_COGVIDEOX, "width": 48}),
}
VARIANTS |= (
    wan_to_kandinsky.BUILDERS
    | latte_to_qwen.BUILDERS
    | cosmos_and_more.BUILDERS
    | conditioned.BUILDERS
    | editing.BUILDERS
    | sana_wm.BUILDERS
    | unets.BUILDERS
    | images.BUILDERS
    | more_images.BUILDERS
    | controlled.BUILDERS
    | sounds.BUILDERS
    | ltx2.BUILDERS
    | kandinsky6.BUILDERS
    | {"opensora": opensora, "bare_module": bare}
)
