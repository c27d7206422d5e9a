"""The one place that stands between a pipeline and its denoiser: capture, gate, record, replay, count.

Whatever is wrapped here is restored on every way out, exceptions and Ctrl-C included.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from prism.backbone.conditioning import Tokens, by_name, noisy_name, take_rows
from prism.backbone.holding import here
from prism.backbone.obstacles import (
    arguments_of_step,
    callers_own,
    failure,
    global_noise,
    global_noise_states,
    misfits_told,
)
from prism.backbone.protocol import tensor_of
from prism.backbone.recording import Inputs, Recording, inputs_of, moments_of, state_of
from prism.backbone.several import check_form, packing, rows_told
from prism.errors import PrismError

if TYPE_CHECKING:
    from prism.backbone.backbone import Backbone

_ABSENT = object()
# What the offloading machinery of diffusers and accelerate keeps on a pipeline: theirs to change, not ours to restore.
_OFFLOADING = {"_all_hooks", "_offload_gpu_id", "_offload_device", "_internal_dict"}


class StopForward(Exception):
    """Ends a denoiser's forward pass after a block."""

    def __init__(self, block: int):
        super().__init__(block)
        self.block = block


class StopCall(Exception):
    """Ends a pipeline call at one of its denoiser calls."""


@contextmanager
def around(target: Any, name: str, wrapper: Callable[..., Any], reads: bool = False) -> Iterator[None]:
    """While open, `target.name(...)` is `wrapper(inner, ...)`, where `inner` is what was found there.

    Calls that another thread makes meanwhile go straight to `inner`, and unless `reads` so do those of a judge that
    reads inside the call that is watched, from the user's callback.
    """
    target = getattr(target, "_orig_mod", target)  # what torch.compile gives hands its attributes on
    found, inner = vars(target).get(name, _ABSENT), getattr(target, name)
    wrapper = _Around(wrapper, inner, reads)

    @wraps(inner)  # pipelines read the signature of `scheduler.step` to know whether it takes a generator
    def call(*args: Any, **kwargs: Any) -> Any:
        return wrapper(*args, **kwargs)

    try:
        setattr(target, name, call)
        yield
    finally:
        if found is not _ABSENT:
            setattr(target, name, found)
        elif name in vars(target):
            delattr(target, name)


class _Around:
    """A wrapper around a call, which may itself be wrapped; see `around` for the calls that it lets pass."""

    def __init__(self, wrapper: Callable[..., Any], inner: Callable[..., Any], reads: bool):
        self.wrapper, self.inner, self.reads, self.place = wrapper, inner, reads, here.place

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        (thread, depth), place = self.place, here.place
        if place[0] != thread or not (self.reads or place[1] == depth):
            return self.inner(*args, **kwargs)
        return self.wrapper(self.inner, *args, **kwargs)


@contextmanager
def around_module(module: nn.Module, wrapper: Callable[..., Any], reads: bool = False) -> Iterator[None]:
    """While open, `module(...)` is `wrapper(inner, ...)`; see `around`.

    This stands where `Module.compile` stands, outside `forward` and all hooks: an answered call moves no offloaded
    weights, accelerate may remove and re-add its hooks meanwhile, and compiled modules stay compiled.
    """
    found = vars(module).get("_compiled_call_impl", _ABSENT)
    inner = module._compiled_call_impl or module._call_impl
    try:
        module._compiled_call_impl = _Around(wrapper, inner, reads)
        yield
    finally:
        if found is not _ABSENT:
            module._compiled_call_impl = found
        else:
            vars(module).pop("_compiled_call_impl", None)


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is compiled as a whole: by `torch.compile(module)`, its `compile()`, or its `forward` alone."""
    call = vars(module).get("_compiled_call_impl")
    while isinstance(call, _Around):
        call = call.inner
    compiled = (call, vars(module).get("forward"))
    return any(hasattr(each, "_torchdynamo_orig_callable") for each in compiled)


@contextmanager
def state_kept(pipe: Any) -> Iterator[None]:
    """Restores what a call leaves on the pipeline and on its parts that are no modules (scheduler, guider), so that
    the next call starts as this one did; progress bars are off meanwhile.
    """
    parts = {id(part): part for part in (*pipe.components.values(), pipe.scheduler) if _has_state(part)}
    before = {key: (dict(vars(part)), _contents(vars(part))) for key, part in parts.items()}
    own = dict(vars(pipe))
    try:
        pipe._progress_bar_config = {**getattr(pipe, "_progress_bar_config", {}), "disable": True}
        if hasattr(getattr(pipe, "guider", None), "set_state"):  # where the user's own call before left its last step
            pipe.guider.set_state(step=None, num_inference_steps=None, timestep=None)
        yield
    finally:
        for key, part in parts.items():
            attributes, contents = before[key]
            vars(part).clear()
            vars(part).update(attributes)
            for name, content in contents.items():
                _refill(attributes[name], content)
        for name in [name for name in vars(pipe) if name.startswith("_") and name not in _OFFLOADING]:
            if name not in own:
                delattr(pipe, name)
            elif vars(pipe)[name] is not own[name]:
                setattr(pipe, name, own[name])


def _has_state(part: Any) -> bool:
    """Whether a call may leave something on a part: modules keep nothing, and tokenizers hold much and keep nothing."""
    return hasattr(part, "__dict__") and not isinstance(part, nn.Module | PreTrainedTokenizerBase | type)


def _contents(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of the plain containers among them, which a call may change in place."""
    return {name: value.copy() for name, value in attributes.items() if type(value) in (list, dict, set)}


def _refill(container: Any, content: Any) -> None:
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)


def run_until_stopped(pipe: Any, call: Mapping[str, Any], step: Callable[[], int] = lambda: 0) -> Any:
    """The stock call's result, or None where it was ended by `StopCall`. It leaves the pipeline as it found it.

    What it refuses, or where its own code breaks, is a PrismError; what callers' callbacks raise passes as it is.
    """
    try:
        with misfits_told(pipe), state_kept(pipe):
            return pipe(**call)
    except StopCall:
        free_hooks(pipe)  # the stopped call did not come to its own
        return None
    except BaseException as error:
        free_hooks(pipe)
        if (told := failure(pipe, error, step())) is not None:
            raise told from error
        raise


def free_hooks(pipe: Any) -> None:
    """What a pipeline does at the end of a call: offloaded models go back to where they wait."""
    if hasattr(pipe, "maybe_free_model_hooks"):
        pipe.maybe_free_model_hooks()


def capture(
    pipe: Any, denoisers: Sequence[nn.Module], call: Mapping[str, Any], look: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """The arguments, by name, of the first denoiser call that `pipe(**call)` was about to make; `look` is called there.
    Empty where it makes none.
    """
    kept: dict[str, Any] = {}

    def keep(denoiser: nn.Module, inner: Any, *args: Any, **kwargs: Any) -> None:
        kept.update(by_name(denoiser, args, kwargs))
        look()
        raise StopCall

    with ExitStack() as stack:
        for denoiser in denoisers:
            stack.enter_context(around_module(denoiser, partial(keep, denoiser)))
        run_until_stopped(pipe, call)
    return kept


def _one_by_one(decode: Any, latents: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A VAE's decode that is given one row at a time."""
    outputs = [decode(row[None], *args, **kwargs) for row in latents]
    rows = torch.cat([tensor_of(output) for output in outputs])
    return (rows,) if isinstance(outputs[0], tuple) else DecoderOutput(sample=rows)


# Told at a cut: (step, t, candidates, tokens (len(candidates), L, D_vis), finite (len(candidates),)). Answers with the
# candidates to go on with, or None to end the call.
OnCut = Callable[[int, float, list[int], Tokens, Tensor], "list[int] | None"]


class Interceptor:
    """One stock pipeline call of several candidates: answered from their recordings, recorded, tapped and gated.

    The gate computes the survivors' rows alone; dead rows come back as zeros and are never read.
    A cut's scores are read either by listening to the conditional pass that the sampler runs anyway, or by a probe: the
    conditional rows are run up to the tap and no further, and the survivors' pass follows in full.
    """

    def __init__(
        self,
        backbone: Backbone,
        candidates: Sequence[int],
        recordings: Mapping[int, Recording],
        record: bool = True,
        cuts: Mapping[int, bool] | None = None,  # step -> whether it is probed
        tap: int | Sequence[int] | None = None,
        on_cut: OnCut | None = None,
        searches: bool = True,  # whether noise must be the candidates' own: a winner's call may be any plain call
        state: str = "",  # of the denoisers when the recordings were made, where a callback may change it
    ):
        self.backbone, self.candidates, self.recordings, self.record = backbone, list(candidates), recordings, record
        self.cuts, self.tap, self.on_cut, self.searches = dict(cuts or {}), tap, on_cut, searches
        self.state, self.altered = state, ""  # and what it is where it was changed
        self.alive = list(range(len(self.candidates)))  # positions in the batch
        self.step, self.index = 1, 0  # the 1-based scheduler step, and the denoiser calls made in it so far
        self.latents: Tensor | None = None  # what the last scheduler step gave, (len(candidates), ...)
        self.told: Mapping[str, Any] = {}  # the first denoiser call, where what it is shown is put back in the end
        # Where the scheduler's steps drew noise: nowhere, or where the pipeline itself let them; from the candidates'
        # generators, which were lent to them here; from a global generator.
        self.noise: Literal["", "lent", "global"] = ""

    def run(self, call: Mapping[str, Any]) -> Any:
        """The stock call's result, or None where a cut ended it."""
        pipe, self.generator = self.backbone.pipe, call.get("generator")
        self.calls_per_step = 2 if self.backbone.guided(dict(call)) and self.backbone.family.cfg == "two_calls" else 1
        self._look_for_changes()
        with ExitStack() as stack:
            for place, denoiser in enumerate(self.backbone.denoisers):
                wrapper = packing(partial(self._denoise, place, denoiser), denoiser, self.backbone.family)
                stack.enter_context(around_module(denoiser, wrapper))
            if not self.backbone.family.counts_calls:
                stack.enter_context(around(pipe.scheduler, "step", self._scheduler_step))
            if self.backbone.family.vae_alone and len(self.candidates) > 1:
                stack.enter_context(around(pipe.vae, "decode", _one_by_one))
            return run_until_stopped(
                pipe, self._with_callback(call), lambda: self.step if (self.step, self.index) > (1, 0) else 0
            )

    def finished(self) -> Tensor:
        """The latents at the end of the call, as the pipeline decodes them: (len(candidates), ...)."""
        if self.latents is None:
            raise PrismError(
                f"The latents of {type(self.backbone.pipe).__name__} were not seen: it took no step of its scheduler "
                "that tells them and no callback_on_step_end; look at counts_calls in its family."
            )
        return self.backbone.finished(self.latents, self.told)

    # -- the denoiser

    def _denoise(self, place: int, denoiser: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        arguments, family = by_name(denoiser, args, kwargs), self.backbone.family
        if family.given_back and not self.told:
            self.told = dict(arguments)
        if family.counts_calls and self.index == self.calls_per_step:
            self.step, self.index = self.step + 1, 0
        probed = self.cuts.get(self.step) if self.index == 0 else None  # None where nothing is cut
        self.index += 1
        if probed:
            conditional = take_rows(arguments, self._conditional_rows(arguments), family)
            with rows_told(arguments, family, False):
                tokens, _ = self._read(denoiser, forward, conditional, stop=True)
            self._cut(arguments, tokens)
        alive = self.alive  # of this call: a cut that listens is decided after it
        recordings = [self.recordings[self.candidates[row]] for row in alive]
        inputs: list[Inputs] = []
        moments = moments_of(arguments, len(self.candidates), family) if all(recordings) else []
        if self.record or (moments and all(moments[row] in each.moments for row, each in zip(alive, recordings))):
            every = inputs_of(denoiser, place, arguments, len(self.candidates), family, self.altered)
            inputs = [every[row] for row in alive]
        recorded = [recording.find(each) for recording, each in zip(recordings, inputs)]
        if probed is not False and inputs and all(value is not None for value in recorded):
            device = arguments[noisy_name(arguments, family)].device
            sample = torch.stack([value.to(device) for value in recorded if value is not None], 1).flatten(0, 1)
        else:
            whole = len(alive) == len(self.candidates)
            live = arguments if whole else take_rows(arguments, self._rows(arguments, alive), family)
            with rows_told(arguments, family, whole):
                if probed is False:
                    tokens, output = self._read(denoiser, forward, live, stop=False)
                else:
                    output = forward(**live)
            check_form(denoiser, output, family)
            sample = tensor_of(output)
            if self.record:
                by_candidate = sample.detach().unflatten(0, (-1, len(alive))).transpose(0, 1)
                for recording, each, value in zip(recordings, inputs, by_candidate):
                    recording.keep(each, value)
            if probed is False:
                self._cut(arguments, tokens[family.conditional(len(tokens), len(alive))])
            if whole:
                return output
        if len(alive) < len(self.candidates):
            batch = len(arguments[noisy_name(arguments, family)])
            rows = self._rows(arguments, alive).to(sample.device)
            sample = sample.new_zeros((batch, *sample.shape[1:])).index_copy_(0, rows, sample)
        if family.gives_tensor:
            return sample
        return (sample,) if arguments.get("return_dict") is False else Transformer2DModelOutput(sample=sample)

    def _rows(self, arguments: Mapping[str, Any], alive: Sequence[int]) -> Tensor:
        """Rows of the batch that belong to the living, group by group."""
        n, batch = len(self.candidates), len(arguments[noisy_name(arguments, self.backbone.family)])
        return torch.tensor([row + group * n for group in range(batch // n) for row in alive])

    def _conditional_rows(self, arguments: Mapping[str, Any]) -> Tensor:
        """Those of them in the conditional group."""
        rows = self._rows(arguments, self.alive)
        return rows[self.backbone.family.conditional(len(rows), len(self.alive))]

    def _read(self, denoiser: nn.Module, forward: Any, arguments: dict[str, Any], stop: bool) -> tuple[Tokens, Any]:
        assert self.tap is not None
        return self.backbone.read(arguments, self.tap, stop, forward, denoiser)

    def _cut(self, arguments: Mapping[str, Any], tokens: Tokens) -> None:
        assert self.on_cut is not None
        family = self.backbone.family
        # Frames that are given have lower timesteps than those that are sampled.
        t = family.t_of(self.backbone.pipe.scheduler, arguments[family.timestep_argument].max())
        noisy = arguments[noisy_name(arguments, family)][self._conditional_rows(arguments)]
        candidates = [self.candidates[row] for row in self.alive]
        survivors = self.on_cut(self.step, t, candidates, tokens, noisy.flatten(1).isfinite().all(1))
        if survivors is None:
            raise StopCall
        self.alive = [row for row in self.alive if self.candidates[row] in survivors]

    # -- the scheduler and the user's callback

    def _scheduler_step(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """A step of the scheduler. One that takes a generator and is given none would draw its noise from the global
        generator: it is lent the candidates' own, so that a candidate is its seed's however the search runs."""
        signature = inspect.signature(inner)
        given = arguments_of_step(self.backbone.pipe, signature, args, kwargs)
        generators: list[torch.Generator] = []
        if "generator" in signature.parameters and given.get("generator") is None and self.generator is not None:
            generators = self.generator if isinstance(self.generator, list) else [self.generator]
            kwargs = {**kwargs, "generator": self.generator}
        device = next(value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        lent, others = [generator.get_state() for generator in generators], global_noise_states(device)
        output = inner(*args, **kwargs)
        if not all(map(torch.equal, others, global_noise_states(device))):
            if self.searches:
                raise PrismError(global_noise(self.backbone.pipe))
            self.noise = "global"
        elif not all(torch.equal(generator.get_state(), state) for generator, state in zip(generators, lent)):
            self.noise = "lent"
        self.step, self.index = self.step + 1, 0
        self.latents = self.backbone.main(tensor_of(output, "prev_sample"))
        return output

    def _look_for_changes(self) -> None:
        state = state_of(self.backbone.denoisers) if self.state else ""
        self.altered = "" if state == self.state else state

    def _with_callback(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """The call, watched at the end of its steps: there the latents are whole, while a scheduler may be given all
        but a first frame.
        """
        callback = call.get("callback_on_step_end")
        if not self.backbone.takes("callback_on_step_end"):
            return dict(call)

        def watched(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
            with callers_own():
                returned = {} if callback is None else callback(pipe, step, timestep, tensors)
            self.latents = self.backbone.main({**tensors, **(returned or {})}["latents"])
            self._look_for_changes()
            return returned

        named = getattr(callback, "tensor_inputs", None)  # diffusers' own callback classes name their tensors
        named = call.get("callback_on_step_end_tensor_inputs", ["latents"]) if named is None else named
        named = [*named, *({"latents"} - set(named))]
        return {**call, "callback_on_step_end": watched, "callback_on_step_end_tensor_inputs": named}
