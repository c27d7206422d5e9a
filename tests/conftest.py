"""No network and one thread per test process: several may share a small machine, and results do not depend on it."""

from __future__ import annotations

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Generator
from typing import Any

import pytest
import torch
from tests import shapes

torch.set_num_threads(1)
gc.disable()  # while modules are imported, see pytest_collection

# A warning that no test expects is an error. Those named here are meant, and are not of the test.
EXCEPTIONS = (
    # PRISM's own: most tests build a head with random weights, sample in few steps, and train on few prompts
    "ignore:This judge is untrained:UserWarning",
    'ignore:The strategy "(fk|evolution)" takes:UserWarning',
    "ignore:The first cut comes at step 1 of [1-6], which sees pure noise:UserWarning",
    "ignore:\\d+ training prompts?. too few to learn from:UserWarning",
    # PEFT's, of a second adapter and of one that is not merged
    "ignore:Already found a `peft_config` attribute in the model:UserWarning",
    "ignore:Already unmerged. Nothing to do:UserWarning",
    # Transformers', of its own attribute that PEFT reads
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    # NumPy's, of PIL's images in diffusers
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
    "ignore:__array_wrap__ must accept context and return_scalar arguments:DeprecationWarning",
    # PyTorch's, of layer norms of another dtype and of layers that autocast leaves in float32
    "ignore:Mismatch dtype between input and weight:UserWarning",
    "ignore:In CPU autocast, but the target dtype is not supported:UserWarning",
    # PyTorch's, of dynamic quantisation and TorchScript, of attention that is not compiled, and of compilation
    "ignore:torch.ao.quantization is deprecated:DeprecationWarning",
    "ignore:torch.quantize_per_tensor, torch.quantize_per_channel and other quantized tensor:UserWarning",
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
    "ignore:flex_attention called without torch.compile:UserWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being accessed:UserWarning",
    # diffusers', of its own argument in earlier versions, and of a picture that it hands on
    "ignore:`torch_dtype` is deprecated:FutureWarning",
    "ignore:The given NumPy array is not writable:UserWarning",
    # pyparsing's, of names that early versions of matplotlib use
    "ignore:'[a-zA-Z]+' deprecated - use '[a-z_]+':DeprecationWarning",
    # Python's, of files that nobody closed: it comes where garbage is collected, in whichever test that is
    "ignore::ResourceWarning",
)


# Files of half a minute. They come first, so that at the end no process is busy with one while the others wait.
LONG = {
    "test_matrix.py",
    "test_real_weights.py",
    "test_ray.py",
    "test_train_processes.py",
    "test_demo.py",
    "test_processes.py",
    "test_collect.py",
    "test_adapted.py",
    "test_real_memory.py",
    "test_imports.py",
    "test_runs.py",
    "test_values.py",
    "test_exactness.py",
    "test_replay.py",
    "test_page_browser.py",
    "test_lookahead.py",
    "test_way_out.py",
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """A worker more than there are cores, as tests with Ray and with processes of their own mostly wait for these."""
    return 1 + (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """What was imported stays: the garbage collector need not look through it again and again."""
    found = yield
    gc.freeze()
    gc.enable()
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("error", *EXCEPTIONS), append=False)  # a test's own marks win


@pytest.fixture(scope="session", autouse=True)
def shapes_hold():
    """Each call of the judge and the preferences is checked against the shapes that their docstrings state."""
    with shapes.checked("prism.judge", "prism.preference"):
        yield


@pytest.fixture
def intervals_of_few(monkeypatch):
    """Plain percentile intervals of any number of prompts, for figures that are worked out by hand."""
    monkeypatch.setattr("prism.evaluation.intervals.FEWEST_PROMPTS", 1)
    monkeypatch.setattr("prism.evaluation.intervals.MANY_PROMPTS", 1)


@pytest.fixture
def families_put_back():
    """Whatever a test registers is gone afterwards."""
    from prism.backbone import FAMILIES, registry

    tables = (FAMILIES, registry._rows, registry._classes)
    before = [dict(table) for table in tables]
    registry._register_entry_points.cache_clear()
    yield
    registry._register_entry_points.cache_clear()
    for table, old in zip(tables, before):
        table.clear()
        table.update(old)
