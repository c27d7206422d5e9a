"""The processes that train together, as `torchrun` or `accelerate launch` start them; one alone otherwise."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from prism.errors import PrismError
from prism.sampling.alive import meet, together

T = TypeVar("T")


class Processes:
    """This process's `rank` among `size`.

    A group that does not exist yet is made from what the launcher set, by accelerate's PartialState. What processes
    tell each other comes from no file and no other machine's user.
    """

    def __init__(self, cpu: bool) -> None:
        self.rank, self.size, self.device = 0, 1, torch.device("cpu")
        if not distributed.is_available():
            return
        if not distributed.is_initialized():
            from accelerate import PartialState

            # The first process may encode texts or validate while the others wait.
            PartialState(cpu=cpu, timeout=timedelta(hours=24))
        if distributed.is_initialized():
            self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
            if "nccl" in distributed.get_backend() and torch.cuda.is_available():
                self.device = torch.device("cuda", torch.cuda.current_device())

    @classmethod
    def on(cls, device: str | None) -> Processes:
        """The processes that are going to compute on a device of this name; None: on the GPU where there is one."""
        return cls(cpu=device.startswith("cpu") if device else not torch.cuda.is_available())

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def on_first(self, work: Callable[[], T]) -> T:
        """`work()`, done by the first process while the others wait, and told to all. Where it fails, all raise."""
        if self.size == 1:
            return work()
        told: list[Any] = [None, None]
        failure: Exception | None = None
        if self.first:
            try:
                told[0] = work()
            except Exception as error:
                failure, told[1] = error, str(error)
        with self._together():
            distributed.broadcast_object_list(told, 0)
        if failure is not None:
            raise failure
        if told[1] is not None:
            raise PrismError(told[1])
        return told[0]  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Where another process has ended, say so, and do not wait: a GPU's collectives would until their limit."""
        if self.device.type == "cuda":
            meet()
        with together():
            yield

    def total(self, values: Tensor) -> Tensor:
        """The sum of the processes' values."""
        if self.size == 1:
            return values
        whole = values.to(self.device) if self.device.type == "cuda" else values.clone()
        with self._together():
            distributed.all_reduce(whole)
        return whole.to(values.device)

    def add_up(self, values: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype and device by their sums over processes."""
        if self.size == 1:
            return
        whole = self.total(torch.cat([value.flatten() for value in values]))
        for value, total in zip(values, whole.split([value.numel() for value in values])):
            value.copy_(total.view_as(value))

    def share(self, values: Iterable[Tensor]) -> None:
        """Give all processes the first one's values."""
        if self.size == 1:
            return
        with torch.no_grad():
            for value in values:
                whole = value.detach().to(self.device) if self.device.type == "cuda" else value.detach().clone()
                with self._together():
                    distributed.broadcast(whole, 0)
                value.copy_(whole)
