"""Shared by all tests.  Sets nothing: TRITON_INTERPRET and TILEWRIGHT_CPU_ISA come from outside."""

import os
import random

import pytest
import torch
from hypothesis import settings

# The same draws every time; `make test-full` draws more; fewer of them are interpreted: one takes seconds.
SOME, MORE = (12, 60) if os.environ.get("TRITON_INTERPRET") == "1" else (25, 400)
settings.register_profile("default", max_examples=SOME, deadline=None, derandomize=True)
settings.register_profile("full", max_examples=MORE, deadline=None, derandomize=True)
settings.load_profile("default")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "triton: launches Triton kernels, on a GPU or interpreted")
    config.addinivalue_line("markers", "interpreted: of Triton's interpreter, wherever it runs")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of the interpreter, and without a GPU those of Triton launchers, belong to the pass under
    TRITON_INTERPRET=1, which runs every one of them; the others deselect them, and say how many.  Of float16
    it runs those under the profile full alone (make test-full): a kernel has bfloat16's path for it.

    Under TILEWRIGHT_SHUFFLE=1 they come in another order, the same each time: what kills a mutant is
    met sooner among all tests than at its place in its file.
    """
    if os.environ.get("TILEWRIGHT_SHUFFLE") == "1":
        random.Random(0).shuffle(items)
    if os.environ.get("TRITON_INTERPRET") == "1":
        is_full = config.getoption("--hypothesis-profile", None) == "full"
        elsewhere = [] if is_full else [item for item in items if _is_of_float16(item)]
    else:
        markers = {"interpreted"} if torch.cuda.is_available() else {"interpreted", "triton"}
        elsewhere = [i for i in items if markers & {mark.name for mark in i.iter_markers()}]
    if elsewhere:
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if item not in set(elsewhere)]


def _is_of_float16(item: pytest.Item) -> bool:
    spec = getattr(item, "callspec", None)
    return spec is not None and spec.params.get("dtype") == torch.float16


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The calls of ops.attention."""
    from tilewright import ops

    calls = []
    attention = ops.attention

    def counting(*args, **kwargs):
        calls.append(args)
        return attention(*args, **kwargs)

    monkeypatch.setattr(ops, "attention", counting)
    return calls
