"""The judge: a frozen backbone, the blocks it is tapped at, and trained heads that score noisy latents."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prism.backbone import Backbone, Tokens
from prism.backbone.arguments import texts
from prism.backbone.layout import per_row
from prism.errors import DRAWS, PrismError, flag, instance, whole
from prism.judge import checks, hub, scoring, trajectory
from prism.judge import saved as folders
from prism.judge.checks import trained_together, versions, warn_outside, warn_untrained
from prism.judge.head import OPTIONS, Member, QueryHead, check_fits, scores_of
from prism.judge.objective import log_probabilities
from prism.judge.reference import Reference

DIMENSIONS = ("VQ", "MQ", "TA", "overall")
PAPER_DIM = 1536
Prompts = str | Sequence[str] | None  # None: the call gives embeddings
Rows = Sequence[Mapping[str, Any]]
Token = str | bool | None


class Judge:
    """Scores noisy latents; use ``Judge.untrained``, ``Judge.from_pretrained`` or ``Judge.average``.

    Attributes:
        name: what a report calls this kind of judge.
        backbone: the frozen generator.
        members: the heads, float32, on the backbone's device; usually one.
        dimensions: what the columns of scores mean, such as ("VQ", "MQ", "TA", "overall").
        eta: the tie threshold the heads were trained with (Eq. 3-4).
        trained_on: provenance of the training: store, steps, seed, source, prompts.
        calibration: dimension -> {"temperature", "eta", "tie_threshold"} of ``prism.evaluation.calibrate``, or empty.
    """

    name = "prism"

    def __init__(
        self,
        backbone: Backbone,
        members: Sequence[Member],
        dimensions: Sequence[str] = DIMENSIONS,
        eta: float = 5.0,
        trained_on: Mapping[str, Any] | None = None,
        calibration: Mapping[str, Any] | None = None,
        evaluation: Rows = (),
        reference: Reference | None = None,
        plans: Mapping[str, Any] | None = None,
    ) -> None:
        checks.check_dimensions(dimensions)
        for member in members:
            check_fits(member.head, backbone, member.tap, dimensions)
            member.head.to(backbone.device, torch.float32)
        self.backbone, self.members = backbone, tuple(members)
        self.dimensions, self.eta, self.trained_on = tuple(dimensions), float(eta), dict(trained_on or {})
        self.calibration = dict(calibration or {})
        self._warned, self._evaluation = False, (evaluation, versions(member.head for member in members))
        self.reference, self.plans = reference, plans  # plans: what ``prism plan`` measured, as JSON
        self._random: tuple[int, ...] | None = None  # `versions` of random heads, which any training changes

    def __repr__(self) -> str:
        heads = f"{'untrained, ' if self.is_untrained else ''}{len(self.members)} heads, taps {self.taps}"
        return f"Judge({heads}, {', '.join(self.dimensions)}, {self.backbone})"

    def __getstate__(self) -> dict[str, Any]:
        """State for copies, which have their own heads and share the backbone, and pickles, which hold both."""
        return {**vars(self), "_random": self.is_untrained}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._random = versions(member.head for member in self.members) if state["_random"] else None

    @classmethod
    def untrained(
        cls,
        pipe: Any,
        tap: int | None = None,
        dim: int | None = None,
        dimensions: Sequence[str] = DIMENSIONS,
        aggregation: str = "query",
        seed: int = 0,
        **head_options: Any,
    ) -> Judge:
        """A judge with a fresh head.

        Args:
            pipe: a diffusers pipeline or a ``Backbone``.
            tap: block to read; None: the backbone's default (12 of 30 on Wan2.1-1.3B, as in the paper).
            dim: D; None: 1536 as in the paper, less (twice D_vis) on small backbones.
            dimensions: names of the scores.
            aggregation: "query", or the ablations "mean" and "linear".
            seed: of the head's initial weights; the global random state is left alone.
            **head_options: further arguments of ``QueryHead``.
        """
        backbone = _backbone(pipe)
        tap = backbone.default_tap if tap is None else whole("tap", tap, None)
        width = backbone.widths[min(max(tap, 1), backbone.num_blocks) - 1]
        dim = min(PAPER_DIM, 2 * width) if dim is None else whole("dim", dim)
        checks.check_dimensions(dimensions)
        checks.check_options(head_options, OPTIONS)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(whole("seed", seed, 0, 2**63 - 1))
            head = QueryHead(width, dim, len(dimensions), aggregation=aggregation, **head_options)
        judge = cls(backbone, [Member(tap, head)], dimensions)
        judge._random = versions([head])
        return judge

    @classmethod
    def average(cls, judges: Sequence[Judge]) -> Judge:
        """One judge whose scores are the mean of the judges' scores: heads of several seeds, or at several taps.

        The backbone is read once, up to the highest tap. Scores are averaged without rescaling, as all are log-odds of
        Eq. 3 with one eta: nothing has to be estimated, and no score depends on the other videos that are scored.

        Args:
            judges: on the same pipeline, with the same dimensions and eta; averages among them count as one each.
                The new judge shares their heads. Raises PrismError for none, or ones that do not fit together.
        """
        judges = checks.listed(judges, Judge)
        first: Judge = judges[0]
        checks.check_together(judges)
        if len(judges) == 1:
            return first
        members = [Member(each.tap, each.head, each.share / len(judges)) for judge in judges for each in judge.members]
        trained_on = trained_together([judge.trained_on for judge in judges])
        together = cls(first.backbone, members, first.dimensions, first.eta, trained_on)
        if any(judge.is_untrained for judge in judges):
            together._random = versions(member.head for member in members)
        return together

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], pipe: Any, revision: str | None = None, token: Token = None, **load: Any
    ) -> Judge:
        """Put a saved judge onto a backbone.

        Args:
            source: a folder written by ``save_pretrained``, or the id of a repository on the Hub ("user/name"), of
                which weights and JSON alone are fetched.
            pipe: a diffusers pipeline or a ``Backbone``: the one the head was trained on, or a finetune of it. Or a
                pipeline's folder or id on the Hub, of which no blocks above those that the heads read are loaded.
            revision: branch, tag or commit of the head on the Hub.
            token: for private repositories, the pipeline's too; None: the one logged in with.
            **load: where ``pipe`` is a folder or an id, arguments of diffusers' ``from_pretrained`` (``dtype``, ...).

        Raises:
            PrismError: where a file is missing, truncated, altered or a pickle, or the head was trained on another
                denoiser or VAE (both are named). Other weights of the same architecture give a warning.
        """
        saved = folders.read(source, revision, token)
        reads = saved.backbone.get("reads")
        if isinstance(pipe, str | os.PathLike):
            load |= {} if token is None else {"token": token}
            backbone = Backbone.from_pretrained(os.fspath(pipe), up_to=saved.last_tap, reads=reads, **load)
        elif load:
            raise PrismError(
                f"The pipeline is loaded already, and {next(iter(load))!r} says how to load one; leave it out."
            )
        else:
            backbone = _backbone(pipe, reads)
        folders.check_fingerprint(saved, backbone)
        members = [Member(tap, head, share) for tap, head, share in saved.heads]
        described = saved.dimensions, saved.eta, saved.trained_on, saved.calibration, saved.evaluation, saved.reference
        return cls(backbone, members, *described, plans=saved.plans)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        trained_on: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        evaluation: Rows | None = None,
        license: str | None = None,
        base_model: str | None = None,
    ) -> None:
        """Write config.json, model.safetensors and README.md (a model card) as a folder that appears whole.

        Args:
            folder: where to; an existing one is refused unless ``overwrite``.
            trained_on: replaces ``self.trained_on``.
            evaluation: rows of ``prism.evaluate``, kept and shown in the card; None: ``self.evaluation``.
            license: the head's, as the card is to name it ("apache-2.0", ...); None: the card names none.
            base_model: the pipeline on the Hub, "user/name" or "user/name@revision"; None: where it was loaded from.
        """
        overwrite = flag("overwrite", overwrite)
        if trained_on is not None:
            instance("trained_on", trained_on, Mapping, "a dict")
            self.trained_on = dict(trained_on)
        rows = self.evaluation if evaluation is None else hub.check_rows(evaluation, "evaluation")
        folders.write(self, folder, overwrite, rows, license, base_model)
        self._evaluation = rows, versions(member.head for member in self.members)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: Token = None,
        revision: str | None = None,
        commit_message: str = "Upload a PRISM judge",
        **card: Any,
    ) -> str:
        """Put the folder that ``save_pretrained`` writes on the Hub, as one commit; return the commit's address.

        Args:
            repo_id: "user/name"; made where it does not exist, as is the branch ``revision`` (None: main).
            private: whether a new repository is; None: as the account's settings say.
            token: of the Hub, with the right to write; None: the one logged in with.
            commit_message: first line of the commit.
            **card: evaluation, license and base_model, as of ``save_pretrained``. Raises PrismError if the Hub refuses.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "head"
            self.save_pretrained(folder, **card)
            return hub.upload(folder, repo_id, private, token, revision, commit_message)

    def config(self) -> dict[str, Any]:
        """Describe this judge apart from its weights, as JSON."""
        return folders.describe(self)

    @property
    def evaluation(self) -> Rows:
        """The accuracies that were saved with these heads; empty once a head was trained further."""
        rows, measured = self._evaluation
        return rows if measured == versions(member.head for member in self.members) else []

    @property
    def reference(self) -> Reference | None:
        """Scores of clips to read others beside (`prism.judge.reference`); None once a head was trained further."""
        reference, measured = self._reference
        return reference if measured == versions(member.head for member in self.members) else None

    @reference.setter
    def reference(self, reference: Reference | None) -> None:
        self._reference = reference, versions(member.head for member in self.members)

    @property
    def taps(self) -> tuple[int, ...]:
        """The blocks that are read, rising."""
        return tuple(sorted({member.tap for member in self.members}))

    @property
    def tap(self) -> int:
        """The number of blocks that are run to score (N_b of the paper): the highest tap."""
        return self.taps[-1]

    @property
    def is_untrained(self) -> bool:
        """True as long as the heads have the random weights that ``Judge.untrained`` gave them."""
        return self._random is not None and self._random == versions(member.head for member in self.members)

    @property
    def head(self) -> QueryHead:
        """The only head of this judge, to be trained. Raises PrismError for an average."""
        if len(self.members) > 1:
            raise PrismError(f"This judge averages {len(self.members)} heads; train each of them apart.")
        return self.members[0].head

    @torch.no_grad()
    def score(self, noisy_latents: Tensor, prompts: Prompts, t: float | Tensor, **call: Any) -> Tensor:
        """Scores of latents that are already at noise level t.

        Args:
            noisy_latents: (B, ...) as the denoiser gets them, in the layout of the sampling loop.
            prompts: one per row, or one for all; None where ``call`` gives prompt_embeds.
            t: scalar or (B,) in [0, 1000], 0 clean and 1000 noise.
            **call: further arguments of the pipeline's call (height, images, ...); conditioning is captured with them.

        Returns:
            (B, num_dimensions) float32, higher is better. Raises PrismError where a row has no finite score.
        """
        with self.backbone.held():
            scores = self.score_tokens(self._tokens(noisy_latents, prompts, t, call))
        return checks.finite(scores, "score", noisy_latents)

    @torch.no_grad()
    def score_clean(
        self,
        latents: Tensor,
        prompts: str | Sequence[str],
        t: float,
        num_draws: int = 2,
        generator: torch.Generator | None = None,
        **call: Any,
    ) -> tuple[Tensor, Tensor]:
        """Scores of finished latents, re-noised to level t (Eq. 1) with the same noise for every row.

        Shared noise makes candidates comparable: what it adds to all their scores cancels in the ranking.

        Args:
            latents: (B, ...) normalised latents of finished videos.
            prompts: one per row, or one for all.
            t: noise level in [0, 1000].
            num_draws: number of noise draws to average over.
            generator: CPU generator of the noise; None: seeded with 0.
            **call: further arguments of the pipeline's call.

        Returns:
            mean: (B, num_dimensions) float32, over draws.
            error: (B, num_dimensions) float32, its standard error; NaN for one draw.
        """
        num_draws = whole("num_draws", num_draws, 1, DRAWS)
        per_row(t, latents)  # refuses anything but latents
        checks.check_generator(generator)
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        latents, draws = latents.to(self.backbone.device), []
        with self.backbone.held(), self.backbone.freed():  # freed once, not after each draw
            for _ in range(num_draws):
                noise = torch.randn((1, *latents.shape[1:]), generator=generator).to(latents).expand_as(latents)
                draws.append(self.score(self.backbone.add_noise(latents, t, noise), prompts, t, **call))
        scores = torch.stack(draws)
        error = scores.std(0) / num_draws**0.5 if num_draws > 1 else torch.full_like(scores[0], torch.nan)
        return scores.mean(0), error

    score_video, gains = scoring.score_video, trajectory.gains

    @torch.no_grad()
    def score_tokens(self, tokens: Tokens) -> Tensor:
        """Scores of tokens that were tapped at ``self.taps``. Each tap is read once for all its heads.

        Returns:
            (B, num_dimensions), in the dtype of the weights.
        """
        return self.combined(scores_of(self.members, tokens))

    def combined(self, scores: Tensor) -> Tensor:
        """The judge's scores, from those of its members.

        Args:
            scores: (members, B, D), a column for each of the D dimensions of a head.

        Returns:
            (B, num_dimensions).
        """
        shares = torch.tensor([member.share for member in self.members], device=scores.device)
        return scores[0] if len(scores) == 1 else torch.einsum("m,mbd->bd", shares.to(scores), scores)

    def probabilities(self, margins: Tensor) -> Tensor:
        """Probabilities of A preferred, tie and B preferred (Eq. 3-4).

        Those of a calibrated judge agree with observed frequencies; without calibration they are mostly overconfident.

        Args:
            margins: (..., num_dimensions) scores of A minus scores of B at one noise level.

        Returns:
            (..., num_dimensions, 3) A preferred, tie, B preferred.
        """
        margins = checks.margins_of(margins, self.dimensions)
        columns = []
        for column, name in enumerate(self.dimensions):
            fitted = self.calibration.get(name, {"temperature": 1.0, "eta": self.eta})
            columns.append(log_probabilities(margins[..., column] / fitted["temperature"], fitted["eta"]).exp())
        return torch.stack(columns, -2)

    @torch.no_grad()
    def attention(self, noisy_latents: Tensor, prompts: Prompts, t: float | Tensor, **call: Any) -> Tensor:
        """Attention of the query on the token grid, averaged over attention heads and members.

        Arguments as of ``score``.

        Returns:
            (B, T, H, W) float32; together with the weights of the prompt's tokens it sums to one.
        """
        with self.backbone.held():
            tokens = self._tokens(noisy_latents, prompts, t, call)
        text, count = (tokens.text, tokens.text_mask), tokens.visual.shape[1]
        maps = [each.head.attention(tokens.after(each.tap), *text)[..., :count].mean(1) for each in self.members]
        return checks.finite(torch.stack(maps).mean(0), "attention", noisy_latents).view(-1, *tokens.grid)

    def _tokens(self, noisy_latents: Tensor, prompts: Prompts, t: float | Tensor, call: dict[str, Any]) -> Tokens:
        rows = len(per_row(t, noisy_latents))
        single = prompts is None or isinstance(prompts, str)  # None: `call` gives embeddings
        listed = texts(prompts) * (rows if single else 1)
        if len(listed) != rows:
            raise PrismError(f"Each row of the latents needs its prompt, found {len(listed)} prompts for {rows} rows.")
        self.check_level(t)
        conditioning = self.backbone.condition([text or "" for text in listed], **call)
        return self.backbone.tokens(noisy_latents, conditioning, t, self.taps)

    def check_level(self, t: float | Tensor) -> None:
        """Warn, once, that the heads were not trained, or not at these noise levels. Arguments as of ``score``."""
        if not self._warned and self.is_untrained:
            self._warned = warn_untrained()
        if not self._warned:
            levels = torch.as_tensor(t, dtype=torch.float32)
            self._warned = warn_outside(self.trained_on, float(levels.min()), float(levels.max()))


def _backbone(pipe: Any, reads: str | None = None) -> Backbone:
    """A pipeline as a backbone; `reads`: the denoiser that a saved head was trained on, where a pipeline has two."""
    return pipe if isinstance(pipe, Backbone) else Backbone(pipe, reads)
