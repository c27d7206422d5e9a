"""The ledger counts what the denoiser really evaluates, and the closed forms say the same."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from tests import tiny
from tests.machinery import seeded
from tests.sampling.conftest import Setting

import prism
from prism.backbone import Backbone
from prism.backbone.encodings import encoded_once
from prism.sampling import expected_rows
from prism.sampling.ledger import Ledger, Meter
from prism.sampling.plan import cut_rows, resolve

N, STEPS, BLOCKS = 5, 6, 3


class BlockCounter:
    """Rows times blocks that really ran, by plain hooks on the blocks."""

    def __init__(self, pipe: Any):
        blocks = pipe.transformer.blocks if hasattr(pipe.transformer, "blocks") else pipe.transformer.transformer_blocks
        self.rows, self.blocks = 0, blocks

    def __enter__(self) -> BlockCounter:
        self.handles = [block.register_forward_hook(self.count) for block in self.blocks]
        return self

    def count(self, _module: Any, _args: Any, output: Any) -> None:
        self.rows += len(output[0] if isinstance(output, tuple) else output)

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("tap", [1, 2, 3])
@pytest.mark.parametrize("schedule", [((1, 1),), ((4, 1),), ((2, 4), (3, 3), (6, 1))])
def test_counted_rows_are_those_that_ran(setting: Setting, schedule: Any, tap: int) -> None:
    judge, call = setting.judge(tap), {**setting.call, "output_type": "latent"}
    for batch_size in (2, 5):
        with BlockCounter(setting.pipe) as counter:
            result = prism.best_of_n(
                setting.pipe, judge, tiny.PROMPT, n=N, schedule=schedule, batch_size=batch_size, **call
            )
        assert result.ledger.denoiser_rows == counter.rows / BLOCKS
        cfg = judge.backbone.family.cfg
        expected = expected_rows("early", N, STEPS, cfg, True, tap / BLOCKS, resolve(schedule, N, STEPS))
        assert result.ledger.denoiser_rows == pytest.approx(expected)
        alive = [N, *(keep for _, keep in schedule)]
        assert result.ledger.head_calls == sum(alive[: len(schedule)])


@pytest.mark.parametrize("strategy", ["none", "random", "full", "draft"])
def test_other_strategies(setting: Setting, strategy: str) -> None:
    judge, call = setting.judge(2), {**setting.call, "output_type": "latent"}
    extra = {"draft_steps": 2} if strategy == "draft" else {}
    with BlockCounter(setting.pipe) as counter:
        ledger = prism.best_of_n(setting.pipe, judge, tiny.PROMPT, n=N, strategy=strategy, **extra, **call).ledger
    expected = expected_rows(strategy, N, STEPS, judge.backbone.family.cfg, True, 2 / 3, draft_steps=2)
    assert ledger.denoiser_rows == counter.rows / BLOCKS
    assert ledger.denoiser_rows == pytest.approx(expected)
    assert ledger.head_calls == {"full": 2 * N, "draft": 2 * N}.get(strategy, 0)


def test_closed_forms_by_hand() -> None:
    """The issue's typical run: 8 candidates, 25 steps, cut to one at step 5, tap after 4 of 6 blocks."""
    for cfg in ("two_calls", "one_batch"):
        # 4 full steps of 8 with guidance, a probe of 8 rows for 4 of 6 blocks, the winner's steps 5 to 25
        rows = expected_rows("early", 8, 25, cfg, True, 4 / 6, ((5, 1),))  # type: ignore[arg-type]
        assert rows == pytest.approx(4 * 16 + 8 * 4 / 6 + 21 * 2)
    assert expected_rows("full", 8, 25, "two_calls", True, 4 / 6, num_draws=2) == pytest.approx(400 + 16 * 4 / 6)
    assert expected_rows("draft", 8, 25, "two_calls", True, 0.5, draft_steps=4) == 64 + 8 + 50
    assert expected_rows("none", 8, 25, "one_batch", False, 0.5) == 25


def test_the_cheaper_way_to_read_is_taken() -> None:
    assert cut_rows(8, 1, "two_calls", True, 0.5) == (8 * 0.5 + 2, True)
    assert cut_rows(8, 1, "two_calls", True, 1.0) == (9.0, False)
    assert cut_rows(2, 1, "two_calls", True, 0.5) == (3.0, False)  # a tie: no extra pass
    assert cut_rows(8, 6, "two_calls", True, 0.5) == (14.0, False)
    assert cut_rows(8, 6, "one_batch", True, 0.5) == (16.0, False)
    assert cut_rows(8, 1, "one_batch", True, 1.0) == (10.0, True)
    assert cut_rows(8, 1, "two_calls", False, 0.5) == (5.0, True)
    for alive, share, cfg, guided in product((2, 5, 8), (0.1, 0.4, 1.0), ("two_calls", "one_batch"), (True, False)):
        for keep in range(1, alive + 1):
            rows, _ = cut_rows(alive, keep, cfg, guided, share)  # type: ignore[arg-type]
            assert rows <= alive * (2 if guided else 1)


def test_ledger_parts(wan: Setting) -> None:
    ledger = prism.best_of_n(wan.pipe, wan.judge(2), tiny.PROMPT, n=3, schedule=[(3, 1)], **wan.call).ledger
    assert set(ledger.parts) == {"denoiser", "head", "vae", "text", "scheduler"}
    assert all(seconds > 0 for seconds in ledger.parts.values())
    assert 0 < ledger.overhead_seconds < ledger.seconds
    assert sum(ledger.parts.values()) < ledger.seconds
    assert ledger.peak_memory_bytes > 2**20
    assert (ledger.vae_encodes, ledger.vae_decodes, ledger.text_encodings) == (0, 1, 2)
    assert Ledger(**ledger.to_dict()) == ledger


def test_candidates_share_one_text_encode(setting: Setting) -> None:
    """The text encoder really runs on one row of each text, whatever the batches, drafts and captures."""
    rows: list[torch.Size] = []
    handle = setting.pipe.text_encoder.register_forward_pre_hook(lambda _m, args: rows.append(args[0].shape))
    call = {**setting.call, "output_type": "latent"}
    try:
        prism.best_of_n(setting.pipe, setting.judge(2), tiny.PROMPT, n=5, strategy="draft", batch_size=2, **call)
    finally:
        handle.remove()
    assert rows == [(1, 12), (1, 12)]  # the prompt and the empty one


def test_the_meter_counts_and_the_encodings_spare(setting: Setting) -> None:
    """Counting changes no call; inside `encoded_once` each text is encoded once, and what ran is what is counted."""
    call = {**setting.call, "output_type": "latent", "num_inference_steps": 2}
    counted, outputs = [], []
    for spare in (nullcontext, encoded_once):
        backbone = Backbone(setting.pipe)
        with Meter(backbone).open() as ledger, spare(backbone):
            outputs += [setting.pipe([tiny.PROMPT] * 2, generator=seeded(0), **call)[0] for _ in range(2)]
        counted.append(ledger.text_encodings)
    assert counted == [8, 2]  # two prompts and two empty ones a call, or one of each in all
    assert all(torch.allclose(output, outputs[0], atol=1e-5) for output in outputs)
    assert "encode_prompt" not in vars(setting.pipe)
