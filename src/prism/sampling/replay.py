"""Intercept one stock pipeline call of several candidates: gate it, record it, and answer it from recordings."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from prism.backbone import control
from prism.backbone.denoiser_call import DenoiserCall
from prism.backbone.family import Family
from prism.backbone.patches import check_scheduler
from prism.backbone.pipeline import callers_own, tensor_of, vae_of
from prism.backbone.taps import Tokens
from prism.backbone.wrapping import StopCall, around, around_module, run_until_stopped
from prism.errors import PrismError, quoted, reason
from prism.sampling.edits import Editor
from prism.sampling.plan import Candidate
from prism.sampling.recording import Inputs, Recording, inputs_of, moments_of, state_of
from prism.team import ran_out

if TYPE_CHECKING:
    from prism.backbone.backbone import Backbone
    from prism.sampling.guiding import Guide


def check_noise(pipe: Any, steps_copies: bool) -> None:
    """Raise PrismError if the scheduler's steps draw noise that does not depend on a candidate's seed.

    To find out, a copy of the scheduler makes two steps on zeros. A step that takes a generator is given one, as in a
    search, except where the pipeline steps copies of its scheduler (`steps_copies`). A replaced method of the
    scheduler whose result depends on earlier calls is refused too.
    """
    check_scheduler(pipe.scheduler)
    try:
        scheduler = copy.deepcopy(pipe.scheduler)
        lends = "generator" in inspect.signature(scheduler.step).parameters and not steps_copies
        lent = {"generator": torch.Generator("cpu")} if lends else {}
        shifts = {"mu": 1.0} if getattr(scheduler.config, "use_dynamic_shifting", False) else {}
        scheduler.set_timesteps(4, **shifts)
        sample = torch.zeros(1, 4, 2, 4, 4)
        with torch.random.fork_rng(devices=[]):
            before = torch.get_rng_state()
            for t in scheduler.timesteps[:2]:
                if hasattr(scheduler, "scale_model_input"):  # without it some warn
                    scheduler.scale_model_input(sample, t)
                scheduler.step(sample, t, sample, **lent)
            moved = not torch.equal(torch.get_rng_state(), before)
    except Exception:  # a scheduler with another interface is checked at its first step in the search
        return
    if moved:
        raise PrismError(global_noise(pipe))


def arguments_of_step(pipe: Any, signature: inspect.Signature, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a scheduler's step by name. Raises PrismError if they do not fit its signature."""
    try:
        return signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        kinds = f"{type(pipe.scheduler).__name__} and {type(pipe).__name__}"
        raise PrismError(f"{kinds} do not go together ({reason(error)}); set another scheduler.") from error


def global_noise_states(device: torch.device) -> list[Tensor]:
    """The states of torch's global generators on the host and on a device."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def global_noise(pipe: Any) -> str:
    """The error message for a scheduler whose noise no seed decides."""
    return (
        f"The steps of {type(pipe.scheduler).__name__} in {type(pipe).__name__} draw noise from torch's global "
        "generator and cannot be given one, so that no seed gives a candidate again; take a scheduler whose step "
        'takes a generator, or the strategy "none" or "random".'
    )


def reproduction(
    prompts: bool, candidate: Candidate, noise: set[str], has_callback: bool, guidance: str | None = None
) -> str:
    """The line of Python that gives a candidate's video again, or "" where none does.

    Args:
        prompts: True if the pipeline takes a prompt.
        noise: the sources of the noise that the scheduler's steps drew, see `Interceptor`.
        has_callback: True if the call has a callback of the user's, whose place edits or guidance would take.
        guidance: the line of Python that makes the guidance by the judge, or None.
    """
    seed = candidate.seed
    prompt = "prompt, " if prompts else ""
    if "global" in noise or ((candidate.edits or guidance) and (has_callback or "lent" in noise)):
        return ""
    if guidance:
        return f"pipe(**prism.sampling.guided(judge, {guidance}, {prompt}seed={seed}, **call))"
    if candidate.edits:
        edits = ", ".join(f"({edit.step}, {edit.seed}, {edit.weight})" for edit in candidate.edits)
        return f"pipe({prompt}**prism.sampling.edited({seed}, [{edits}]), **call)"
    if "lent" in noise:
        return f'best_of_n(pipe, None, {prompt or "None, "}strategy="none", seeds=[{seed}], **call)'
    return f'pipe({prompt}generator=torch.Generator("cpu").manual_seed({seed}), **call)'


def _one_by_one(decode: Any, latents: Tensor, *args: Any, **kwargs: Any) -> Any:
    outputs = [decode(row[None], *args, **kwargs) for row in latents]
    rows = torch.cat([tensor_of(output) for output in outputs])
    return (rows,) if isinstance(outputs[0], tuple) else DecoderOutput(sample=rows)


# Called at a cut with (step, t, candidates, tokens (len(candidates), L, D_vis), finite (len(candidates),)). Returns the
# candidates to go on with, or None to end the call.
OnCut = Callable[[int, float, list[Candidate], Tokens, Tensor], "list[Candidate] | None"]


class Interceptor:
    """One stock pipeline call of several candidates: answered from their recordings, recorded, tapped and gated.

    The gate computes only the rows of the survivors; dead rows come back as zeros and are never read.
    A cut's scores are read either by listening to the conditional pass that the sampler runs anyway, or by a probe: the
    conditional rows are run up to the tap and no further, and the survivors' pass follows in full.
    A candidate's edits are applied at the end of their steps, after the user's callback, and then the guide's pushes.
    """

    def __init__(
        self,
        backbone: Backbone,
        candidates: Sequence[Candidate],
        recordings: Mapping[Candidate, Recording],
        record: bool = True,
        cuts: Mapping[int, bool] | None = None,  # by step: True if scores are read by a probe
        tap: int | Sequence[int] | None = None,
        on_cut: OnCut | None = None,
        searches: bool = True,  # refuse noise of global generators; a winner's plain call may draw it
        state: str = "",  # `state_of` the denoisers when recordings were made, if there is a callback to change it
        guide: Guide | None = None,
    ):
        self.backbone, self.candidates, self.recordings, self.record = backbone, list(candidates), recordings, record
        self.cuts, self.tap, self.on_cut, self.searches = dict(cuts or {}), tap, on_cut, searches
        self.guide, self.state, self.altered = guide, state, ""  # altered: the present state, if it differs
        self.alive = list(range(len(self.candidates)))  # positions in the batch
        self.step, self.index = 1, 0  # the 1-based scheduler step, and the denoiser calls made in it so far
        self.latents: Tensor | None = None  # what the last scheduler step gave, (len(candidates), ...)
        self.first_call: Mapping[str, Any] = {}  # its arguments, for families that restore the condition in the end
        # The source of the noise that the scheduler's steps drew: "" if there was none or the pipeline gave them a
        # generator, "lent" for the candidates' generators that `_scheduler_step` gave them, "global" for torch's own.
        self.noise: Literal["", "lent", "global"] = ""

    def run(self, call: Mapping[str, Any]) -> Any:
        """The stock call's result, or None if a cut ended it."""
        pipe, self.generator = self.backbone.pipe, call.get("generator")
        self.calls_per_step = 2 if self.backbone.guided(dict(call)) and self.backbone.family.cfg == "two_calls" else 1
        self._look_for_changes()
        with ExitStack() as stack:
            for number, denoiser in enumerate(self.backbone.denoisers):
                wrapper = packing(partial(self._denoise, number, denoiser), denoiser, self.backbone.family)
                stack.enter_context(around_module(denoiser, wrapper))
            stack.enter_context(control.gated(self.backbone, len(self.candidates), lambda: self.alive))
            if self._sees_steps():
                stack.enter_context(around(pipe.scheduler, "step", self._scheduler_step))
            if self.backbone.family.vae_batch_size_one and len(self.candidates) > 1:
                stack.enter_context(around(vae_of(pipe), "decode", _one_by_one))
            return run_until_stopped(
                pipe, self._with_callback(call), lambda: self.step if (self.step, self.index) > (1, 0) else 0
            )

    def finished(self) -> Tensor:
        """The latents at the end of the call, as the pipeline decodes them: (len(candidates), ...)."""
        if self.latents is None:
            raise PrismError(
                f"The latents of {type(self.backbone.pipe).__name__} were not seen: it took no step of its scheduler "
                "that tells them and no callback_on_step_end; look at counts_steps_by_calls in its family."
            )
        return self.backbone.finished(self.latents, self.first_call)

    # -- the denoiser

    def _denoise(self, number: int, denoiser: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        family = self.backbone.family
        call = DenoiserCall.of(denoiser, args, kwargs, family)
        if (family.restores_condition or family.appends_conditions) and not self.first_call:
            self.first_call = dict(call.arguments)
        if family.counts_steps_by_calls and self.index == self.calls_per_step:
            self.step, self.index = self.step + 1, 0
        probed = self.cuts.get(self.step) if self.index == 0 else None  # None: no cut at this call
        self.index += 1
        if probed:
            with explained_rows(call, False):
                tokens, _ = self._read(denoiser, forward, call.rows(self._conditional_rows(call)), stop=True)
            self._cut(call, tokens)
        alive = self.alive  # during this call: a cut that listens changes self.alive only after the forward pass
        recordings = [self.recordings[self.candidates[row]] for row in alive]
        inputs: list[Inputs] = []
        moments = moments_of(call, len(self.candidates)) if all(recordings) else []
        if self.record or (moments and all(moments[row] in each.moments for row, each in zip(alive, recordings))):
            every = inputs_of(denoiser, number, call, len(self.candidates), self.altered)
            inputs = [every[row] for row in alive]
        recorded = [recording.find(each) for recording, each in zip(recordings, inputs)]
        if probed is not False and inputs and all(value is not None for value in recorded):
            device = call.noisy.device
            sample = torch.stack([value.to(device) for value in recorded if value is not None], 1).flatten(0, 1)
        else:
            whole = len(alive) == len(self.candidates)
            live = call if whole else call.rows(self._rows(call, alive))
            with explained_rows(call, whole):
                if probed is False:
                    tokens, output = self._read(denoiser, forward, live, stop=False)
                else:
                    output = forward(**live.arguments)
            check_form(denoiser, output, family)
            sample = tensor_of(output)
            if self.record:
                by_candidate = sample.detach().unflatten(0, (-1, len(alive))).transpose(0, 1)
                for recording, each, value in zip(recordings, inputs, by_candidate):
                    recording.keep(each, value)
            if probed is False:
                self._cut(call, tokens[family.conditional(len(tokens), len(alive))])
            if whole:
                return output
        if len(alive) < len(self.candidates):
            rows = self._rows(call, alive).to(sample.device)
            sample = sample.new_zeros((call.batch, *sample.shape[1:])).index_copy_(0, rows, sample)
        return self._output(call, sample)

    def _output(self, call: DenoiserCall, sample: Tensor) -> Any:
        """A sample in the form that the call of the denoiser asks for."""
        if self.backbone.family.returns_tensor:
            return sample
        return (sample,) if call.arguments.get("return_dict") is False else Transformer2DModelOutput(sample=sample)

    def _rows(self, call: DenoiserCall, alive: Sequence[int]) -> Tensor:
        """The batch rows of the candidates `alive`, group by group."""
        n = len(self.candidates)
        return torch.tensor([row + group * n for group in range(call.batch // n) for row in alive])

    def _conditional_rows(self, call: DenoiserCall) -> Tensor:
        """The living candidates' batch rows of the conditional group."""
        rows = self._rows(call, self.alive)
        return rows[self.backbone.family.conditional(len(rows), len(self.alive))]

    def _read(self, denoiser: nn.Module, forward: Any, call: DenoiserCall, stop: bool) -> tuple[Tokens, Any]:
        assert self.tap is not None
        return self.backbone.read(call.arguments, self.tap, stop, forward, denoiser)

    def _cut(self, call: DenoiserCall, tokens: Tokens) -> None:
        assert self.on_cut is not None
        t, noisy = call.t(self.backbone.pipe.scheduler), call.noisy[self._conditional_rows(call)]
        candidates = [self.candidates[row] for row in self.alive]
        survivors = self.on_cut(self.step, t, candidates, tokens, noisy.flatten(1).isfinite().all(1))
        if survivors is None:
            raise StopCall
        self.alive = [row for row in self.alive if self.candidates[row] in survivors]

    # -- the scheduler and the user's callback

    def _sees_steps(self) -> bool:
        """True where the steps of the pipeline's scheduler are the run's, neither on copies of it nor twice."""
        return not self.backbone.family.counts_steps_by_calls

    def _scheduler_step(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """Make a step of the scheduler, lend it a generator if it has none, and note which generators it drew from.

        A step that takes a generator and is given none would draw its noise from the global one. It is lent the
        candidates' own generators, so that a candidate depends on its seed alone, however the search is batched.
        """
        signature = inspect.signature(inner)
        arguments = arguments_of_step(self.backbone.pipe, signature, args, kwargs)
        generators: list[torch.Generator] = []
        if "generator" in signature.parameters and arguments.get("generator") is None and self.generator is not None:
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
        self.latents = self.backbone.main(self.backbone.family.stepped(output, self.backbone.pipe.scheduler))
        return output

    def _look_for_changes(self) -> None:
        state = state_of(self.backbone.denoisers) if self.state else ""
        self.altered = "" if state == self.state else state

    def _with_callback(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """The call with a callback that reads and edits the latents at the end of each step, where they are whole: some
        pipelines give their scheduler all frames but the first."""
        callback = call.get("callback_on_step_end")
        if not self.backbone.takes("callback_on_step_end"):
            if any(candidate.edits for candidate in self.candidates):
                raise PrismError(
                    f"{type(self.backbone.pipe).__name__} takes no callback_on_step_end, through which candidates are "
                    "edited."
                )
            return dict(call)
        each = self.generator if isinstance(self.generator, list) else [self.generator] * len(self.candidates)
        editor = Editor([candidate.edits for candidate in self.candidates], each)
        course = None if self.guide is None else self.guide.course([c.seed for c in self.candidates], each)

        def watched(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
            with callers_own():
                returned = {} if callback is None else callback(pipe, step, timestep, tensors)
            stepped = {**tensors, **(returned or {})}["latents"]
            latents = editor.after_step(pipe.scheduler, step + 1, timestep, stepped)
            if course is not None:
                kept = {} if self.altered else {row: self.recordings[self.candidates[row]] for row in self.alive}
                latents = course.after_step(pipe, step + 1, timestep, latents, self.alive, kept)
            if latents is not stepped:
                returned = {**(returned or {}), "latents": latents}
            if not self.backbone.family.ends_with_prediction:
                self.latents = self.backbone.main(latents)
            self._look_for_changes()
            return returned

        named = getattr(callback, "tensor_inputs", None)  # diffusers' own callback classes name their tensors
        named = call.get("callback_on_step_end_tensor_inputs", ["latents"]) if named is None else named
        named = [*named, *({"latents"} - set(named))]
        return {**call, "callback_on_step_end": watched, "callback_on_step_end_tensor_inputs": named}


def check_form(denoiser: nn.Module, output: Any, family: Family) -> None:
    """Raise PrismError if the denoiser's output is a plain tensor and its family says otherwise, or the reverse: a
    recording would answer in the other form, and a pipeline that takes `output[0]` might get the first row alone."""
    if family.outputs == 1 and isinstance(output, Tensor) != family.returns_tensor:
        raise PrismError(
            f"{type(denoiser).__name__} gives {'a plain tensor' if isinstance(output, Tensor) else 'no plain tensor'}; "
            f"say returns_tensor={isinstance(output, Tensor)} in the family {family.name!r}."
        )


@contextmanager
def explained_rows(call: DenoiserCall, whole: bool) -> Iterator[None]:
    """Explain a denoiser's failure on some rows of a call: name the arguments of that length that were left whole."""
    try:
        yield
    except (IndexError, RuntimeError, ValueError) as error:
        batch, values = call.batch, call.arguments.items()
        tensors = {name: v for name, v in values if isinstance(v, Tensor) and v.ndim and len(v) == batch}
        left = [name for name, value in tensors.items() if not call.has_rows(name, value)]
        if whole or batch == 1 or not left or ran_out(error):
            raise
        raise PrismError(
            f"The denoiser does not take some of its {batch} rows ({quoted(error, 120)}); it may have a row per sample "
            f"in {', '.join(left[:6])}: name these in batched_arguments of the family {call.family.name!r}, or say "
            "batch_size_one."
        ) from error


# Functions that unpack a packed row, by the denoiser's class, a latent row's shape and the packed row's width.
_forms: dict[tuple[Any, ...], Callable[[Tensor], Any]] = {}


def packing(wrapper: Callable[..., Any], denoiser: nn.Module, family: Family) -> Callable[..., Any]:
    """A wrapper of a denoiser's call like `wrapper`, which is given all outputs side by side in one tensor (B, N).

    The pipeline gets them back in the denoiser's own form, computed or from a recording.
    """
    if family.outputs == 1:
        return wrapper

    def call(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        key = (type(denoiser).__name__, DenoiserCall.of(denoiser, args, kwargs, family).noisy.shape[1:])

        def pack(*args: Any, **kwargs: Any) -> Tensor:
            output = forward(*args, **kwargs)
            parts = list(output.values() if isinstance(output, Mapping) else output)[: family.outputs]
            fewest = 1 if family.read_arguments else family.outputs  # a call may leave the sound out
            if len(parts) < fewest or not all(isinstance(part, Tensor) for part in parts):
                raise PrismError(f"The denoiser gives {len(parts)} tensors; say in the family how many (outputs).")
            packed = torch.cat([part.flatten(1) for part in parts], 1)
            _forms[key, packed.shape[1]] = _unpacking(output, parts)
            return packed

        packed = tensor_of(wrapper(pack, *args, **kwargs))
        return _forms[key, packed.shape[1]](packed)

    return call


def _unpacking(output: Any, parts: list[Tensor]) -> Callable[[Tensor], Any]:
    """A function that turns a packed tensor into the form of the denoiser's `output`, for any number of rows."""
    form, names = type(output), list(output) if isinstance(output, Mapping) else []
    kinds = [(part.shape[1:], part.dtype) for part in parts]

    def unpack(packed: Tensor) -> Any:
        rows = packed.split([shape.numel() for shape, _ in kinds], 1)
        unpacked = [row.unflatten(1, shape).to(dtype) for row, (shape, dtype) in zip(rows, kinds)]
        return form(**dict(zip(names, unpacked))) if names else tuple(unpacked)

    return unpack
