"""The direct entries `_C.<op>`: what they take, that they do as the ordinary way, what they leave."""

import importlib

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tilewright import _native, _op, ops


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def table() -> Tensor:
    return torch.rand(5, 4)


CASES = {  # op -> its arguments, positional for the entry and the public function alike
    "rms_norm": lambda: (leaf(3, 8), leaf(8)),
    "add_rms_norm": lambda: (leaf(3, 8), leaf(3, 8), leaf(8)),
    "swiglu": lambda: (leaf(3, 8), leaf(3, 8)),
    "geglu": lambda: (leaf(3, 8), leaf(3, 8)),
    "rope": lambda: (leaf(2, 3, 5, 8), table(), table()),
    "attention": lambda: (leaf(3, 4, 5, 8), leaf(3, 2, 6, 8), leaf(3, 2, 6, 8)),
}
TAILS = {  # what the entry takes after them
    "rms_norm": (1e-5, 0.0),
    "add_rms_norm": (1e-5, 0.0),
    "swiglu": (),
    "geglu": (True,),
    "rope": (None, False),
    "attention": (True, None),
}
OPS = pytest.mark.parametrize("op", list(CASES))


def enter(op: str, *inputs: Tensor | None) -> object:
    return getattr(_native.C, op)(*inputs, *TAILS[op])


def tensors(found: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


@OPS
def test_there_is_an_entry_where_the_extension_is(op):
    module = importlib.import_module(f"tilewright.ops.{op}")
    assert (module._direct is None) == (_native.C is None or _op.LOG_DISPATCH)


@OPS
def test_takes_plain_tensors(op):
    if _native.C is None:
        return
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = [x.detach().to(dtype) for x in CASES[op]()]
        assert enter(op, *inputs) is not None
        with torch.autocast("cpu", torch.bfloat16):
            # autocast casts attention's inputs: what it would change goes the ordinary way
            left = op == "attention" and dtype != torch.bfloat16
            assert (enter(op, *inputs) is None) == left
        with torch.inference_mode():
            assert enter(op, *inputs) is not None
    inputs = CASES[op]()
    assert all("CppFunction" in str(y.grad_fn) for y in tensors(enter(op, *inputs)))
    parameters = [torch.nn.Parameter(x.detach()) for x in inputs]
    assert all(y.requires_grad for y in tensors(enter(op, *parameters)))
    with torch.no_grad():
        assert not any(y.requires_grad for y in tensors(enter(op, *inputs)))


class Subclass(Tensor):
    pass


@OPS
def test_leaves_the_rest_to_the_ordinary_way(op):
    if _native.C is None:
        return
    first, *others = (x.detach() for x in CASES[op]())
    for other in (
        first.double(),
        first.int(),
        first.to("meta"),
        first.as_subclass(Subclass),
        first.to_sparse(),
        torch._neg_view(first),
        FakeTensorMode().from_tensor(first),
        first.new_ones(2, 3, 5, 3),  # odd, and narrower than the others
        first.sum(),
        None,
    ):
        assert enter(op, other, *others) is None, other
    for i, x in enumerate(others):
        for other in (x.double(), x.to("meta"), x.as_subclass(Subclass), x[:2], 3):
            assert enter(op, first, *others[:i], other, *others[i + 1 :]) is None, other
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        assert enter(op, first, *others) is None
    with torch.device("cpu"):  # a torch function mode
        assert enter(op, first, *others) is None
    seen = []
    torch.func.grad(lambda x: seen.append(enter(op, x, *others)) or x.sum())(first)
    torch.func.grad(lambda x: seen.append(enter(op, first, *others)) or x.sum())(first)
    assert seen == [None, None]
    traced = torch.jit.trace(lambda x: seen.append(enter(op, x, *others)) or x, first)
    assert traced is not None and seen[2] is None


@OPS
@pytest.mark.parametrize("frozen", range(3))
def test_does_as_the_ordinary_way(op, frozen, dtype, monkeypatch):
    """Outputs and gradients bit for bit, and what a second derivative says."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in CASES[op]()]
    inputs[frozen % len(inputs)].requires_grad_(False)
    live = [x for x in inputs if x.requires_grad and (op != "rope" or x.dim() == 4)]

    def results() -> tuple[list[Tensor], list[str]]:
        outputs = tensors(getattr(ops, op)(*inputs))
        if not live:
            return outputs, [str(y.requires_grad) for y in outputs]
        generator = torch.Generator().manual_seed(2)
        douts = [torch.randn(y.shape, generator=generator).to(y).requires_grad_() for y in outputs]
        grads = torch.autograd.grad(outputs, live, douts, create_graph=True)
        # once_differentiable's node hides dy: only a whole backward meets it
        with pytest.raises(RuntimeError, match="differentiate twice") as error:
            torch.autograd.backward([g.sum() for g in grads])
        once = torch.autograd.grad(tensors(getattr(ops, op)(*inputs)), live, douts)
        return [*outputs, *grads, *once], [str(error.value)]

    found, said = results()
    monkeypatch.setattr(importlib.import_module(f"tilewright.ops.{op}"), "_direct", None)
    expected, expected_said = results()
    assert said == expected_said
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e) and f.requires_grad == e.requires_grad
        assert f.stride() == e.stride() and f.dtype == e.dtype


def test_a_changed_input_is_noticed():
    x = leaf(3, 8)
    h = x * 1
    y = ops.rms_norm(h)
    h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@OPS
def test_saved_tensors_pass_their_hooks(op):
    """Activation checkpointing and offloading are made of these."""
    seen: list[torch.Size] = []

    def pack(x: Tensor) -> Tensor:
        seen.append(x.shape)
        return x.clone()

    inputs = CASES[op]()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = tensors(getattr(ops, op)(*inputs))
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    assert seen and inputs[0].grad is not None
