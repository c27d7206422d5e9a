"""Recordings of a candidate's denoiser outputs, each used again only for the inputs that it was computed from."""

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
from prism.backbone.patches import modules_of, unless_it_looks, values_of
from prism.backbone.pipeline import cache_hooks, hooks_of

CHUNKS = 64  # parts of an argument whose mean and root mean square are compared where its bits may differ by rounding
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PLAIN = (bool, int, float, str, type(None))
_CONTAINERS = (list, tuple, dict)
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module())) | {"_compiled_call_impl", "_cache_config", "forward"}


@dataclass(frozen=True)
class Inputs:
    """Digest of the inputs from which one candidate's rows of a denoiser call are computed.

    moment: hash of the timestep alone; a recording without this moment need not be searched.
    exact: SHA-256 of all but the values of floating-point rows: the denoiser and its switches (see `switched`), the
        arguments that all rows share, names, shapes, dtypes, timesteps, integers.
    bits: a hash of each floating-point argument, to the bit.
    sums: (arguments, 2, CHUNKS) means and root mean squares of parts of each floating-point argument.
    tolerance: (arguments,) the largest change of `sums` by rounding.
    single: True if the call was of this candidate only.
    """

    moment: int
    exact: bytes
    bits: tuple[int, ...]
    sums: Tensor
    tolerance: Tensor
    single: bool

    def same(self, other: Inputs) -> bool:
        """True if the output for one may be used for the other.

        Inputs of two single calls must be equal to the bit. Where a batch was involved, they must be equal to rounding:
        the batch size changes the last bits of what processors compute.
        """
        if self.exact != other.exact:
            return False
        if self.bits == other.bits:
            return True
        if self.single and other.single:
            return False
        return bool(((self.sums - other.sums).abs() <= self.tolerance[:, None, None]).all())


class Recording:
    """The denoiser outputs of one candidate, each (groups, ...): 2 groups for CFG in one batch, else 1."""

    def __init__(self) -> None:
        self._outputs: dict[bytes, list[tuple[Inputs, Tensor]]] = {}
        self.moments: set[int] = set()
        self._pushes: dict[int, tuple[int, Tensor]] = {}  # by step: a hash of the latents, and the judge's push

    def __len__(self) -> int:
        return sum(map(len, self._outputs.values()))

    def copy(self) -> Recording:
        """A recording of the same outputs; later outputs go into one of the two only."""
        new = Recording()
        new._outputs, new.moments = {key: list(pairs) for key, pairs in self._outputs.items()}, set(self.moments)
        new._pushes = dict(self._pushes)
        return new

    def find(self, inputs: Inputs) -> Tensor | None:
        """The output that was recorded for these inputs, or None."""
        for recorded, output in self._outputs.get(inputs.exact, ()):
            if recorded.same(inputs):
                return output
        return None

    def keep(self, inputs: Inputs, output: Tensor) -> None:
        """Record an output, in host memory; it replaces one for the same inputs."""
        self.moments.add(inputs.moment)
        others = [pair for pair in self._outputs.get(inputs.exact, ()) if not pair[0].same(inputs)]
        self._outputs[inputs.exact] = [*others, (inputs, output.to("cpu", copy=True))]

    def push(self, step: int, latents: Tensor) -> Tensor | None:
        """The push (...) by a judge's guidance that was recorded for these latents (...) after a step, or None."""
        bits, push = self._pushes.get(step, (None, None))
        return push if push is not None and bits == _bits(latents.flatten()[None]).item() else None

    def keep_push(self, step: int, latents: Tensor, push: Tensor) -> None:
        """Record a push after a step, in host memory."""
        self._pushes[step] = int(_bits(latents.flatten()[None]).item()), push.to("cpu", copy=True)


def moments_of(call: DenoiserCall, candidates: int) -> list[int]:
    """A hash of each candidate's timestep in a denoiser call."""
    timestep = call.arguments.get(call.family.timestep_argument)
    if not isinstance(timestep, Tensor):
        return [0] * candidates
    if timestep.ndim == 0 or len(timestep) % candidates:
        return _bits(timestep.flatten()[None]).tolist() * candidates
    each = max(1, len(timestep) // call.batch)
    return _bits(_by_candidate(timestep, candidates, each)).tolist()


def inputs_of(denoiser: nn.Module, number: int, call: DenoiserCall, candidates: int, altered: str = "") -> list[Inputs]:
    """Digests of the inputs of each candidate's rows in a denoiser call.

    number: the denoiser's position in `backbone.denoisers`. altered: the denoisers' `state_of` if a callback changed
    it, else "".
    """
    family, batch = call.family, call.batch
    shared = hashlib.sha256(f"{number} {switched(denoiser)}{altered}".encode())
    digests = [hashlib.sha256() for _ in range(candidates)]
    bits: list[list[int]] = []
    sums: list[Tensor] = []
    tolerances: list[Tensor] = []
    for name, value in sorted(flattened(call.arguments).items()):
        if isinstance(value, Tensor) and name in family.batched_arguments and value.ndim and len(value) == 1:
            value = value.expand(batch, *value.shape[1:])  # the denoiser broadcasts one row to all
        if not call.has_rows(name, value):
            shared.update(f"{name} {_text(value)}".encode())
        elif isinstance(value, Tensor):
            shape = (batch // candidates, *value.unflatten(0, (batch, -1)).shape[1:])
            shared.update(f"{name} {value.dtype} {shape}".encode())
            rows = _by_candidate(value, candidates, len(value) // batch)
            hashes = _bits(rows).tolist()
            if value.is_floating_point() and name != family.timestep_argument:  # timesteps come from a table, exact
                bits.append(hashes)
                parts, tolerance = _sums(rows)
                sums.append(parts)
                tolerances.append(tolerance)
            else:
                for candidate, bits_hash in enumerate(hashes):
                    digests[candidate].update(f"{name} {bits_hash}".encode())
        else:
            for candidate in range(candidates):
                digests[candidate].update(f"{name} {[_text(each) for each in value[candidate::candidates]]}".encode())
    common, moments = shared.digest(), moments_of(call, candidates)
    parts = torch.stack(sums, 1).cpu()  # never empty: the latents are among them
    tolerance = torch.stack(tolerances, 1).cpu()
    return [
        Inputs(
            moments[c],
            common + digests[c].digest(),
            tuple(each[c] for each in bits),
            parts[c],
            tolerance[c],
            candidates == 1,
        )
        for c in range(candidates)
    ]


def switched(denoiser: nn.Module) -> str:
    """Digest of a denoiser's switches.

    These are each module's plain values (an adapter's scale, its being active or merged), its attention processor, and
    the hooks on it (guidance that skips layers). Those of step caches are left out: drafts alone have them, and what is
    recorded of drafts was computed in full.
    """
    switches: list[Any] = []
    for module in modules_of(denoiser):
        values = vars(module)
        switches += [v for name, v in values.items() if name not in _MODULE_ATTRIBUTES and _is_plain(v)]
        forward, processor = values.get("forward"), values.get("processor")
        hooks = hooks_of(module)  # diffusers adds an empty registry at the first call
        if hooks or forward is not None or values["_forward_hooks"] or values["_forward_pre_hooks"]:
            caches, name = cache_hooks(module), getattr(forward, "__qualname__", type(forward).__qualname__)
            changes = [each for each in hooks if each not in caches]
            if forward is not None and name != type(module).forward.__qualname__:
                changes.append(name)
            counts = [len(values["_forward_hooks"]), len(values["_forward_pre_hooks"])]
            switches += [*counts, *changes] if any(counts) or changes else []
        if processor is not None:
            switches += [type(processor).__qualname__, *(v for v in vars_of(processor).values() if _is_plain(v))]
    # In version 2 of marshal, as later ones write references, which differ between equal values.
    return hashlib.sha256(marshal.dumps(switches, 2)).hexdigest()


def state_of(denoisers: Sequence[nn.Module]) -> str:
    """Digest of the denoisers' state that a callback may change without a trace in the arguments of a call.

    It covers weights, tensors on modules and attention processors, and the values held by hooks and replaced code. It
    takes some ms, and is computed only if the call has a callback.
    """
    digest = hashlib.sha256()
    for denoiser in denoisers:
        digest.update(weights_bits(denoiser).encode())
        for module in modules_of(denoiser):
            values = vars(module)
            digest.update(_held({name: v for name, v in values.items() if isinstance(v, Tensor)}).encode())
            digest.update(_held([values["_buffers"], values.get("forward"), values.get("processor")]).encode())
            hooks = (*values["_forward_pre_hooks"].values(), *values["_forward_hooks"].values())
            digest.update(_held(list(map(unless_it_looks, hooks))).encode())
    return digest.hexdigest()


def _held(value: Any, depth: int = 5) -> str:
    """A text that is equal for equal values; functions, objects and containers are described by their contents."""
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
    """A text that is equal for equal values; an object that is neither a tensor nor plain gives its class's name."""
    if isinstance(value, Tensor):
        whole = value.detach().flatten()[None]
        return f"{value.dtype} {tuple(value.shape)} {_bits(whole).item()}"
    if isinstance(value, Mapping):
        return repr([(str(name), _text(each)) for name, each in value.items()])
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return repr([_text(each) for each in value])
    return repr(value) if isinstance(value, _PLAIN) else type(value).__qualname__


def _by_candidate(value: Tensor, candidates: int, each: int) -> Tensor:
    """Rows of a batch of groups, `each` per sample, as one flat row per candidate: (candidates, length)."""
    rows: Tensor = value.unflatten(0, (-1, candidates, each))
    return rows.transpose(0, 1).flatten(1)


def _bits(rows: Tensor) -> Tensor:
    """A hash of each row of (n, length), to the bit, computed on the tensor's device: (n,) int64."""
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
    """Mean and root mean square of CHUNKS parts of each row of (n, length), and the most that rounding changes them by.

    Shapes (n, 2, CHUNKS) float32 and (n,). The tolerance is far below the change by a callback or another seed.
    """
    eps = torch.finfo(rows.dtype).eps
    values = rows.detach().float()
    values = nn.functional.pad(values, (0, -values.shape[1] % CHUNKS)).unflatten(1, (CHUNKS, -1))
    squares = values.square().mean(2)
    scale = squares.mean(1).sqrt()
    return torch.stack([values.mean(2), squares.sqrt()], 1), scale * (1e-5 + 4 * eps / values.shape[2] ** 0.5)
