"""Two processes take the steps that one takes alone, in one folder, also where one of them is short of memory."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import forks, stores, tiny
from tests.works import works

from prism import files
from prism.cli import main
from prism.errors import PrismError
from prism.judge import Judge
from prism.judge.objective import label_counts, preference_loss
from prism.lab.pixel_training import PixelConfig, train_pixel
from prism.preference import LatentStore, write_store
from prism.team import Team
from prism.training import TrainConfig, learner, train, train_together, trainer
from prism.training.batches import Batches

CONFIG = TrainConfig(steps=3, prompts_per_step=2, learning_rate=1e-3, log_every=1, max_gradient_norm=0)
PIXEL = PixelConfig(
    steps=2, prompts_per_step=2, width=8, layers=1, dropout=0.0, noise_draws=1, validate_every=2, precision="float32"
)
COMMAND = "train --backbone {0}/pipe --data {0}/store --device cpu --dim 16 --tap 2 --steps 3 --prompts-per-step 2"


def unequal(folder: Path) -> LatentStore:
    """A prompt of many pairs and one of a single pair, which alone has labels of MQ."""
    many, count = 8, 10
    labels = {"prompt": [], "video_a": [], "video_b": [], "split": [], "VQ": [], "MQ": []}
    pairs = [(a, b) for a in range(many) for b in range(a + 1, many)] + [(8, 9)]
    for place, (a, b) in enumerate(pairs):
        row = (stores.PROMPTS[b == 9], f"v{a}", f"v{b}", "train", (1, -1, 0)[place % 3], 1 if b == 9 else None)
        for name, value in zip(labels, row):
            labels[name].append(value)
    videos = {
        "video": [f"v{i}" for i in range(count)],
        "prompt": [stores.PROMPTS[i >= many] for i in range(count)],
        "seed": list(range(count)),
        "split": ["train"] * count,
    }
    latents = torch.randn(count, *stores.SHAPE, generator=torch.Generator().manual_seed(0))
    schema = pa.table({**labels, "VQ": pa.array(labels["VQ"], pa.int8()), "MQ": pa.array(labels["MQ"], pa.int8())})
    with files.new_folder(folder) as temporary:
        write_store(temporary, pa.table(videos), latents, schema, {"call": tiny.CALL_WAN})
    return LatentStore.open(folder)


def judge_for(pipe: Any, **options: Any) -> Judge:
    return Judge.untrained(pipe, tap=2, dim=32, dimensions=("VQ", "MQ"), **options)


def trained(folder: Path, out: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and gradients of every kind of training, and their histories."""
    pipe, found, histories = tiny.wan(), {}, {}
    judge = judge_for(pipe)
    histories["train"] = train(folder / "unequal", judge, CONFIG, out / "run", progress=False)["history"]
    found |= {f"train/{name}": value.detach() for name, value in judge.head.named_parameters()}
    found |= {f"gradient/{name}": value.grad for name, value in judge.head.named_parameters()}
    kinds = judge_for(pipe)
    config = dataclasses.replace(CONFIG, prompts_per_step=5, gradient_accumulation_steps=2, source="predicted")
    histories["kinds"] = train(folder / "kinds", kinds, config, out / "kinds", progress=False)["history"]
    found |= {f"kinds/{name}": value.detach() for name, value in kinds.head.named_parameters()}
    backbone = judge.backbone
    judges = [judge_for(backbone, seed=seed) for seed in (1, 2)]
    configs = [CONFIG, dataclasses.replace(CONFIG, objective="bt")]
    histories["together"] = train_together(LatentStore.open(folder / "unequal"), judges, configs, progress=False)
    for place, each in enumerate(judges):
        found |= {f"together/{place}/{name}": value.detach() for name, value in each.head.named_parameters()}
    result = train_pixel(folder / "store", backbone, PIXEL, out / "pixel", noisy=True, progress=False)
    histories["pixel"] = result["history"]
    found |= load_file(out / "pixel" / "model.safetensors")
    return {name: value.clone().float() for name, value in found.items()}, histories


def short_of_memory(*arguments: Any) -> Any:
    """`learner.read` where no more than 3 videos fit into a denoiser call."""
    if arguments[3] > 3:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
    return learner.read(*arguments)


def work(folder: Path) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    weights, histories = trained(folder, folder / "two")
    rank = torch.distributed.get_rank()
    with pytest.MonkeyPatch.context() as patched, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if rank == 1:
            patched.setattr(trainer, "read", short_of_memory)
        short, _ = trained(folder, folder / "short")
    assert any("Memory ran out with" in str(each.message) for each in said) == (rank == 1)
    command = [*COMMAND.format(folder).split(), "--out", str(folder / "command")]
    codes = [main(command), main(command), main([*command, "--overwrite"])]  # done, refused, done again
    save_file(weights, folder / f"{rank}.safetensors")
    save_file(short, folder / f"short-{rank}.safetensors")
    files.write_json(folder / f"{rank}.json", {"histories": histories, "codes": codes})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline, stores, and what two processes left there."""
    folder = tmp_path_factory.mktemp("processes")
    tiny.wan().save_pretrained(folder / "pipe")
    unequal(folder / "unequal")
    stores.make(folder / "store")
    stores.make_kinds(folder / "kinds")
    both = forks.run(work, folder)
    assert [process.code for process in both] == [0, 0], "\n".join(process.err[-4000:] for process in both)
    assert [process.out.count("Head: ") for process in both] == [2, 0]
    return folder


@pytest.fixture(scope="module")
def alone(made: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return trained(made, made / "one")


@works(
    "Threads and processes",
    "Training under `torchrun` or `accelerate launch`",
    "to rounding",
    "The processes share the prompts of a step and take the step that one takes alone, however unequal their labels.",
)
def test_two_processes_train_as_one_does(made: Path, alone: Any) -> None:
    weights, histories = alone
    for rank in (0, 1):
        found = load_file(made / f"{rank}.safetensors")
        assert found.keys() == weights.keys()
        for name, value in weights.items():
            torch.testing.assert_close(
                found[name], value, atol=2e-5, rtol=2e-3, msg=lambda text, name=name: f"{name} {text}"
            )
        noted = json.loads((made / f"{rank}.json").read_text())["histories"]
        for name in ("train", "kinds", "pixel"):
            assert len(noted[name]) == len(histories[name])
            for ours, theirs in zip(noted[name], histories[name]):
                assert ours.keys() == theirs.keys()
                if "loss" in theirs:
                    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
                    for each in ("accuracy", "mean_reward", "min_reward", "max_reward", "grad_norm"):
                        assert ours[each] == pytest.approx(theirs[each], rel=1e-2, abs=1e-4)


@works(
    "Threads and processes",
    "One of several training processes runs out of memory",
    "to rounding",
    "It takes the same step in parts of half as many videos while the others wait.",
)
def test_one_process_short_of_memory_takes_the_step_in_parts(made: Path, alone: Any) -> None:
    for rank in (0, 1):
        found = load_file(made / f"short-{rank}.safetensors")
        for name, value in alone[0].items():
            torch.testing.assert_close(
                found[name], value, atol=2e-5, rtol=2e-3, msg=lambda text, name=name: f"{name} {text}"
            )


def test_the_command_checks_clears_and_writes_its_folder_once(made: Path) -> None:
    for rank in (0, 1):
        assert json.loads((made / f"{rank}.json").read_text())["codes"] == [0, 2, 0]
    names = {path.name for path in (made / "command").iterdir()}
    assert names == {"config.json", "history.json", "head", "metrics.json", "report.html"}


def killed(folder: Path) -> None:
    """What each of two processes does, of which one is killed at its fourth step."""
    torch.set_num_threads(1)
    draw, rank = Batches.draw, int(os.environ["RANK"])

    def die(self: Batches, step: int, places: Any) -> Any:
        if step == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return draw(self, step, places)

    Batches.draw = die  # type: ignore[method-assign]
    config = dataclasses.replace(CONFIG, steps=6, checkpoint_every=2)
    train(folder / "unequal", judge_for(tiny.wan()), config, folder / "killed", progress=False)


def test_where_a_process_is_killed_the_other_says_so_and_the_run_goes_on(made: Path) -> None:
    both = forks.run(killed, made, timeout=120)  # and nobody who ends both
    assert [process.code for process in both] == [1, -signal.SIGKILL], both[0].err[-3000:]
    assert "PrismError: Another process of this run ended while this one waited for it" in both[0].err
    assert [path.name for path in (made / "killed" / "checkpoints").iterdir()] == ["step-00000002"]
    config = dataclasses.replace(CONFIG, steps=6, checkpoint_every=2)
    train(made / "unequal", judge_for(tiny.wan()), config, made / "killed", resume=True, progress=False)
    alone = judge_for(tiny.wan())
    train(made / "unequal", alone, config, made / "never-killed", progress=False)
    resumed = load_file(made / "killed" / "head" / "model.safetensors")
    for name, value in load_file(made / "never-killed" / "head" / "model.safetensors").items():
        torch.testing.assert_close(resumed[name], value, atol=2e-5, rtol=2e-3)


def test_the_shares_of_a_loss_are_the_whole() -> None:
    """Oracle: the loss of the union of all pairs, under both objectives, with a dimension that one part lacks."""
    rng = np.random.default_rng(0)
    labels = torch.tensor(rng.choice([1.0, 0.0, -1.0], size=(29, 3)))
    labels[:28, 1] = torch.nan
    labels[3:9, 0] = torch.nan
    margins = torch.randn(29, 3, dtype=torch.float64, requires_grad=True)
    for objective in ("btt", "bt"):
        whole = preference_loss(margins, labels, objective=objective, smoothing=0.1)
        (expected,) = torch.autograd.grad(whole, margins)
        counts = sum(label_counts(part, objective) for part in (labels[:28], labels[28:]))
        shares = [
            preference_loss(margins[rows], labels[rows], 5.0, objective, 0.1, counts)
            for rows in (slice(0, 28), slice(28, 29))
        ]
        torch.testing.assert_close(sum(shares), whole)
        (found,) = torch.autograd.grad(sum(shares), margins)
        torch.testing.assert_close(found, expected)


def test_fewer_prompts_than_processes_are_refused(made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Team, "gathered", lambda device: Team(size=3))
    with pytest.raises(PrismError, match="prompts_per_step must be at least the number of processes, 3; found 2"):
        train(made / "unequal", judge_for(tiny.wan()), CONFIG, tmp_path / "run", progress=False)
