"""Drafts that run all steps of the schedule for less: one of diffusers' step caches on, guidance off on late steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig

from prism.backbone.denoiser_call import DenoiserCall
from prism.backbone.pipeline import cache_hooks, dtype_of
from prism.backbone.wrapping import is_compiled
from prism.errors import PrismError, number, quoted, reason
from prism.sampling.ledger import blocks_counted, blocks_ran
from prism.sampling.lookahead import Predictor

if TYPE_CHECKING:
    from prism.backbone import Backbone
    from prism.sampling.plan import CFG, Candidate
    from prism.sampling.recording import Recording

_WARM_UP = 3  # steps that taylorseer computes first, as diffusers does by default
_CONFIGS: dict[str, Callable[[float, Any], Any]] = {
    "first-block": lambda threshold, _: FirstBlockCacheConfig(threshold=threshold),
    "taylorseer": lambda interval, dtype: TaylorSeerCacheConfig(
        cache_interval=int(interval),
        disable_cache_before_step=_WARM_UP,
        taylor_factors_dtype=dtype,
        use_lite_mode=True,  # whole blocks are skipped, so that rows tell the cost
    ),
}
# By cache and family: the number that keeps a video as it is. First block: the thresholds of ParaAttention, whose cache
# diffusers took over, and for Wan 2.1 14B those of testdummyvt/diffsynth-wan-cache. TaylorSeer: its paper (2503.06923).
CALIBRATED: dict[str, dict[str, float]] = {
    "first-block": {"wan": 0.06, "hunyuan-video": 0.035, "cogvideox": 0.025, "mochi": 0.035},
    "taylorseer": {"hunyuan-video": 5},
}
# Their blocks do not take and give one sequence of tokens, or not under the names that the first-block cache looks for.
_UNLIKE = ("latte", "kandinsky-5", "motif-video", "motif-video-i2v")
_EXAMPLES = {"first-block": "first-block:0.06", "taylorseer": "taylorseer:4", "guidance": "guidance:0.5"}


@dataclass(frozen=True)
class StepCache:
    """What drafts leave out of the steps that they run.

    cache: "first-block" computes a step's other blocks only where the first one's residual has changed by more than
    `threshold` of its mean absolute value since they were last computed; the rows of a batch share that decision.
    "taylorseer" computes every `threshold`-th step and extrapolates the others from them. "": none.
    threshold: its one number; None: that of the family.
    guidance: the share of the steps, from the first, that are guided; on later ones the conditional pass stands for the
    unconditional one, which gives that pass's own prediction. In [0, 1].
    """

    cache: str = ""
    threshold: float | None = None
    guidance: float = 1.0

    def __str__(self) -> str:
        threshold = "" if self.threshold is None else f":{self.threshold:.12g}"
        parts = (self.cache + threshold, "" if self.cache and self.guidance == 1 else f"guidance:{self.guidance:.12g}")
        return ",".join(part for part in parts if part)

    @property
    def adaptive(self) -> bool:
        """True if the steps that are computed depend on what is sampled."""
        return self.cache == "first-block"

    def fitted(self, backbone: Backbone) -> StepCache:
        """The cache with its family's number. Raises PrismError where it does not fit the pipeline's denoisers.

        To find out, it is switched on and off again.
        """
        family, cache = backbone.family, self
        if self.cache and self.threshold is None:
            calibrated = CALIBRATED[self.cache]
            if family.name not in calibrated:
                raise PrismError(
                    f"The family {family.name!r} has no calibrated number for the draft cache {self.cache}; give one, "
                    f'such as draft_cache="{_EXAMPLES[self.cache]}" (more skips more), and compare with full drafts.'
                )
            cache = replace(self, threshold=calibrated[family.name])
        if family.counts_steps_by_calls and self.guidance < 1:
            raise PrismError(
                f"{type(backbone.pipe).__name__} steps copies of its scheduler, so that the steps with guidance "
                "cannot be told; leave guidance out of draft_cache."
            )
        with backbone.held(), cache.open(backbone):
            pass
        return cache

    @contextmanager
    def open(self, backbone: Backbone) -> Iterator[None]:
        """While open the denoisers run with the cache, and a ledger counts the blocks that are computed.

        All that is put onto them is taken off again, also after an exception.

        Raises:
            PrismError: where diffusers has no such cache for a denoiser, or its blocks are compiled.
        """
        if not self.cache:
            yield
            return
        with ExitStack() as stack:
            for denoiser in backbone.denoisers:
                self._check(backbone, denoiser)
                stack.enter_context(blocks_counted(denoiser, backbone.family.block_list(denoiser)))
                stack.enter_context(_cleaned(denoiser))
                try:
                    denoiser.enable_cache(_CONFIGS[self.cache](self.threshold or 0.0, dtype_of(denoiser)))
                except Exception as error:
                    raise self._unfit(denoiser, reason(error, 120)) from error
            yield

    def _check(self, backbone: Backbone, denoiser: Any) -> None:
        if is_compiled(denoiser) or any(map(is_compiled, backbone.family.block_list(denoiser))):
            raise self._unfit(denoiser, "it is compiled, and a graph that is compiled computes every block")
        if not hasattr(denoiser, "enable_cache"):
            raise self._unfit(denoiser, "it has no enable_cache")
        if self.cache == "first-block" and backbone.family.name in _UNLIKE:
            raise self._unfit(denoiser, "its blocks do not all change the same tokens, or under other names")
        if self.cache == "taylorseer" and not hasattr(denoiser, "proj_out"):
            raise self._unfit(denoiser, "it has no proj_out, whose output would be extrapolated")

    def _unfit(self, denoiser: Any, why: str) -> PrismError:
        return PrismError(
            f"The draft cache {self.cache} does not fit {type(denoiser).__name__} ({why}); take another, or leave "
            "draft_cache out and give draft_steps."
        )

    # -- cost

    def guided_steps(self, num_steps: int) -> int:
        """The number of steps, from the first, that are guided."""
        return round(self.guidance * num_steps)

    def rows(self, calls: Sequence[int], cfg: CFG) -> list[float]:
        """Denoiser rows per candidate and step of a run with `calls` passes per step; the most, where it is adaptive.

        calls, cfg: see `Workload`.
        """
        seen: Counter[tuple[int, int]] = Counter()
        rows = []
        for step, passes in enumerate(calls, 1):
            passes = passes if step <= self.guided_steps(len(calls)) else 1
            groups = [(0, passes)] if cfg == "one_batch" else [(index, 1) for index in range(passes)]
            rows.append(float(sum(size for index, size in groups if self._computes(seen[index, size]))))
            seen.update(groups)
        return rows

    def _computes(self, step: int) -> bool:
        """True if the step, from 0, of one pass is computed in full, or may be."""
        if self.cache != "taylorseer" or step < _WARM_UP:
            return True
        return (step - _WARM_UP - 1) % int(self.threshold or 1) == 0

    def whole_steps(self, calls: Sequence[int], cfg: CFG) -> int:
        """The number of steps, from the first, that are surely those of a run that leaves nothing out."""
        pairs = zip(self.rows(calls, cfg), calls)
        return 0 if self.adaptive else next((n for n, (rows, passes) in enumerate(pairs) if rows < passes), len(calls))


def parse(value: Any) -> StepCache:
    """A cache from its text or mapping: "first-block", "first-block:0.1,guidance:0.5", {"first-block": 0.1}.

    Raises PrismError for anything else, and for numbers out of range.
    """
    entries = value
    if isinstance(value, str):
        parts = [part.partition(":") for part in value.split(",")]
        entries = {name.strip(): text.strip() if colon else None for name, colon, text in parts}
        if len(entries) < len(parts):
            entries = None  # a name is given twice
    if not isinstance(entries, Mapping) or not entries or not entries.keys() <= {*_CONFIGS, "guidance"}:
        raise PrismError(
            f"draft_cache names a cache of {', '.join(_CONFIGS)}, with its number, and a share of guidance, such as "
            f'"first-block:0.06,guidance:0.5"; found {quoted(value, 80)}.'
        )
    caches = [name for name in entries if name != "guidance"]
    if len(caches) > 1:
        raise PrismError(f"draft_cache takes one cache; found {' and '.join(caches)}.")
    numbers = {name: _number(name, each) for name, each in entries.items() if each is not None}
    if "guidance" in entries and "guidance" not in numbers:
        raise PrismError('draft_cache takes guidance with the share of steps that are guided, such as "guidance:0.5".')
    cache = caches[0] if caches else ""
    return StepCache(cache, numbers.get(cache), numbers.get("guidance", 1.0))


def _number(name: str, value: Any) -> float:
    try:
        value = float(value) if isinstance(value, str) else value
    except ValueError:
        raise PrismError(
            f"{name} in draft_cache takes a number, such as {_EXAMPLES[name]}; found {quoted(value, 40)}."
        ) from None
    low, high = {"taylorseer": (1, 10_000), "guidance": (0, 1), "first-block": (0, 1e9)}[name]
    given = number(f"{name} in draft_cache", value, low, high)
    if name == "taylorseer" and given % 1:
        raise PrismError(f"taylorseer in draft_cache takes a whole number of steps; found {given:g}.")
    return given


@contextmanager
def _cleaned(denoiser: Any) -> Iterator[None]:
    """Take all cache hooks off a denoiser's modules afterwards, and the attributes that were set for them."""
    modules = {module: set(vars(module)) for module in denoiser.modules()}
    config = {name: value for name, value in vars(denoiser).items() if name == "_cache_config"}
    try:
        yield
    finally:
        for module, before in modules.items():
            if (registry := vars(module).get("_diffusers_hook")) is None:
                continue
            for name in cache_hooks(module):
                registry.remove_hook(name, recurse=False)
            vars(registry).pop("_child_registries_cache", None)  # lists registries that are gone
            if not registry.hooks:  # else something of the user's
                for name in {"_diffusers_hook", "forward"} - before:
                    vars(module).pop(name, None)
        vars(denoiser).pop("_cache_config", None)
        vars(denoiser).update(config)


class Drafter(Predictor):
    """A stock call of several candidates that leaves out of its steps what a `StepCache` says.

    Where it is to be recorded, it is up to the first call that leaves something out.
    """

    def __init__(
        self,
        cache: StepCache,
        backbone: Backbone,
        candidates: Sequence[Candidate],
        recordings: Mapping[Candidate, Recording],
        *,
        guided_steps: int,
        record: bool = True,
    ):
        super().__init__(backbone, candidates, recordings, (), record=record, predicts=False)
        self.cache, self.guided_steps = cache, guided_steps

    def run(self, call: Mapping[str, Any]) -> Any:
        with self.cache.open(self.backbone):
            return super().run(call)

    def is_alone(self) -> bool:
        return self.step > self.guided_steps

    def _denoise(self, number: int, denoiser: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
        family, index = self.backbone.family, self.index
        if family.counts_steps_by_calls:
            index %= self.calls_per_step

        def cached(*args: Any, **kwargs: Any) -> Any:
            if not self.cache.cache:
                return forward(*args, **kwargs)
            # A state of its own for each pass of a step: not all pipelines name them, and some change the rows.
            rows, before = DenoiserCall.of(denoiser, args, kwargs, family).batch, blocks_ran(denoiser)
            with denoiser.cache_context(f"{index} {rows}"):
                output = forward(*args, **kwargs)
            if blocks_ran(denoiser) - before < self.backbone.num_blocks:
                self.record = False
            return output

        if self.is_alone():
            self.record = False
        return super()._denoise(number, denoiser, cached, *args, **kwargs)
