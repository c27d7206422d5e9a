"""Candidates of one prompt, or prompts, shared out among the processes of a torch.distributed group."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from prism.errors import PrismError
from prism.memory import ran_out
from prism.sampling.alive import meet, together

T = TypeVar("T")


class Team:
    """This process and those it shares work with; alone unless `together`.

    A group that does not exist yet is made from what `torchrun` or `accelerate launch` set, by accelerate's
    PartialState. What processes tell each other is theirs alone: it comes from no file and no other machine's user.
    """

    def __init__(self, together: bool = False) -> None:
        self.rank, self.size = 0, 1
        if together:
            if not distributed.is_initialized():
                from accelerate import PartialState

                PartialState(cpu=not torch.cuda.is_available())
            if distributed.is_initialized():
                self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    @property
    def alone(self) -> bool:
        return self.size == 1

    def agree(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives on each process, by rank. Where it fails on one, it fails on all: nobody waits for ever."""
        if self.alone:
            return [work()]
        value, error = None, None
        try:
            value = portable(work())
        except Exception as found:
            error = found
        meet()
        told: list[Any] = [None] * self.size
        memory = error is not None and ran_out(error)
        with together():
            distributed.all_gather_object(told, (value, error is not None, memory, str(error)))
        failed = [(memory, rank, text) for rank, (_, fails, memory, text) in enumerate(told) if fails]
        if failed:
            memory, rank, text = min(failed)  # want of memory comes last: all go on with smaller batches after it
            if error is not None and rank == self.rank:
                raise error
            raise torch.cuda.OutOfMemoryError(text) if memory else PrismError(f"Process {rank} failed: {text}")
        return [value for value, *_ in told]

    def same(self, call: Mapping[str, Any]) -> None:
        """Raise PrismError naming the first argument of a call that is not the same on all processes."""
        texts = self.agree(lambda: {name: _text(value) for name, value in call.items()})
        for rank, text in enumerate(texts):
            for name in (*texts[0], *text):
                first, other = (found.get(name, "not given") for found in (texts[0], text))
                if first != other:
                    raise PrismError(
                        f"Processes that share candidates must be given one call; process 0 has {name} = {first[:100]} "
                        f"and process {rank} {other[:100]}."
                    )

    def owners(self, candidates: Sequence[int], before: Mapping[int, int]) -> dict[int, int]:
        """The process of each candidate: its own one as far as that leaves all with about as many."""
        most, found, spare = -(-len(candidates) // self.size), {}, []
        load: Counter[int] = Counter()
        for candidate in candidates:
            rank = before.get(candidate)
            if rank is None or load[rank] >= most:
                spare.append(candidate)
                continue
            found[candidate] = rank
            load[rank] += 1
        for candidate in spare:
            found[candidate] = min(range(self.size), key=lambda rank: (load[rank], rank))
            load[found[candidate]] += 1
        return found

    def move(self, belongings: dict[int, Any], before: Mapping[int, int], after: Mapping[int, int]) -> None:
        """Hand over what belongs to candidates whose process changed."""
        for candidate, rank in sorted(after.items()):
            giver = before.get(candidate, rank)
            if giver == rank:
                continue
            if self.rank == giver:
                with together():
                    distributed.send_object_list([belongings.pop(candidate)], rank)
            elif self.rank == rank:
                box: list[Any] = [None]
                with together():
                    distributed.recv_object_list(box, giver)
                belongings[candidate] = box[0]


def merged(parts: Iterable[Mapping[int, T]]) -> dict[int, T]:
    """The parts of several processes as one mapping, by candidate."""
    return dict(sorted(entry for part in parts for entry in part.items()))


def portable(value: Any) -> Any:
    """The same with its tensors in host memory: another process has other devices."""
    if isinstance(value, Tensor):
        return value.cpu()
    if is_dataclass(value) and not isinstance(value, type):  # also the outputs of diffusers, which are dictionaries too
        return replace(value, **{each.name: portable(getattr(value, each.name)) for each in fields(value)})
    if hasattr(value, "_fields"):
        return type(value)(*(portable(inner) for inner in value))
    if isinstance(value, dict):
        return {name: portable(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(portable(inner) for inner in value)
    return value


def _text(value: Any) -> str:
    """A text that is the same on all processes for equal arguments; of objects it tells their class alone."""
    if isinstance(value, str | int | float | bool | type(None)):
        return repr(value)
    if isinstance(value, Mapping):
        return str({str(name): _text(inner) for name, inner in value.items()})
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    content = hashlib.sha256(value.tobytes()).hexdigest()[:12] if hasattr(value, "tobytes") else ""
    return f"{type(value).__name__} {content}".strip()
