"""nn.MultiheadAttention against torch's, in whose place it stands."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tilewright.nn import MultiheadAttention
from tilewright.testing import assert_matches_reference

N, S, T, E, H = 2, 21, 35, 24, 3
FORMS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False},
    "other_widths": {"kdim": 16, "vdim": 20, "batch_first": True},
}
UNLIKE = {
    "bias_k": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
}


def causal(S: int, T: int) -> Tensor:
    return torch.ones(S, T, dtype=torch.bool).triu(1)


def padding(left: bool) -> Tensor:
    hidden = torch.zeros(N, T, dtype=torch.bool)
    hidden[1, slice(0, 9) if left else slice(30, None)] = True
    return hidden


def added(hidden: Tensor) -> Tensor:
    """A mask as transformers of old and generate_square_subsequent_mask have it."""
    return torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)


HOLES = torch.zeros(N, T, dtype=torch.bool)
HOLES[:, 5] = True
# arguments, and whether our kernels serve them
MASKS = {
    "none": ({}, True),
    "hint": ({"attn_mask": causal(S, T), "is_causal": True}, True),
    "causal": ({"attn_mask": causal(S, T)}, True),
    "added": ({"attn_mask": added(causal(S, T))}, True),
    "window": ({"attn_mask": causal(S, T) | ~causal(S, T).roll(-6, 1)[:, :T]}, True),
    "left": ({"key_padding_mask": padding(True)}, True),
    "right": ({"key_padding_mask": padding(False)}, True),
    "added_padding": ({"key_padding_mask": added(padding(False))}, True),
    "both": ({"key_padding_mask": padding(False), "attn_mask": causal(S, T)}, True),
    "both_hint": (
        {"key_padding_mask": padding(False), "attn_mask": causal(S, T), "is_causal": True},
        True,
    ),
    "holes": ({"key_padding_mask": HOLES}, True),
    "bias": ({"attn_mask": torch.linspace(-1, 1, S * T).view(S, T)}, True),
    "bias_and_padding": (
        {"attn_mask": torch.linspace(-1, 1, S * T).view(S, T), "key_padding_mask": HOLES},
        True,
    ),
    "by_head": ({"attn_mask": causal(S, T).expand(N * H, S, T)}, True),
    "weights": ({"need_weights": True}, False),
    "weights_by_head": ({"need_weights": True, "average_attn_weights": False}, False),
}


def pair(device: str, **form):
    """Ours and torch's, of the same parameters."""
    theirs = nn.MultiheadAttention(E, H, device=device, **form)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = MultiheadAttention(E, H, device=device, **form)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def drawn(module: nn.MultiheadAttention, device: str) -> list[Tensor]:
    widths = ((S, E), (T, module.kdim), (T, module.vdim))
    inputs = [torch.randn(N, n, width, device=device) for n, width in widths]
    if not module.batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    return [x.requires_grad_() for x in inputs]


def bound(module: nn.MultiheadAttention, **arguments):
    """module of q, k, v and its parameters; masks that are added take their dtype."""
    names = [name for name, _ in module.named_parameters()]

    def call(q, k, v, *parameters):
        fitted = {
            name: x.to(q.device, q.dtype if x.is_floating_point() else x.dtype)
            if isinstance(x, Tensor)
            else x
            for name, x in ({"need_weights": False} | arguments).items()
        }
        given = dict(zip(names, parameters, strict=True))
        results = functional_call(module, given, (q, k, v), fitted)
        return [x for x in results if x is not None]

    return call


def check(ours, theirs, inputs, dtype, **arguments):
    parameters = [p.detach().requires_grad_() for p in theirs.parameters()]
    f, g = (bound(module, **arguments) for module in (ours, theirs))
    assert_matches_reference(f, g, *inputs, *parameters, dtype=dtype)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_matches_torch(form, dtype, device, attended):
    ours, theirs = pair(device, **form)
    check(ours, theirs, drawn(ours, device), dtype)
    assert attended


@pytest.mark.parametrize(("arguments", "served"), MASKS.values(), ids=MASKS.keys())
def test_masks(arguments, served, device, attended):
    ours, theirs = pair(device)
    check(ours, theirs, drawn(ours, device), torch.float32, **arguments)
    assert bool(attended) == served


@pytest.mark.parametrize(
    "arguments", [{}, {"key_padding_mask": padding(True)[1]}], ids=["", "mask"]
)
def test_unbatched(arguments, device, attended):
    ours, theirs = pair(device)
    inputs = [x.detach()[:, 0].clone().requires_grad_() for x in drawn(ours, device)]
    check(ours, theirs, inputs, torch.float32, **arguments)
    assert attended


def test_self_attention_is_one_projection(dtype, device, attended):
    ours, theirs = pair(device, batch_first=True)
    f, g = (bound(module) for module in (ours, theirs))
    parameters = [p.detach().requires_grad_() for p in theirs.parameters()]
    x = torch.randn(N, S, E, device=device, requires_grad=True)
    assert_matches_reference(
        lambda x, *p: f(x, x, x, *p), lambda x, *p: g(x, x, x, *p), x, *parameters, dtype=dtype
    )
    assert len(attended) == 1


@pytest.mark.parametrize("form", UNLIKE.values(), ids=UNLIKE.keys())
def test_what_no_kernel_does_is_torchs(form, device, attended):
    ours, theirs = pair(device, **form)
    check(ours, theirs, drawn(ours, device), torch.float32)
    assert not attended


@pytest.mark.parametrize("mask", ["none", "hint", "left", "holes"])
def test_dropout(mask, device, attended):
    """Seeded, in training only, and right on the average."""
    ours, theirs = pair(device, dropout=0.5)
    inputs = [x.detach() for x in drawn(ours, device)]
    given = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in MASKS[mask][0].items()}

    def out(module):
        return module(*inputs, need_weights=False, **given)[0]

    with torch.no_grad():
        torch.manual_seed(7)
        first, second = out(ours), out(ours)
        torch.manual_seed(7)
        assert torch.equal(out(ours), first) and not torch.equal(first, second) and attended
        mean = torch.stack([out(ours) for _ in range(400)]).mean(0)
        expected = out(theirs.eval())
        error = (mean - expected).square().mean().sqrt()
        assert error < 0.1 * (first - expected).square().mean().sqrt()
        torch.testing.assert_close(out(ours.eval()), expected)


def test_a_query_that_sees_nothing_gives_the_bias(device):
    ours, _ = pair("cpu")
    q, k, v = drawn(ours, "cpu")
    hidden = torch.zeros(N, T, dtype=torch.bool)
    hidden[0] = True
    out, _ = ours(q, k, v, key_padding_mask=hidden, need_weights=False)
    assert torch.equal(out[:, 0], ours.out_proj.bias.expand(S, E))
    assert out[:, 1].isfinite().all()


def test_stands_in_a_transformer_layer(device):
    """Training and evaluation of torch's encoder layer, with ours in place of its attention."""
    theirs = nn.TransformerEncoderLayer(E, H, 40, dropout=0.0, batch_first=True, device=device)
    ours = copy.deepcopy(theirs)
    ours.self_attn = MultiheadAttention(E, H, batch_first=True, device=device)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(N, S, E, device=device)
    mask = nn.Transformer.generate_square_subsequent_mask(S, device=device)
    for train in (True, False):
        outs = [m.train(train)(x, src_mask=mask, is_causal=True) for m in (ours, theirs)]
        torch.testing.assert_close(*outs)


def test_a_learned_mask_keeps_its_gradient(device, attended):
    """One of zeros, as it starts, hides nothing and must still be learned."""
    ours, theirs = pair(device)
    q, k, v = drawn(ours, device)
    grads = []
    for module in (ours, theirs):
        mask = torch.zeros(S, T, device=device, requires_grad=True)
        out, _ = module(q, k, v, need_weights=False, attn_mask=mask)
        grads.append(torch.autograd.grad(out.square().sum(), mask)[0])
    torch.testing.assert_close(*grads)
    assert grads[0].any() and attended


def test_one_tensor_as_both_masks(device):
    n = N
    ours, theirs = pair(device)
    x = torch.randn(n, n, E, device=device)
    mask = causal(n, n).to(device)
    outs = [m(x, x, x, mask, need_weights=False, attn_mask=mask)[0] for m in (ours, theirs)]
    torch.testing.assert_close(*outs)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)], ids=["tokens", "batch"])
def test_empty(shape, device):
    ours, theirs = pair(device)
    x = torch.randn(*shape, E, device=device)
    mask = torch.zeros(shape[1], shape[0], dtype=torch.bool, device=device)
    assert ours(x, x, x, mask, need_weights=False)[0].shape == x.shape
    outs = [m(x, x, x, need_weights=False)[0] for m in (ours, theirs)]
    assert torch.equal(*outs)


@pytest.mark.parametrize("mask", ["none", "left", "by_head"])
def test_compiles_fullgraph(mask, device, attended):
    ours, _ = pair(device, batch_first=True)
    inputs = drawn(ours, device)
    given = {k: x.to(device) for k, x in MASKS[mask][0].items()}
    f = torch.compile(ours, fullgraph=True, backend="aot_eager")
    out, _ = f(*inputs, need_weights=False, **given)
    assert attended
    torch.testing.assert_close(out, ours(*inputs, need_weights=False, **given)[0])


def test_errors_are_torchs(device):
    ours, theirs = pair(device)
    q, k, v = (x.detach() for x in drawn(ours, device))
    for args, kwargs in (
        ((q[..., :8], k, v), {}),
        ((q, k, v[:3]), {}),
        ((q[:, :1], k, v), {}),
        ((q, k[..., :8], v[..., :8]), {}),
        ((q, k, v), {"is_causal": True}),
        ((q, k, v), {"attn_mask": torch.zeros(S, T, dtype=torch.uint8, device=device)}),
        ((q, k, v), {"attn_mask": torch.zeros(3, 3, dtype=torch.bool, device=device)}),
    ):
        with pytest.raises((AssertionError, RuntimeError)) as expected:
            theirs(*args, need_weights=False, **kwargs)
        with pytest.raises((AssertionError, RuntimeError)) as found:
            ours(*args, need_weights=False, **kwargs)
        assert type(found.value) is type(expected.value)
        assert str(found.value) == str(expected.value)
