"""Precision, compilation, quantisation, adapters, finetunes: the result stays the stock pipeline's, to the bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tests import tiny
from tests.machinery import CALL, FAMILIES, RUNS, STEP, assert_exact, assert_tokens, blocks, heard, seeded, stock
from tests.works import works
from torch._dynamo.utils import counters

import prism
from prism.backbone import Backbone
from prism.errors import PrismError
from prism.sampling import expected_rows


def layerwise(pipe: Any) -> None:
    pipe.to(torch.bfloat16)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)


def dynamic_int8(pipe: Any) -> None:
    for block in blocks(pipe):  # of Wan's other layers some are asked for their dtype
        torch.ao.quantization.quantize_dynamic(block, {torch.nn.Linear}, inplace=True)


def torchao_int8(pipe: Any) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(pipe.transformer, quantization.Int8WeightOnlyConfig())


def adapter(pipe: Any, part: str = "transformer") -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(7)
    targets = ["to_q", "to_v"] if part == "transformer" else ["q", "v"]
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    module = getattr(pipe, part)
    module.add_adapter(config)
    return module


QUANTISED: dict[str, Callable[[Any], Any]] = {
    "fp8 layerwise casting": layerwise,
    "dynamic int8": dynamic_int8,
    "torchao int8": torchao_int8,
}
ADAPTED: dict[str, Callable[[Any], Any]] = {
    "adapter active": adapter,
    "adapter disabled": lambda pipe: adapter(pipe).disable_adapters(),
    "adapter fused": lambda pipe: adapter(pipe).fuse_lora(0.5),
    "text adapter active": lambda pipe: adapter(pipe, "text_encoder"),
}
PRECISIONS: dict[str, Callable[[Any], Any]] = {
    "bfloat16": lambda pipe: pipe.to(torch.bfloat16),
    "float16": lambda pipe: pipe.to(torch.float16),
}
TREATMENTS = {**PRECISIONS, **QUANTISED, **ADAPTED}


@works(
    "Precision and quantisation",
    "bfloat16, float16, float8 layerwise casting, int8 weights, LoRA adapters (active, disabled, fused)",
    "exact",
    "The winner is that pipeline's own stock call, and the judge reads its own tokens.",
)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("treatment", TREATMENTS)
def test_the_stock_result_and_the_stock_tokens(treatment: str, family: str) -> None:
    pipe = FAMILIES[family]()
    before = stock(pipe, 5)
    TREATMENTS[treatment](pipe)
    assert torch.equal(stock(pipe, 5).float(), before) is (treatment == "adapter disabled")  # it tells
    assert_exact(pipe, runs=RUNS if family == "wan" else ["early"])
    assert_tokens(pipe)


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_a_judge_put_on_before_goes_on(treatment: str) -> None:
    """Its scores become those of a judge put on afterwards: nothing that was known of the old weights is used."""
    pipe, latents = tiny.wan("unipc"), torch.randn(2, 16, 3, 4, 4, generator=seeded(3))
    judge = prism.Judge.untrained(pipe, tap=2, dim=16)
    old = judge.score(latents, tiny.PROMPT, 700, **CALL)
    TREATMENTS[treatment](pipe)
    new = judge.score(latents, tiny.PROMPT, 700, **CALL)
    assert torch.equal(new, prism.Judge.untrained(pipe, tap=2, dim=16).score(latents, tiny.PROMPT, 700, **CALL))
    assert torch.equal(new, old) is (treatment == "adapter disabled")


@works(
    "Precision and quantisation",
    "A head on other weights than it was trained on",
    "warned",
    "It loads, and a sentence says that the weights differ.",
)
@pytest.mark.parametrize("treatment", [name for name in TREATMENTS if not name.startswith("text")])
def test_the_fingerprint_tells_other_weights_and_a_head_warns(treatment: str, tmp_path: Any) -> None:
    pipe = tiny.wan()
    plain = Backbone(pipe)
    prism.Judge.untrained(plain, tap=2, dim=16).save_pretrained(tmp_path / "head")
    TREATMENTS[treatment](pipe)
    treated = Backbone(pipe)
    assert treated.num_parameters >= plain.num_parameters
    if treatment in QUANTISED:
        assert treated.num_parameters == plain.num_parameters
    print_ = treated.fingerprint()
    assert {name for name in print_ if print_[name] != plain.fingerprint()[name]} <= {"weights"}
    assert print_ == Backbone(pipe).fingerprint()
    with pytest.warns(UserWarning, match="other weights of this architecture"):
        prism.Judge.from_pretrained(tmp_path / "head", tiny.wan(seed=1))
    with pytest.warns(UserWarning, match="other weights of this architecture"):
        judge = prism.Judge.from_pretrained(tmp_path / "head", treated)
    assert_exact(pipe, judge, ["early"])


@pytest.mark.parametrize("treatment", QUANTISED)
def test_quantised_weights_are_part_of_the_fingerprint(treatment: str) -> None:
    """Two quantised copies whose linear layers alone differ are told apart."""
    found = []
    for change in (0.0, 1.0):
        pipe = tiny.wan()
        with torch.no_grad():
            pipe.transformer.blocks[2].ffn.net[2].weight[0] += change
        QUANTISED[treatment](pipe)
        found.append(Backbone(pipe).fingerprint()["weights"])
    assert found[0] != found[1]


# -- precision


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_wan_with_a_part_in_another_dtype(part: str) -> None:
    pipe = tiny.wan("unipc")
    getattr(pipe, part).to(torch.bfloat16)
    assert_exact(pipe)
    assert_tokens(pipe)


@works(
    "Precision and quantisation",
    "Parts in dtypes that do not fit together",
    "refused",
    "The stock call fails as well; the sentence names the parts.",
)
@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_parts_that_do_not_fit_are_named(part: str) -> None:
    """CogVideoX casts nothing: the stock call fails as well, in words that name no part."""
    pipe = tiny.cogvideox()
    judge = prism.Judge.untrained(pipe, tap=2, dim=16)
    getattr(pipe, part).to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"):
        stock(pipe, 0)
    with pytest.raises(PrismError, match=rf"do not fit together \(.*{part} cpu bfloat16.*dtype"):
        prism.best_of_n(pipe, judge, tiny.PROMPT, n=2, **CALL)
    with pytest.raises(PrismError, match=f"do not fit together .*{part} cpu bfloat16"):
        judge.score(torch.zeros(1, 3, 4, 4, 4), tiny.PROMPT, 500, **CALL)


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_parts_on_several_devices_are_named(part: str) -> None:
    pipe = tiny.wan()
    judge = prism.Judge.untrained(pipe, tap=2, dim=16)
    getattr(pipe, part).to("meta")
    with pytest.raises(PrismError, match=f"do not fit together .*{part} meta float32"):
        prism.best_of_n(pipe, judge, tiny.PROMPT, n=2, **CALL)


def test_latents_of_another_dtype_are_read_in_the_denoisers() -> None:
    pipe = tiny.wan().to(torch.bfloat16)
    judge, latents = prism.Judge.untrained(pipe, tap=2, dim=16), torch.randn(2, 16, 3, 4, 4, generator=seeded(0))
    scores = [
        judge.score(latents.bfloat16().to(dtype), tiny.PROMPT, 700, **CALL)
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
    ]
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])
    assert scores[0].dtype == torch.float32


# -- compilation


@pytest.fixture
def compiler() -> Iterator[Callable[..., Any]]:
    """A backend whose code gives slightly other numbers than eager code, as real ones do: what ran shows."""
    torch._dynamo.reset()
    counters.clear()

    def backend(graph: Any, _inputs: Any) -> Callable[..., Any]:
        return lambda *a: tuple(x * 1.001 if torch.is_tensor(x) and x.is_floating_point() else x for x in graph(*a))

    yield backend
    torch._dynamo.reset()


def whole(pipe: Any, backend: Any) -> None:
    pipe.transformer.compile(backend=backend)


def wrapped(pipe: Any, backend: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend=backend)


def forward_alone(pipe: Any, backend: Any) -> None:
    pipe.transformer.forward = torch.compile(pipe.transformer.forward, backend=backend)


WHOLE = {"compile()": whole, "torch.compile": wrapped, "forward": forward_alone}


SHALLOW: dict[str, Callable[[], Any]] = {
    "wan": lambda: tiny.wan("unipc", num_layers=2),
    "cogvideox": lambda: tiny.cogvideox("dpm", num_layers=2),
}


@works(
    "Compilation",
    "`torch.compile(pipe.transformer)`, `compile()`, a compiled `forward`",
    "exact",
    "The winner is the compiled call's; a cut is read by a short uncompiled pass.",
)
@pytest.mark.parametrize(
    ("how", "family", "first"),
    [
        ("compile()", "wan", True),
        ("compile()", "cogvideox", False),
        ("torch.compile", "wan", False),
        ("torch.compile", "cogvideox", True),
        ("forward", "wan", True),
    ],
)
def test_compiled_as_a_whole(how: str, family: str, first: bool, compiler: Any) -> None:
    """Before a judge is put onto it, or after: the winner is the compiled stock call's, and the judge reads what the
    same weights give uncompiled.
    """
    pipe, plain = SHALLOW[family](), SHALLOW[family]()
    if first:
        WHOLE[how](pipe, compiler)
    judge, twin = prism.Judge.untrained(pipe, tap=2, dim=16), prism.Judge.untrained(plain, tap=2, dim=16)
    if not first:
        WHOLE[how](pipe, compiler)
    assert not torch.equal(stock(pipe, 5), stock(plain, 5))
    assert judge.backbone.fingerprint() == twin.backbone.fingerprint()
    assert_exact(pipe, judge)
    after: list[Any] = []

    def keep(_pipe: Any, _step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        after.append((tensors["latents"].clone(), float(timestep)))
        return tensors

    arguments = {"n": 3, "seed": 5, "schedule": [(STEP, 1)], "batch_size": 1}
    result = prism.best_of_n(pipe, judge, tiny.PROMPT, **arguments, **CALL)
    scores = torch.tensor([result.scores[0]["scores"][name] for name in judge.dimensions]).T
    for candidate, found in enumerate(scores):
        after.clear()
        stock(pipe, 5 + candidate, callback_on_step_end=keep)
        expected = twin.score(after[STEP - 2][0], tiny.PROMPT, after[STEP - 1][1], **CALL)
        torch.testing.assert_close(found, expected[0], atol=1e-5, rtol=1e-5)
    # read after the last block, where listening would be cheaper
    cfg = judge.backbone.family.cfg
    rows = expected_rows("early", 3, 5, cfg, True, 1.0, ((STEP, 1),), listens=False)
    assert result.ledger.denoiser_rows == pytest.approx(rows)
    assert rows > expected_rows("early", 3, 5, cfg, True, 1.0, ((STEP, 1),)) or cfg == "one_batch"


@works(
    "Compilation",
    "Compiled text encoder or VAE",
    "exact",
    "What is put around them for a run comes off again.",
)
def test_other_parts_compiled(compiler: Any) -> None:
    """Text encoder and VAE: what is put around them for a run comes off again."""
    pipe = tiny.wan("unipc")
    pipe.text_encoder = torch.compile(pipe.text_encoder, backend="eager")
    pipe.vae = torch.compile(pipe.vae, backend="eager")
    parts = [pipe.text_encoder, pipe.text_encoder._orig_mod, pipe.vae, pipe.vae._orig_mod]
    result = prism.best_of_n(
        pipe,
        prism.Judge.untrained(pipe, tap=2, dim=16),
        tiny.PROMPT,
        n=2,
        batch_size=1,
        **{**CALL, "output_type": "np"},
    )
    assert (result.ledger.text_encodings, result.ledger.vae_decodes) == (2, 1)
    assert not any(vars(part).keys() & {"_compiled_call_impl", "decode", "encode"} for part in parts)
    assert (result.video == stock(pipe, result.seed, output_type="np")[0]).all()


@works(
    "Compilation",
    "`compile_repeated_blocks()`",
    "exact",
    "Compiled blocks are listened to, and not compiled anew for it.",
)
def test_compiled_blocks_are_heard(compiler: Any) -> None:
    """Their own compiled states, without compiling them anew for a tap."""
    pipe = SHALLOW["wan"]()
    judge, plain = prism.Judge.untrained(pipe, tap=2, dim=16), stock(pipe, 5)
    pipe.transformer.compile_repeated_blocks(backend=compiler)
    assert not torch.equal(stock(pipe, 5), plain)
    counters.clear()
    assert_exact(pipe, judge)
    assert not counters["frames"]
    assert_tokens(pipe, 1)
    result = prism.best_of_n(pipe, judge, tiny.PROMPT, n=2, schedule=[(STEP, 1)], batch_size=1, **CALL)
    assert result.ledger.denoiser_rows == expected_rows("early", 2, 5, "two_calls", True, 1.0, ((STEP, 1),))
    for candidate, found in enumerate(result.scores[0]["scores"]["overall"]):
        arguments, states = heard(pipe, 2, seed=candidate)[2 * (STEP - 1)]
        tokens = judge.backbone.read(arguments, 2, stop=False)[0]
        assert torch.equal(tokens.visual, states)
        assert found == pytest.approx(float(judge.score_tokens(tokens)[0, 3]), abs=1e-6)


def graphs(pipe: Any, **arguments: Any) -> int:
    """How many graphs a run compiles."""
    counters.clear()
    prism.best_of_n(pipe, prism.Judge.untrained(pipe, tap=1, dim=16), tiny.PROMPT, **{**CALL, **arguments})
    return int(counters["stats"].get("unique_graphs", 0))


@pytest.mark.parametrize(("family", "batch_size", "expected"), [("wan", 3, 2), ("cogvideox", 1, 1)])
def test_what_a_cut_recompiles(family: str, batch_size: int, expected: int, compiler: Any) -> None:
    """One graph a batch size that the denoiser runs at (3 candidates and 1), none for the probes."""
    pipe, arguments = SHALLOW[family](), {"n": 3, "schedule": [(2, 1)], "batch_size": batch_size}
    whole(pipe, compiler)
    assert graphs(pipe, **arguments) == expected
    assert graphs(pipe, **arguments) == 0
    counters.clear()
    stock(pipe, 0)
    assert counters["stats"].get("unique_graphs", 0) == 0


# -- adapters and text


def fuse_text(pipe: Any) -> None:
    for module in pipe.text_encoder.modules():
        if hasattr(module, "merge"):
            module.merge()


def scale_text(pipe: Any) -> None:
    for module in pipe.text_encoder.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)


def load_text(pipe: Any) -> None:
    pipe.text_encoder.load_state_dict(tiny.wan(seed=1).text_encoder.state_dict())


def nudge_text(pipe: Any) -> None:
    for value in pipe.text_encoder.parameters():
        value.data.mul_(1.5)  # past the tensor's version counter


CHANGES: dict[str, tuple[bool, Callable[[Any], Any]]] = {  # whether an adapter is there before
    "adapter added": (False, lambda pipe: adapter(pipe, "text_encoder")),
    "adapter disabled": (True, lambda pipe: pipe.text_encoder.disable_adapters()),
    "adapter fused": (True, fuse_text),
    "adapter scaled": (True, scale_text),
    "weights loaded": (False, load_text),
    "weights changed in place": (False, nudge_text),
    "encoder replaced": (False, lambda pipe: setattr(pipe, "text_encoder", tiny.wan(seed=1).text_encoder)),
    "scheduler replaced": (False, lambda pipe: setattr(pipe, "scheduler", FlowMatchEulerDiscreteScheduler(shift=3.0))),
}


@works(
    "Embeddings and encoders",
    "A text encoder whose weights or adapters change",
    "works",
    "What was kept of a prompt is forgotten.",
)
@pytest.mark.parametrize("name", CHANGES)
def test_no_stale_text(name: str) -> None:
    """What was captured of a prompt is forgotten where the parts it came from have changed."""
    adapted, change = CHANGES[name]
    pipe = tiny.wan("unipc")
    if adapted:
        adapter(pipe, "text_encoder")
    backbone = Backbone(pipe)
    old = backbone.condition([tiny.PROMPT], **CALL)
    assert backbone.condition([tiny.PROMPT], **CALL).arguments is not None
    change(pipe)
    new, fresh = backbone.condition([tiny.PROMPT], **CALL), Backbone(pipe).condition([tiny.PROMPT], **CALL)
    text = "encoder_hidden_states"
    assert torch.equal(new.arguments[text], fresh.arguments[text])
    assert new.timestep.dtype == fresh.timestep.dtype
    if name == "scheduler replaced":
        assert new.timestep.dtype != old.timestep.dtype
    elif name != "adapter fused":
        assert not torch.equal(new.arguments[text], old.arguments[text])


# -- finetuned and distilled copies


@works(
    "Schedulers and steps",
    "Distilled models of 1, 2 or 4 steps",
    "exact",
    "Cuts and drafts as far as there are steps for them.",
)
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_distilled_model_of_few_steps(family: str, steps: int, tmp_path: Any) -> None:
    pipe = FAMILIES[family]()
    prism.Judge.untrained(pipe, tap=2, dim=16).save_pretrained(tmp_path / "head")
    with torch.no_grad():
        for value in pipe.transformer.parameters():
            value.mul_(1.01)
    with pytest.warns(UserWarning, match="other weights of this architecture"):
        judge = prism.Judge.from_pretrained(tmp_path / "head", pipe)
    few = {"num_inference_steps": steps, "guidance_scale": 1.0}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A draft of")
        assert_exact(pipe, judge, ["draft"], {"draft_steps": steps}, **few)
    assert_exact(pipe, judge, ["early"], {"schedule": [(1, 1)]}, **few)
    assert_exact(pipe, judge, ["early"], {"schedule": None}, **few)
    assert_exact(pipe, judge, ["full"], **few)
    rows = prism.best_of_n(pipe, judge, tiny.PROMPT, n=3, schedule=[(1, 1)], **{**CALL, **few}).ledger.denoiser_rows
    assert rows == pytest.approx(3 * 2 / 3 + steps)
    with pytest.raises(PrismError, match=f"cuts at step 5, and the run has steps 1 to {steps}"):
        prism.best_of_n(pipe, judge, tiny.PROMPT, n=3, schedule=[(5, 1)], **{**CALL, **few})
    with pytest.warns(UserWarning, match=f"A draft of {steps} steps is as long as the run"):
        prism.best_of_n(pipe, judge, tiny.PROMPT, n=2, strategy="draft", draft_steps=steps, **{**CALL, **few})
