"""The conditionings of a store's prompts: all of them at hand where they fit into memory, else as batches need them."""

from __future__ import annotations

from collections.abc import Sequence

from prism.backbone import Backbone, Conditioning, Ragged
from prism.backbone.kept import ConditioningCache, Stowed
from prism.evaluation.evaluator import check_call
from prism.memory import in_batches, ran_out
from prism.preference import LatentStore

HELD_BYTES = 4 * 2**30
"""Host memory for the conditionings of all prompts: 1,000 prompts of Wan."""
CHUNK = 16  # prompts that are encoded together


class Conditionings:
    """What the denoiser is told of each of a store's prompts.

    Where all fit into `HELD_BYTES` they are captured once, before the first step. Where not, each prompt is encoded by
    itself when a batch needs it, and those used last are kept. Which of the two it is follows from the prompts alone,
    so that a resumed run reads the same bits.
    """

    def __init__(self, backbone: Backbone, store: LatentStore, prompts: Sequence[str]) -> None:
        self.backbone, self.store, self.prompts = backbone, store, list(prompts)
        self._kept: ConditioningCache[int, Stowed] = ConditioningCache()
        in_batches(range(len(self.prompts)), CHUNK, self._capture, "encoding prompts")
        if not self._all_fit:
            self._kept.clear()
            backbone.forget()

    def _capture(self, places: Sequence[int]) -> None:
        if self._all_fit:
            chunk = conditioned(self.backbone, self.store, [self.prompts[place] for place in places])
            for row, place in enumerate(places):
                self._kept[place] = Stowed.of(chunk[row])

    @property
    def _all_fit(self) -> bool:
        """Whether all prompts are going to fit, to judge by those captured so far."""
        return self._kept.nbytes * len(self.prompts) <= HELD_BYTES * len(self._kept)

    def of(self, places: Sequence[int]) -> Conditioning | Ragged:
        """A row for each of some places in the list of prompts."""
        rows = {}
        for place in dict.fromkeys(places):
            if place not in self._kept:
                row = conditioned(self.backbone, self.store, [self.prompts[place]])[0]
                self._kept[place] = Stowed.of(row)
                self._kept.trim(HELD_BYTES)
                self.backbone.forget()
            rows[place] = self._kept[place].back()
        return Conditioning.cat([rows[place] for place in places])


def conditioned(backbone: Backbone, store: LatentStore, prompts: Sequence[str]) -> Conditioning | Ragged:
    """The conditionings of prompts under a store's call. Raises PrismError for a call that the pipeline rejects."""
    try:
        return backbone.condition(prompts, **store.call)
    except Exception as error:
        if not ran_out(error):
            check_call(backbone, store, prompts[0])
        raise
