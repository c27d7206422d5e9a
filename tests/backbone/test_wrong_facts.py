"""Facts that are wrong: of another kind or out of range, or not true of the pipeline; each is said."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from tests import tiny
from tests.works import works
from tests.zoo.bare import bare
from tests.zoo.own import own

import prism
from prism.backbone import FAMILIES, Backbone, Family, OwnClock
from prism.backbone.family import FORMER_NAMES
from prism.commands import checks
from prism.commands.subject import Subject
from prism.errors import PrismError
from prism.judge import Judge

ROW = replace(FAMILIES["wan"], name="own", pipelines=("OwnPipeline",))
FOREIGN: tuple[Any, ...] = (5.5, -1, 0, object(), ["x", 5], {"x": None}, ("x", 5), float("nan"), b"x", "nothing", True)


@works(
    "Families of one's own", "a fact of another kind or out of its range", "refused", "It and what it takes are named."
)
def test_every_fact_is_checked_when_the_row_is_made() -> None:
    for fact in fields(Family):
        told = [_refusal({fact.name: value}) for value in FOREIGN]
        assert all(fact.name in sentence for sentence in told if sentence)
        assert sum(map(bool, told)) >= len(FOREIGN) - 3, fact.name  # a text, number or truth value may be what it takes


def _refusal(changes: dict[str, Any]) -> str:
    try:
        replace(ROW, **changes)
    except PrismError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"blocks": "blocks"}, r"blocks of the family 'own' must be a tuple of texts, as \('one',\); found 'blocks'"),
        ({"blocks": ("blocks", "blocks")}, "names 'blocks' twice"),
        ({"blocks": ()}, "blocks of the family 'own' must not be empty"),
        ({"cfg": "two"}, "cfg of the family 'own' must be 'two_calls' or 'one_batch'; found 'two'"),
        ({"clock": "ddim"}, "clock of the family 'own' must be 'flow' or .* or an OwnClock; found 'ddim'"),
        ({"patch": (1, 2)}, "patch of the family 'own' must be 3 whole numbers or None"),
        ({"patch": (0, 2, 2)}, "patch of the family 'own' must be a whole number of at least 1; found 0"),
        ({"tap": 12}, "must be a share of the blocks, above 0, at most 1; found 12"),
        ({"pure_noise_timestep": 0}, "pure_noise_timestep of the family 'own' must be a number above 0"),
        ({"dropped_frames_by_condition": {None: 1}}, "must be a dict of texts to whole numbers"),
        ({"batched_arguments": frozenset()}, "batched_arguments of the family 'own' must not be empty"),
    ],
)
def test_the_sentence_says_what_a_fact_takes(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PrismError, match=sentence):
        replace(ROW, **changes)


def test_former_names_of_facts_are_taken_with_a_warning_that_names_the_new_ones() -> None:
    told = "vae_told of a Family is called decode_num_frames now; the old name goes in the next version"
    with pytest.warns(FutureWarning, match=told):
        row = Family(name="x", models="X", pipelines=("P",), blocks=("b",), cfg="one_batch", vae_told=len)  # type: ignore[call-arg]
    assert row.decode_num_frames is len
    with pytest.warns(FutureWarning) as seen:
        row = replace(FAMILIES["latte"], alone=False, beside=["other"])  # type: ignore[call-arg]
    assert (row.batch_size_one, row.parallel_blocks, len(seen)) == (False, ("other",), 2)
    with (
        pytest.warns(FutureWarning),
        pytest.raises(PrismError, match="batch_size_one of the family 'latte' must be True"),
    ):
        replace(FAMILIES["latte"], alone=5)  # type: ignore[call-arg]
    names = {fact.name for fact in fields(Family)}
    assert set(FORMER_NAMES.values()) <= names
    assert not names & set(FORMER_NAMES)


def test_lists_are_taken_for_tuples_and_sets_and_a_clock_has_functions() -> None:
    row = replace(ROW, blocks=["blocks"], batched_arguments=["hidden_states", "timestep"])  # type: ignore[arg-type]
    assert (row.blocks, row.batched_arguments) == (("blocks",), frozenset({"hidden_states", "timestep"}))
    with pytest.raises(PrismError, match="level of an OwnClock must be a function; found 5"):
        OwnClock(5, 6)  # type: ignore[arg-type]
    clock = OwnClock(lambda scheduler, t: (t, t), lambda scheduler, step: step)  # type: ignore[arg-type,return-value]
    pipe, call = own()
    pipe.family = replace(ROW, clock=clock)
    backbone = Backbone(pipe)
    told = backbone.condition([tiny.PROMPT], **call)
    with pytest.raises(
        PrismError, match=r"must give alpha, sigma and the model timestep, three tensors .*; found \(1,\)"
    ):
        backbone.tokens(prism.best_of_n(pipe, None, tiny.PROMPT, n=1, strategy="none", **call).latents, told, 500.0, 1)


@works(
    "Families of one's own",
    "a fact that is not true of the pipeline: names of modules and arguments, widths, the form of what is given",
    "refused",
    "The sentence names the fact.",
)
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"blocks": ("layers",)}, "has no blocks 'layers', which the family 'own' names; its lists are blocks"),
        ({"parallel_blocks": ("nope",)}, "has no parallel_blocks 'nope'"),
        ({"text_embedder": "nope"}, "has no text_embedder 'nope'"),
        ({"text_embedder": "blocks"}, "text_embedder of the family 'own', was not called before block 1"),
        ({"text_embedder": "condition_embedder"}, "gives tuple; one that gives the text's tokens"),
        (
            {"text_embedder": "condition_embedder.time_embedder"},
            r"gives a tensor \(2, 24\); one that gives the text's",
        ),
        ({"text_padding": "mask"}, "not with the family's text_mask_argument, 'encoder_attention_mask'"),
        ({"trailing_blocks_field": "num_layers"}, "configuration of OwnTransformer has as 3; a number of its 3 blocks"),
        ({"token_form": "frames"}, "look at token_form of the family 'own'"),
        ({"guidance": "guider"}, "OwnPipeline has no guider"),
        ({"vae_factor": "scaling_factor"}, "The configuration of the vae has no scaling_factor"),
        ({"takes_prompts": False}, "needs a prompt; say takes_prompts=True"),
        ({"widths": 5}, "Block 1 gives tokens 24 wide, and widths of the family 'own' says 5"),
        ({"latents_argument": ("x",)}, "none of which is the family's latents_argument, x"),
        ({"timestep_argument": "t"}, "not with the family's timestep_argument, 't'"),
        ({"text_argument": "words"}, "not with the family's text_argument, 'words'"),
        ({"batched_arguments": frozenset({"timestep"})}, "name it in batched_arguments of the family 'own'"),
        ({"returns_tensor": True}, "gives no plain tensor; say returns_tensor=False"),
        ({"counts_steps_by_calls": True}, "look at counts_steps_by_calls"),
        ({"after_loop": "encode"}, "after_loop of the family 'own', does not take latents"),
        ({"tokens_before": lambda arguments: arguments["nope"], "patch": (1, 1, 1)}, "counts tokens gives no number"),
    ],
)
def test_a_search_says_what_is_not_so(changes: dict[str, Any], sentence: str) -> None:
    pipe, call = own()
    pipe.family = replace(ROW, **changes)
    with pytest.raises(PrismError, match=sentence) as said:
        prism.best_of_n(pipe, Judge.untrained(pipe, dim=16), tiny.PROMPT, n=2, schedule=[(2, 1)], **call)
    assert len(str(said.value)) < 500


def test_a_plain_tensor_is_said() -> None:
    """A replayed recording was given as an output with `.sample`, on which the pipeline broke in its own lines."""
    pipe, call = bare()
    pipe.family = replace(pipe.family, returns_tensor=False)
    with pytest.raises(PrismError, match="Net gives a plain tensor; say returns_tensor=True in the family 'bare'"):
        prism.best_of_n(pipe, Judge.untrained(pipe, dim=16), tiny.PROMPT, n=2, schedule=[(2, 1)], **call)


def test_an_argument_with_rows_that_is_not_named_is() -> None:
    pipe, call = own()
    pipe.family = replace(ROW, batched_arguments=frozenset({"hidden_states"}))
    with pytest.raises(
        PrismError, match=r"row per sample in encoder_hidden_states, timestep: name these in batched_arguments"
    ):
        prism.best_of_n(
            pipe, Judge.untrained(pipe, dim=16), tiny.PROMPT, n=3, batch_size=3, schedule=[(1, 2), (2, 1)], **call
        )


@pytest.mark.parametrize(
    ("changes", "check", "fact"),
    [
        ({"clock": "ddpm"}, "noise levels", "Look at clock"),
        ({"pure_noise_timestep": 1.0}, "noise levels", "pure_noise_timestep"),
        ({"first_frame_pipelines": ("OwnPipeline",)}, "inside and outside", "first_frame_pipelines"),
        ({"guidance": "strength"}, "conditional rows", "guidance"),
        ({"decoded_layout": "BTCHW"}, "latents and videos", "decoded_layout"),
    ],
)
def test_doctor_names_the_fact(changes: dict[str, Any], check: str, fact: str) -> None:
    pipe, call = own()
    pipe.family = replace(ROW, **changes)
    subject = Subject(Backbone(pipe), call, (tiny.PROMPT, tiny.OTHER_PROMPT))
    with pytest.raises(PrismError, match=fact):
        checks.CHECKS[check](subject)
