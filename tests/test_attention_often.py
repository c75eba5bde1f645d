"""Attention again and again: the same bits a thousand times, and few compilations over many lengths."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tilewright import _native, ops

REPEATS, STEP = (2, 10) if _native.INTERPRET else (1000, 1)  # the interpreter is slow


def drawn(S: int, T: int, device: str, D: int = 32):
    shapes = ((2, 4, S, D), (2, 2, T, D), (2, 2, T, D))
    return [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_thousand_backwards_give_the_same_bits(kind, device):
    q, k, v = (x.detach().to(kind).requires_grad_() for x in drawn(100, 130, device))
    sinks = torch.linspace(-1, 2, 4, device=device).requires_grad_()
    begin = torch.randint(0, 40, (2, 100), device=device)
    limits = {"causal": True, "window": (90, -1), "ranges": (begin, begin + 80)}

    def gradients():
        out, lse = ops.attention_with_lse(q, k, v, softcap=3.0, sinks=sinks, **limits)
        return torch.autograd.grad((out, lse), (q, k, v, sinks), (dout, dlse))

    dout = torch.randn(q.shape, device=device).to(kind)
    dlse = torch.randn(2, 4, 100, device=device)
    first = gradients()
    for _ in range(REPEATS):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


def attention(S: int, device: str):
    return lambda q, k, v: ops.attention(q, k, v, causal=True), drawn(S, S, device)


def window(S: int, device: str):
    return lambda q, k, v: ops.attention(q, k, v, window=(9, 9), softcap=2.0), drawn(S, S, device)


def varlen(S: int, device: str):
    q, k, v = (x[0].transpose(0, 1) for x in drawn(S, S, device))
    cu = torch.tensor([0, S // 2, S], device=device)
    return lambda q, k, v, cu: ops.attention_varlen(q, k, v, cu, causal=True), [q, k, v, cu]


def decode(S: int, device: str):
    q, k, v = (x.detach() for x in drawn(1, S, device))
    lengths = torch.tensor([S, S // 2], device=device)
    return lambda *x: ops.attention_decode(*x), [q, k, v, lengths]


@pytest.mark.parametrize("of", [attention, window, varlen, decode])
def test_fifty_lengths_compile_twice_at_most(of, device):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    f, _ = of(20, device)
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for S in range(20, 70, STEP):
        _, inputs = of(S, device)
        assert torch.equal(compiled(*inputs), f(*inputs))
    assert counter.frame_count <= 2
