"""attention_decode_append_ against its reference: what it gives, and what the caches hold after."""

import pytest
import torch
from torch import Tensor

from tilewright import explain, ops, reference
from tilewright.testing import assert_within

append = torch.ops.tilewright.attention_append_.default
B, H, G, T, D = 3, 4, 2, 150, 64
LENGTHS = [100, 0, 37]
TURNS = {
    "none": None,
    "halves": (32, False),
    "interleaved": (32, True),
    "doubled": (64, False),
    "doubled_interleaved": (64, True),
    "part": (12, False),
}


def tables(columns: int, interleaved: bool, device: str, dtype=torch.float32) -> dict:
    doubled = 2 * columns > D
    angles = torch.rand(T, columns // 2 if doubled else columns, device=device) * 6
    if doubled:
        angles = angles.repeat_interleave(2, 1) if interleaved else angles.repeat(1, 2)
    tables = {"cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype)}
    return tables | {"interleaved": interleaved}


def drawn(device: str, S: int = 1, dtype=torch.float32, kind=None, page: int = 0) -> dict:
    q = torch.randn(B, H, S, D, device=device).to(dtype)
    k, v = (torch.randn(B, G, S, D, device=device).to(dtype) for _ in range(2))
    kind = kind or dtype
    shape = (B * -(-T // page), page, G, D) if page else (B, T, G, D)
    caches = [
        torch.randn(shape, device=device).mul(30 if kind == torch.int8 else 1) for _ in range(2)
    ]
    caches = [x.round().to(kind) if kind == torch.int8 else x.to(kind) for x in caches]
    given = {"q": q, "k": k, "v": v, "k_cache": caches[0].transpose(1, 2)}
    given |= {"v_cache": caches[1].transpose(1, 2)}
    given["cache_seqlens"] = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    if page:
        n = shape[0] // B
        table = torch.randperm(shape[0], device=device).view(B, n).to(torch.int32)
        for b, length in enumerate(LENGTHS):
            table[b, -(-(length + S) // page) :] = 1 << 30
        given["block_table"] = table
    return given


def cloned(given: dict) -> dict:
    keep = torch.preserve_format
    return {
        k: x.clone(memory_format=keep) if isinstance(x, Tensor) else x for k, x in given.items()
    }


def bytes_of(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def double(given: dict) -> dict:
    """The same in float64; numbers of one byte stay."""
    wide = (torch.float32, torch.bfloat16, torch.float16)
    return {
        k: x.double() if isinstance(x, Tensor) and x.dtype in wide else x
        for k, x in cloned(given).items()
    }


def check(given: dict, dtype: torch.dtype, exact_keys: bool) -> None:
    spec, ours, truth = cloned(given), cloned(given), double(given)
    eager = reference.attention_decode_append_(**spec)
    truth_out = reference.attention_decode_append_(**truth)
    out = ops.attention_decode_append_(**ours)
    eps = torch.finfo(dtype).eps
    assert_within(out.double(), eager.double(), truth_out.double(), eps, "out")
    assert torch.equal(bytes_of(ours["v_cache"]), bytes_of(spec["v_cache"]))
    if exact_keys:
        assert torch.equal(bytes_of(ours["k_cache"]), bytes_of(spec["k_cache"]))
    else:  # a turned key's last bit depends on how products are fused
        found, bound, true = (x["k_cache"].double() for x in (ours, spec, truth))
        assert_within(found, bound, true, eps, "k_cache")
        assert (found != bound).sum() <= given["k"].numel()
    for name in ("q", "k", "v", "cache_seqlens", "block_table", "cos"):
        if isinstance(given.get(name), Tensor):
            assert torch.equal(ours[name], given[name]), name


@pytest.mark.parametrize("page", [0, 16], ids=["whole", "paged"])
@pytest.mark.parametrize("turns", TURNS.values(), ids=TURNS.keys())
def test_matches_reference(turns, page, dtype, device):
    given = drawn(device, 2, dtype, page=page)
    if turns:
        given |= tables(*turns, device)
    check(given, dtype, exact_keys=turns is None)


@pytest.mark.parametrize("page", [1, 7, 64])
def test_any_page_size(page, device):
    check(drawn(device, 3, page=page) | tables(32, False, device), torch.float32, False)


def test_options(dtype, device):
    options = {"window": (40, 0), "softcap": 3.0, "sinks": torch.linspace(-1, 3, H, device=device)}
    given = drawn(device, 1, dtype) | tables(32, False, device, dtype) | options
    check(given, dtype, False)


def test_many_queries(device):
    check(drawn(device, 45, page=16) | tables(32, False, device), torch.float32, False)


@pytest.mark.parametrize("page", [0, 16], ids=["whole", "paged"])
@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_one_byte_caches(kind, page, dtype, device):
    given = drawn(device, 2, dtype, kind, page)
    scale = 0.02 if kind == torch.int8 else 0.004
    given["k_scale"] = torch.linspace(1, 2, G, device=device) * scale
    given["v_scale"] = torch.linspace(2, 1, G, device=device) * scale
    check(given, dtype, exact_keys=True)


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_rounding_to_one_byte(kind, device):
    """Ties, the smallest, the largest and beyond them, as torch rounds after a clamp."""
    edges = [
        0.0,
        2.0**-10,
        2.0**-9,
        1.5 * 2.0**-9,
        2.5 * 2.0**-9,
        7.5 * 2.0**-9,
        2.0**-6,
        0.5,
        1.5,
        2.5,
    ]
    edges += [
        17.0,
        18.0,
        19.0,
        126.5,
        127.4,
        127.6,
        300.0,
        432.0,
        440.0,
        447.0,
        500.0,
        1e6,
        1.0625,
        1.1875,
    ]
    values = torch.tensor([*edges, *(-x for x in edges)], device=device)
    values = torch.cat((values, torch.randn(256 - values.numel(), device=device) * 50))
    v = values.view(1, 1, 1, 256)
    cache = torch.zeros(2, 1, 1, 1, 256, device=device).to(kind)
    ops.attention_decode_append_(
        v, v, v, cache[0], cache[1], torch.zeros(1, dtype=torch.int32, device=device)
    )
    low, high = (-128, 127) if kind == torch.int8 else (-448, 448)
    near = values.round() if kind == torch.int8 else values
    expected = near.clamp(low, high).to(kind)
    for found in cache:
        assert torch.equal(found.flatten().float(), expected.float())


def test_nan_is_kept(device):
    v = torch.full((1, 1, 1, 16), torch.nan, device=device)
    cache = torch.zeros(2, 1, 1, 1, 16, device=device).to(torch.float8_e4m3fn)
    none = torch.zeros(1, dtype=torch.int32, device=device)
    ops.attention_decode_append_(v, v, v, cache[0], cache[1], none)
    assert cache.float().isnan().all()


@pytest.mark.parametrize(
    ("lengths", "table"), [([9], None), ([-1], None), ([4], [[0, 7]]), ([4], [[0, -1]])]
)
def test_the_operator_never_writes_elsewhere(lengths, table):
    """Called past the public function too: it raises, or where a GPU could not, writes nothing."""
    q, k, v = torch.ones(1, 2, 1, 8), torch.ones(1, 1, 1, 8), torch.ones(1, 1, 1, 8)
    caches = [torch.zeros((1, 1, 9, 8) if table is None else (3, 1, 4, 8)) for _ in range(2)]
    table = None if table is None else torch.tensor(table, dtype=torch.int32)
    call = (q, k, v, *caches, torch.tensor(lengths, dtype=torch.int32), table)
    (route,) = [r for r in explain() if r[:2] == ("attention_decode", "cpu")]
    if route.implementation.startswith("C++"):
        with pytest.raises(ValueError, match="attention_decode: "):
            append(*call, None, None, False, None, None)
    else:
        append(*call, None, None, False, None, None)
    assert not any(x.any() for x in caches)


def test_step_by_step_is_causal_attention(device):
    """Prefill, then token by token, against attention over the whole."""
    q = torch.randn(1, H, 20, D, device=device)
    k, v = (torch.randn(1, G, 20, D, device=device) for _ in range(2))
    turns = tables(32, False, device)
    k_cache, v_cache = (torch.full((9, G, 4, D), torch.nan, device=device) for _ in range(2))
    table = torch.tensor([[3, 8, 0, 5, 1]], dtype=torch.int32, device=device)
    outs, held = [], 0
    for S in (11, 1, 1, 3, 1, 1, 1, 1):
        new = (x[:, :, held : held + S] for x in (q, k, v))
        lengths = torch.tensor([held], dtype=torch.int32, device=device)
        outs.append(
            ops.attention_decode_append_(
                *new, k_cache, v_cache, lengths, block_table=table, **turns
            )
        )
        held += S
    q, k = (ops.rope(x, turns["cos"], turns["sin"]) for x in (q, k))
    torch.testing.assert_close(torch.cat(outs, 2), ops.attention(q, k, v, causal=True))
    assert k_cache[[2, 4, 6, 7]].isnan().all()  # pages of nobody's


def test_strides(device):
    """Caches whose features are no neighbours, lengths of int64, new keys as a projection gives them."""
    given = drawn(device, 2)
    for name in ("k_cache", "v_cache"):
        given[name] = torch.stack((given[name],) * 2, -1).flatten(-2)[..., ::2]
    given["cache_seqlens"] = given["cache_seqlens"].long()
    packed = torch.cat([given[x].transpose(1, 2).flatten(2) for x in ("q", "k", "v")], -1)
    q, k, v = packed.split([H * D, G * D, G * D], -1)
    given |= {
        n: x.unflatten(-1, (-1, D)).transpose(1, 2) for n, x in zip("qkv", (q, k, v), strict=True)
    }
    dense = {k: x.clone(memory_format=torch.contiguous_format) for k, x in given.items()}
    expected, found = ops.attention_decode_append_(**dense), ops.attention_decode_append_(**given)
    assert torch.equal(found, expected)
    assert torch.equal(given["k_cache"], dense["k_cache"])


@pytest.mark.parametrize("turned", [True, False], ids=["turned", "not_turned"])
def test_opcheck(turned, device):
    x = drawn(device, 2, page=16)
    turns = tables(32, False, device)
    cos, sin = (turns["cos"], turns["sin"]) if turned else (None, None)
    torch.library.opcheck(
        append,
        (x["q"], x["k"], x["v"], x["k_cache"], x["v_cache"], x["cache_seqlens"], x["block_table"],
         cos, sin, False, None, None),
    )  # fmt: skip


def test_compiles_fullgraph(device):
    def f(q, k, v, k_cache, v_cache, cache_seqlens, cos, sin):
        return ops.attention_decode_append_(
            q, k, v, k_cache, v_cache, cache_seqlens, cos=cos, sin=sin
        )

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    given = drawn(device) | {
        n: x for n, x in tables(32, False, device).items() if n != "interleaved"
    }
    eager = cloned(given)
    assert torch.equal(compiled(**given), f(**eager))
    assert torch.equal(given["k_cache"], eager["k_cache"])


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_turned_keys_of_one_byte(kind, device):
    """A turned key is rounded to q's dtype before it is to one byte."""
    given = drawn(device, 2, torch.bfloat16, kind) | tables(32, False, device)
    given["k_scale"] = torch.full((G,), 0.02, device=device)
    check(given, torch.bfloat16, exact_keys=False)


def test_tables_of_no_columns_turn_nothing(device):
    given = drawn(device, 2)
    none = torch.zeros(T, 0, device=device)
    expected = ops.attention_decode_append_(**cloned(given))
    assert torch.equal(ops.attention_decode_append_(**given, cos=none, sin=none), expected)


def test_autocast_takes_the_caches_dtype(device):
    given = drawn(device, 1, torch.bfloat16)
    expected = ops.attention_decode_append_(**cloned(given))
    wide = given | {name: given[name].float() for name in ("q", "k", "v")}
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(ops.attention_decode_append_(**wide), expected)


def test_autograd_notices_a_cache_that_it_saved(device):
    given = drawn(device)
    x = torch.ones(T, 1, device=device, requires_grad=True)
    loss = (x * given["k_cache"]).sum()
    with torch.no_grad():
        ops.attention_decode_append_(**given)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        ops.attention_decode_append_(**drawn(device))


def test_float64_runs_the_reference(device):
    given = double(drawn(device, 2) | tables(32, False, device))
    given["cos"], given["sin"] = given["cos"].float(), given["sin"].float()
    spec = cloned(given)
    found = ops.attention_decode_append_(**given)
    assert torch.equal(found, reference.attention_decode_append_(**spec))
    assert torch.equal(given["k_cache"], spec["k_cache"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(B, G, 2, D)}, "k \\(3, 2, 2, 64\\)"),
        ({"v": torch.zeros(B, G, 1, D).bfloat16()}, "torch.bfloat16"),
        ({"cos": torch.zeros(T, 32)}, "sin None"),
        ({"cos": torch.zeros(T, 65), "sin": torch.zeros(T, 65)}, "cos \\(\\(150, 65\\)"),
        ({"cos": torch.zeros(9, 32), "sin": torch.zeros(9, 32)}, "no row for position 100"),
        ({"cache_seqlens": torch.tensor([150, 0, 0])}, "cache_seqlens\\[0\\] is 150, not 0 to 149"),
        ({"cache_seqlens": torch.tensor([0, -1, 0])}, "cache_seqlens\\[1\\] is -1"),
        ({"q": torch.zeros(B, H, 1, D, requires_grad=True)}, "no gradient"),
        ({"sinks": torch.zeros(H, requires_grad=True)}, "no gradient"),
        ({"k_scale": torch.ones(3)}, "k_scale \\(3,\\)"),
    ],
)
def test_bad_input_changes_nothing(change, message):
    given = drawn("cpu") | change
    before = cloned(given)
    with pytest.raises(ValueError, match=f"attention_decode: .*{message}"):
        ops.attention_decode_append_(**given)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(given[name], before[name])
