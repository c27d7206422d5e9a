"""A candidate's denoiser outputs, each kept with what it was computed for and given again for nothing else."""

from __future__ import annotations

import hashlib
import marshal
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prism.backbone.denoiser_call import DenoiserCall, flattened
from prism.backbone.fingerprint import weights_bits
from prism.backbone.patches import giving, values_of

CHUNKS = 64  # parts of an argument whose mean and root mean square are compared where its bits may differ by rounding
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PLAIN = (bool, int, float, str, type(None))
_HOLDERS = (list, tuple, dict)
_MODULES_OWN = frozenset(vars(nn.Module())) | {"_compiled_call_impl", "forward"}


@dataclass(frozen=True)
class Inputs:
    """Digest of what one candidate's rows of a denoiser call are computed from.

    moment: a hash of the timestep alone, by which a recording sees at once that it holds nothing. exact: SHA-256 of all
    but the values of floating-point rows: the denoiser and what is switched on it, the arguments that all rows share,
    names, shapes, dtypes, timesteps, integers. bits: a hash of each floating-point argument, to the bit. sums: means
    and root mean squares of its parts, (arguments, 2, CHUNKS). tolerance: what rounding may change of them,
    (arguments,). alone: computed in a call of this candidate only.
    """

    moment: int
    exact: bytes
    bits: tuple[int, ...]
    sums: Tensor
    tolerance: Tensor
    alone: bool

    def same(self, other: Inputs) -> bool:
        """True where the outputs may stand for each other: equal to the bit where both were computed alone, and to
        rounding where a batch was involved, whose size changes the last bits of what processors compute."""
        if self.exact != other.exact:
            return False
        if self.bits == other.bits:
            return True
        if self.alone and other.alone:
            return False
        return bool(((self.sums - other.sums).abs() <= self.tolerance[:, None, None]).all())


class Recording:
    """A candidate's denoiser outputs, each (groups, ...): 2 groups for CFG in one batch."""

    def __init__(self) -> None:
        self._outputs: dict[bytes, list[tuple[Inputs, Tensor]]] = {}
        self.moments: set[int] = set()

    def __len__(self) -> int:
        return sum(map(len, self._outputs.values()))

    def copy(self) -> Recording:
        """The same outputs; what either records from here on is its own."""
        new = Recording()
        new._outputs, new.moments = {key: list(pairs) for key, pairs in self._outputs.items()}, set(self.moments)
        return new

    def find(self, inputs: Inputs) -> Tensor | None:
        """The output that was recorded for these inputs, or None."""
        for kept, output in self._outputs.get(inputs.exact, ()):
            if kept.same(inputs):
                return output
        return None

    def keep(self, inputs: Inputs, output: Tensor) -> None:
        """Record an output in host memory, in the place of one for the same inputs."""
        self.moments.add(inputs.moment)
        others = [pair for pair in self._outputs.get(inputs.exact, ()) if not pair[0].same(inputs)]
        self._outputs[inputs.exact] = [*others, (inputs, output.to("cpu", copy=True))]


def moments_of(call: DenoiserCall, candidates: int) -> list[int]:
    """A hash of each candidate's timestep in a denoiser call."""
    timestep = call.arguments.get(call.family.timestep_argument)
    if not isinstance(timestep, Tensor):
        return [0] * candidates
    if timestep.ndim == 0 or len(timestep) % candidates:
        return _bits(timestep.flatten()[None]).tolist() * candidates
    each = max(1, len(timestep) // call.batch)
    return _bits(_by_candidate(timestep, candidates, each)).tolist()


def inputs_of(denoiser: nn.Module, place: int, call: DenoiserCall, candidates: int, altered: str = "") -> list[Inputs]:
    """Digests of what each candidate's rows are computed from in a denoiser call; `place` says which denoiser it is,
    and `altered` is the `state_of` the denoisers where a callback changed it."""
    family, batch = call.family, call.batch
    shared = hashlib.sha256(f"{place} {switched(denoiser)}{altered}".encode())
    own = [hashlib.sha256() for _ in range(candidates)]
    bits: list[list[int]] = []
    sums: list[Tensor] = []
    tolerances: list[Tensor] = []
    for name, value in sorted(flattened(call.arguments).items()):
        if isinstance(value, Tensor) and name in family.batched_arguments and value.ndim and len(value) == 1:
            value = value.expand(batch, *value.shape[1:])  # one row for all, which the denoiser broadcasts
        if not call.has_rows(name, value):
            shared.update(f"{name} {_text(value)}".encode())
        elif isinstance(value, Tensor):
            shape = (batch // candidates, *value.unflatten(0, (batch, -1)).shape[1:])
            shared.update(f"{name} {value.dtype} {shape}".encode())
            rows = _by_candidate(value, candidates, len(value) // batch)
            hashes = _bits(rows).tolist()
            if value.is_floating_point() and name != family.timestep_argument:  # a scheduler's table has no rounding
                bits.append(hashes)
                parts, tolerance = _sums(rows)
                sums.append(parts)
                tolerances.append(tolerance)
            else:
                for candidate, found in enumerate(hashes):
                    own[candidate].update(f"{name} {found}".encode())
        else:
            for candidate in range(candidates):
                own[candidate].update(f"{name} {[_text(each) for each in value[candidate::candidates]]}".encode())
    common, moments = shared.digest(), moments_of(call, candidates)
    parts = torch.stack(sums, 1).cpu()  # the latents at least
    tolerance = torch.stack(tolerances, 1).cpu()
    return [
        Inputs(
            moments[c],
            common + own[c].digest(),
            tuple(each[c] for each in bits),
            parts[c],
            tolerance[c],
            candidates == 1,
        )
        for c in range(candidates)
    ]


def switched(denoiser: nn.Module) -> str:
    """Digest of what is switched on a denoiser: each module's plain values (an adapter's scale, whether it is active or
    merged), what computes its attention, and the hooks on it (layers that a guidance skips)."""
    found: list[Any] = []
    for module in denoiser.modules():
        own = vars(module)
        found += [value for name, value in own.items() if type(value) in _PLAIN and name not in _MODULES_OWN]
        found += [value for name, value in own.items() if type(value) in _HOLDERS and _is_plain(value)]
        registry, forward, processor = own.get("_diffusers_hook"), own.get("forward"), own.get("processor")
        hooks = () if registry is None else registry.hooks  # the registry itself comes with the first call
        if hooks or forward is not None or own["_forward_hooks"] or own["_forward_pre_hooks"]:
            found += [len(own["_forward_hooks"]), len(own["_forward_pre_hooks"]), *hooks]
            found.append(getattr(forward, "__qualname__", ""))
        if processor is not None:
            found += [type(processor).__qualname__, *(v for v in vars_of(processor).values() if _is_plain(v))]
    return hashlib.sha256(marshal.dumps(found, 2)).hexdigest()  # version 2: no references, which differ by chance


def state_of(denoisers: Sequence[nn.Module]) -> str:
    """Digest of what a callback may change where no call shows it: weights, tensors on modules and on what computes
    their attention, and what hooks and replaced code hold. Costs some ms, and is asked for beside a callback alone."""
    digest = hashlib.sha256()
    for denoiser in denoisers:
        digest.update(weights_bits(denoiser).encode())
        for module in denoiser.modules():
            own = vars(module)
            digest.update(_held({name: v for name, v in own.items() if isinstance(v, Tensor)}).encode())
            digest.update(_held([own["_buffers"], own.get("forward"), own.get("processor")]).encode())
            hooks = (*own["_forward_pre_hooks"].values(), *own["_forward_hooks"].values())
            digest.update(_held(list(map(giving, hooks))).encode())
    return digest.hexdigest()


def _held(value: Any, depth: int = 5) -> str:
    """A text that is equal for equal values, of what functions and objects hold, in containers too."""
    if isinstance(value, Tensor):
        return type(value).__name__ if value.is_meta or value.is_quantized else _text(value)
    if type(value) in _PLAIN:
        return repr(value)
    if depth == 0 or isinstance(value, nn.Module | type | types.ModuleType):
        return type(value).__qualname__
    if isinstance(value, Mapping):
        return repr([(str(name), _held(each, depth - 1)) for name, each in list(value.items())])
    if isinstance(value, list | tuple):
        return repr([_held(each, depth - 1) for each in value])
    if isinstance(value, types.FunctionType):
        return value.__qualname__ + _held(values_of(value), depth - 1)
    if isinstance(value, types.MethodType):
        return _held([value.__func__, value.__self__], depth)
    return type(value).__qualname__ + _held({**vars_of(value)}, depth - 1)


def vars_of(value: Any) -> Mapping[str, Any]:
    return getattr(value, "__dict__", {})


def _is_plain(value: Any) -> bool:
    kind = type(value)
    if kind in _PLAIN:
        return True
    if kind in (list, tuple):
        return all(type(each) in _PLAIN for each in value)
    return kind is dict and all(type(each) in _PLAIN for pair in value.items() for each in pair)


def _text(value: Any) -> str:
    """A text that is equal for equal values; of objects that are neither tensors nor plain, their class."""
    if isinstance(value, Tensor):
        whole = value.detach().flatten()[None]
        return f"{value.dtype} {tuple(value.shape)} {_bits(whole).item()}"
    if isinstance(value, Mapping):
        return repr([(str(name), _text(each)) for name, each in value.items()])
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return repr([_text(each) for each in value])
    return repr(value) if isinstance(value, _PLAIN) else type(value).__qualname__


def _by_candidate(value: Tensor, candidates: int, each: int) -> Tensor:
    """Rows of a batch of groups, `each` per sample, as one row per candidate: (candidates, ...) flat."""
    rows: Tensor = value.unflatten(0, (-1, candidates, each))
    return rows.transpose(0, 1).flatten(1)


def _bits(rows: Tensor) -> Tensor:
    """A hash of each row of (n, length), to the bit, computed where the tensor lies: (n,) int64."""
    rows = rows.detach()
    if rows.is_complex():
        rows = torch.view_as_real(rows).flatten(1)
    rows = (rows.to(torch.uint8) if rows.dtype == torch.bool else rows).contiguous()
    mixed = rows.view(_INTEGERS[rows.element_size()]).to(torch.int64)
    mixed = mixed + torch.arange(mixed.shape[1], device=mixed.device) * 0x2545F4914F6CDD1D
    mixed ^= mixed >> 31
    mixed *= 0x1CE4E5B9BF58476D
    mixed ^= mixed >> 29
    mixed *= 0x133111EB94D049BB
    return (mixed ^ (mixed >> 32)).sum(1)


def _sums(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and root mean square of CHUNKS parts of each row of (n, length), (n, 2, CHUNKS) float32, and what rounding
    may change of them, (n,): far below what a callback or another seed does."""
    eps = torch.finfo(rows.dtype).eps
    values = rows.detach().float()
    values = nn.functional.pad(values, (0, -values.shape[1] % CHUNKS)).unflatten(1, (CHUNKS, -1))
    squares = values.square().mean(2)
    scale = squares.mean(1).sqrt()
    return torch.stack([values.mean(2), squares.sqrt()], 1), scale * (1e-5 + 4 * eps / values.shape[2] ** 0.5)
