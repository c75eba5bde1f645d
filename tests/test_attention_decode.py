"""attention_decode against its reference: few queries to caches that are whole, or in pages."""

import pytest
import torch
from torch import Tensor

from tilewright import _op, ops, reference
from tilewright.testing import assert_matches_reference, assert_within, run

decode = torch.ops.tilewright.attention_decode_fwd.default
# B, H, G, S, T, D, and how many keys each batch has
SHAPES = {
    "one": (1, 4, 2, 1, 90, 64, [90]),
    "lengths": (4, 4, 1, 1, 200, 64, [200, 0, 1, 131]),
    "long": (1, 3, 1, 1, 700, 40, [690]),
    "group": (1, 24, 1, 1, 300, 32, [280]),
    "queries": (3, 4, 2, 3, 150, 64, [150, 2, 70]),
    "tiles": (1, 20, 1, 3, 150, 48, [140]),
    "many": (2, 4, 1, 40, 150, 24, [150, 30]),
    "wide": (2, 8, 2, 1, 140, 256, [140, 99]),
    "odd": (2, 2, 1, 1, 37, 9, [37, 5]),
}
OPTIONS = {
    "plain": {},
    "window": {"window": (20, 0)},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "everything": {"window": (70, -1), "softcap": 3.0, "sinks": True, "scale": 0.3},
}
PAGES = [0, 1, 5, 16, 128]


def drawn(B: int, H: int, G: int, S: int, T: int, D: int, lengths: list[int], device: str):
    q = torch.randn(B, H, S, D, device=device)
    k, v = (torch.randn(B, G, T, D, device=device) for _ in range(2))
    return q, k, v, torch.tensor(lengths, dtype=torch.int32, device=device)


def paged(k: Tensor, v: Tensor, page: int, spare: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Caches [B, G, T, D] in pages of no order, some of nobody's, as vLLM keeps them; and the table."""
    B, G, T, D = k.shape
    n = -(-T // page)
    table = torch.randperm(B * n + spare, device=k.device)[: B * n].view(B, n).to(torch.int32)
    caches = []
    for x in (k, v):
        cache = torch.full((B * n + spare, page, G, D), torch.nan, dtype=x.dtype, device=x.device)
        x = torch.nn.functional.pad(x, (0, 0, 0, n * page - T), value=torch.nan)
        cache[table.flatten().long()] = (
            x.unflatten(2, (n, page)).permute(0, 2, 3, 1, 4).flatten(0, 1)
        )
        caches.append(cache.transpose(1, 2))
    return caches[0], caches[1], table


def options_of(options: dict, H: int, device: str) -> dict:
    sinks = torch.linspace(-1, 6, H, device=device) if "sinks" in options else None
    return options | {"sinks": sinks}


def check(q, k, v, lengths, page, dtype, **options):
    """On pages of so many keys (0: whole) against the reference on whole caches."""
    q, k, v = (x.to(dtype) for x in (q, k, v))
    name = "attention_decode_with_lse"
    truth, eager = (
        getattr(reference, name)(*(x.to(kind) for x in (q, k, v)), lengths, **options)
        for kind in (torch.float64, dtype)
    )
    table = None
    if page:
        k, v, table = paged(k, v, page)
    ours = getattr(ops, name)(q, k, v, lengths, block_table=table, **options)
    for found, bound, true, what in zip(ours, eager, truth, ("out", "lse"), strict=True):
        assert_within(found.double(), bound.double(), true.double(), torch.finfo(dtype).eps, what)
    assert torch.equal(
        ops.attention_decode(q, k, v, lengths, block_table=table, **options), ours[0]
    )
    return ours


# every shape with nothing and with all; each option alone where lengths, queries and tiles are several
CASES = [
    *(
        (shape, option, page)
        for shape in SHAPES
        for option, page in (("plain", 0), ("everything", 16))
    ),
    *(
        (shape, option, page)
        for shape, page in (("lengths", 16), ("queries", 0), ("tiles", 16))
        for option in ("window", "softcap", "sinks")
    ),
]


@pytest.mark.parametrize(("shape", "options", "page"), CASES)
def test_matches_reference(shape, options, page, dtype, device):
    drawn_inputs = drawn(*SHAPES[shape], device)
    check(*drawn_inputs, page, dtype, **options_of(OPTIONS[options], SHAPES[shape][1], device))


@pytest.mark.parametrize("page", PAGES)
def test_any_page_size(page, dtype, device):
    check(*drawn(*SHAPES["lengths"], device), page, dtype, window=(60, 0))


def test_is_attention_where_the_cache_is_full(dtype, device):
    q, k, v, lengths = drawn(2, 4, 2, 3, 140, 64, [140, 140], device)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    truth = reference.attention(q.double(), k.double(), v.double(), causal=True)
    eager = reference.attention(q, k, v, causal=True).double()
    found = ops.attention_decode(q, k, v, lengths).double()
    assert_within(found, eager, truth, torch.finfo(dtype).eps, "out")


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(
    ("shape", "page"),
    [("lengths", 0), ("lengths", 16), ("odd", 0)],
    ids=["whole", "paged", "one_split"],
)
def test_one_byte_caches(kind, shape, page, dtype, device):
    q, k, v, lengths = drawn(*SHAPES[shape], device)
    q = q.to(dtype)
    if kind == torch.int8:
        k, v = ((x * 40).round().clamp(-128, 127).to(kind) for x in (k, v))
    else:
        k, v = ((x * 100).to(kind) for x in (k, v))
    scales = {
        f"{name}_scale": torch.rand(k.size(1), device=device) / 40 + 0.01 for name in ("k", "v")
    }
    truth, eager = (
        reference.attention_decode(q.to(t), k, v, lengths, **scales).double()
        for t in (torch.float64, dtype)
    )
    table = None
    if page:
        k, v, table = paged(k.float(), v.float(), page)
        k, v = k.nan_to_num().to(kind), v.nan_to_num().to(kind)
    ours = ops.attention_decode(q, k, v, lengths, block_table=table, **scales)
    assert_within(ours.double(), eager, truth, torch.finfo(dtype).eps, "out")
    # one scale alone, and none
    for some in ({"v_scale": scales["v_scale"]}, {}):
        truth, eager = (
            reference.attention_decode(
                q.to(t), k, v, lengths, block_table=table, scale=1e-3, **some
            )
            for t in (torch.float64, dtype)
        )
        ours = ops.attention_decode(q, k, v, lengths, block_table=table, scale=1e-3, **some)
        eps = torch.finfo(dtype).eps
        assert_within(ours.double(), eager.double(), truth.double(), eps, "out")


def test_every_number_of_one_byte(device):
    """Each of the 256, read as a value that alone is seen."""
    codes = torch.arange(256, device=device).to(torch.uint8)
    q = torch.zeros(1, 1, 1, 256, device=device)
    for kind in (torch.int8, torch.float8_e4m3fn):
        v = codes.view(kind).view(1, 1, 1, 256)
        k = torch.zeros(1, 1, 1, 256, device=device).to(kind)
        out = ops.attention_decode(q, k, v, torch.tensor([1], device=device))
        expected = v.float()
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("S", [1, 40], ids=["few", "many"])
def test_what_is_not_held_is_not_read(S, device):
    """nan past the last key, on pages of nobody's and before a window; table entries that are none."""
    B, G, T, D = 2, 2, 160, 16
    q, k, v, lengths = drawn(B, 4, G, S, T, D, [150, 90], device)
    options = {"window": (20, 0)}
    expected = ops.attention_decode(q, k, v, lengths, **options)
    for x in (k, v):
        for b, length in enumerate((150, 90)):
            x[b, :, length:] = torch.nan
            x[b, :, : length - S - 20] = torch.nan
    both = ops.attention_decode, reference.attention_decode
    for attend in both:
        torch.testing.assert_close(attend(q, k, v, lengths, **options), expected)
    k, v, table = paged(k, v, 8)
    for b, length in enumerate((150, 90)):
        table[b, -(-length // 8) :] = 1 << 30
        table[b, : (length - S - 20) // 8] = -7
    for attend in both:
        found = attend(q, k, v, lengths, block_table=table, **options)
        torch.testing.assert_close(found, expected)


def test_queries_that_see_nothing(dtype, device):
    q, k, v, _ = drawn(2, 4, 2, 3, 20, 16, [0, 1], device)
    lengths = torch.tensor([0, 1], device=device)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    out, lse = ops.attention_decode_with_lse(q, k, v, lengths)
    assert not out[0].any() and not out[1, :, :2].any()
    assert (lse[0] == -torch.inf).all() and lse[1, :, 2].isfinite().all()
    torch.testing.assert_close(out[1, :, 2], v[1, :, 0].repeat_interleave(2, 0))
    sinks = torch.ones(4, device=device)
    out, lse = ops.attention_decode_with_lse(q, k, v, lengths, sinks=sinks)
    assert not out[0].any() and torch.equal(lse[0], torch.ones_like(lse[0]))


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_strides(kind, device):
    """Caches and queries that lie as [B, T, G, D], expanded, or with steps between."""
    q, k, v, lengths = drawn(2, 4, 2, 2, 70, 24, [70, 33], device)
    expected = ops.attention_decode(q, k, v, lengths)
    lengths = lengths.to(kind)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    assert torch.equal(ops.attention_decode(q, k, v, lengths), expected)
    k, v = (torch.stack((x, x), -1).flatten(-2)[..., ::2] for x in (k, v))
    assert torch.equal(ops.attention_decode(q, k, v, lengths), expected)
    far = torch.empty(2, 2, 70, 48, device=device)[..., 24:]
    far.copy_(k)
    assert torch.equal(ops.attention_decode(q, far, v, lengths), expected)
    alike = k[:1].expand(2, -1, -1, -1)
    found = ops.attention_decode(q, alike, v[:1].expand(2, -1, -1, -1), lengths)
    assert torch.equal(found[:1], expected[:1])


def test_nothing_is_changed_and_repeats(device):
    q, k, v, lengths = drawn(*SHAPES["lengths"], device)
    k, v, table = paged(k, v, 16)
    given = (q, k, v, lengths, table)
    before = [x.clone() for x in given]
    first, again = (ops.attention_decode(*given[:4], block_table=table) for _ in range(2))
    assert torch.equal(first, again)
    for x, was in zip(given, before, strict=True):
        assert torch.equal(x.nan_to_num(), was.nan_to_num())


@pytest.mark.parametrize("empty", ["batch", "queries", "room", "pages"])
def test_empty(empty, device):
    B, S, T = {"batch": (0, 1, 9), "queries": (2, 0, 9)}.get(empty, (2, 1, 0))
    q, k, v, _ = drawn(B, 4, 2, S, T, 16, [], device)
    lengths = torch.zeros(B, dtype=torch.int32, device=device)
    table = None
    if empty == "pages":
        k, v = (torch.empty(0, 2, 16, 16, device=device) for _ in range(2))
        table = torch.zeros(2, 3, dtype=torch.int32, device=device)
    out, lse = ops.attention_decode_with_lse(q, k, v, lengths, block_table=table)
    assert out.shape == q.shape and not out.any() and lse.shape == (B, 4, S)


@pytest.mark.parametrize("kind", ["float64", "wide", "gradient"])
def test_what_no_kernel_serves_runs_the_reference(kind, device):
    dtype, D = {"float64": (torch.float64, 16), "wide": (torch.float32, 264)}.get(
        kind, (torch.float32, 16)
    )
    q, k, v, lengths = drawn(2, 4, 2, 1, 40, D, [40, 7], device)
    inputs = [x.to(dtype).requires_grad_(kind == "gradient") for x in (q, k, v)]
    ours, theirs = (
        run(lambda *x, f=f: f(*x, lengths, softcap=2.0), inputs, {})
        for f in (ops.attention_decode_with_lse, reference.attention_decode_with_lse)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert len(ours) == (5 if kind == "gradient" else 2)


def test_gradients_of_the_reference(dtype, device):
    q, k, v, lengths = drawn(2, 4, 2, 2, 40, 16, [40, 7], device)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert_matches_reference(
        lambda q, k, v: ops.attention_decode(q, k, v, lengths),
        lambda q, k, v: reference.attention_decode(q, k, v, lengths),
        *inputs,
        dtype=dtype,
    )


@pytest.mark.parametrize("page", [0, 16], ids=["whole", "paged"])
def test_opcheck(page, device):
    assert _op.serves("attention_decode", torch.empty(0, device=device))
    q, k, v, lengths = drawn(2, 4, 2, 1, 300, 16, [300, 9], device)
    table = None
    if page:
        k, v, table = paged(k, v, page)
    scale = torch.rand(2, device=device)
    sinks = torch.randn(4, device=device)
    torch.library.opcheck(
        decode,
        (q, k.nan_to_num(), v.nan_to_num(), lengths, table, scale, scale, sinks, 0, 7, 2.0, 0.25),
    )
    torch.library.opcheck(
        decode, (q.transpose(1, 2).contiguous().transpose(1, 2), k.nan_to_num(), v.nan_to_num(), lengths,
                 table, None, None, None, 0, -1, 0.0, 0.25)
    )  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_fullgraph(dynamic, device):
    def f(q, k, v, lengths, table):
        return ops.attention_decode(q, k, v, lengths, block_table=table, window=(50, 0))

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for B, T in ((1, 60), (3, 90)):
        q, k, v, lengths = drawn(B, 4, 2, 1, T, 16, [T - 7] * B, device)
        k, v, table = paged(k, v, 16)
        given = (q, k, v, lengths, table)
        assert torch.equal(compiled(*given), f(*given))


@pytest.mark.parametrize("wanted", [False, True], ids=["kernel", "reference"])
def test_autocast_takes_the_caches_dtype(wanted, device):
    q, k, v, lengths = drawn(2, 4, 2, 1, 40, 16, [40, 7], device)
    low = [x.bfloat16() for x in (q, k, v)]
    expected = ops.attention_decode(*low, lengths)
    with torch.autocast(device, torch.bfloat16):
        out = ops.attention_decode(q.requires_grad_(wanted), *low[1:], lengths)
        assert out.dtype == torch.bfloat16 and (wanted or torch.equal(out, expected))
        assert ops.attention_decode(q, k, v, lengths).dtype == torch.float32
        codes = [x.to(torch.int8) for x in (k, v)]
        assert ops.attention_decode(q, *codes, lengths).dtype == torch.bfloat16


def bad(**change):
    good = {
        "q": torch.zeros(2, 4, 1, 8),
        "k_cache": torch.zeros(2, 2, 9, 8),
        "v_cache": torch.zeros(2, 2, 9, 8),
        "cache_seqlens": torch.tensor([9, 3]),
    }
    return good | change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(4, 1, 8)}, "q \\(4, 1, 8\\)"),
        ({"v_cache": torch.zeros(2, 2, 8, 8)}, "v_cache \\(2, 2, 8, 8\\)"),
        ({"q": torch.zeros(2, 3, 1, 8)}, "does not fit q \\(2, 3, 1, 8\\)"),
        ({"q": torch.zeros(2, 4, 1, 9)}, "does not fit q \\(2, 4, 1, 9\\)"),
        ({"q": torch.zeros(3, 4, 1, 8)}, "does not fit q \\(3, 4, 1, 8\\)"),
        ({"q": torch.zeros(2, 4, 1, 8).bfloat16()}, "q's torch.bfloat16"),
        ({"q": torch.zeros(2, 4, 1, 8, device="meta")}, "on meta"),
        ({"cache_seqlens": torch.tensor([9])}, "cache_seqlens \\(1,\\)"),
        ({"cache_seqlens": torch.tensor([9.0, 3.0])}, "cache_seqlens \\(2,\\) torch.float32"),
        ({"cache_seqlens": torch.tensor([10, 3])}, "cache_seqlens\\[0\\] is 10, not 0 to 9"),
        ({"cache_seqlens": torch.tensor([9, -1])}, "cache_seqlens\\[1\\] is -1, not 0 to 9"),
        ({"block_table": torch.tensor([0, 1])}, "block_table \\(2,\\)"),
        ({"block_table": torch.tensor([[0], [2]])}, "block_table\\[1\\] has pages 2 to 2"),
        ({"block_table": torch.tensor([[-1], [1]])}, "block_table\\[0\\] has pages -1 to -1"),
        ({"k_scale": torch.ones(4)}, "k_scale \\(4,\\)"),
        ({"v_scale": torch.ones(2, dtype=torch.int32)}, "v_scale \\(2,\\) torch.int32"),
        ({"window": (-2, 0)}, "window \\(-2, 0\\)"),
        ({"softcap": -1.0}, "softcap must be above 0"),
        ({"sinks": torch.zeros(3)}, "sinks \\(3,\\)"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=f"attention_decode: .*{message}"):
        ops.attention_decode(**bad(**change))


@pytest.mark.parametrize(
    ("lengths", "table", "nearest"),
    [
        ([17, 1], None, [9, 1]),
        ([9, -1], None, [9, 0]),
        ([2**32 + 5, 1], None, [9, 1]),
        ([9, 3], [[0], [5]], [[0], [1]]),
        ([9, 3], [[-1], [0]], [[0], [0]]),
    ],
    ids=str,
)
def test_the_operator_never_reads_elsewhere(lengths, table, nearest, device):
    """Called past the public function too: it raises, or where a GPU could not, takes the nearest."""
    shapes = {name: x.shape for name, x in bad().items() if name != "cache_seqlens"}
    inputs = [torch.randn(shape, device=device) for shape in shapes.values()]

    def call(lengths, table):
        table = None if table is None else torch.tensor(table, dtype=torch.int32, device=device)
        given = (*inputs, torch.tensor(lengths, device=device), table)
        return decode(*given, None, None, None, 0, -1, 0.0, 1.0)[0]

    (route,) = [r for r in _op.explain() if r[:2] == ("attention_decode", device)]
    if route.implementation.startswith("C++"):
        with pytest.raises(ValueError, match="attention_decode: "):
            call(lengths, table)
    elif table is None:
        assert torch.equal(call(lengths, None), call(nearest, None))
    else:
        assert torch.equal(call(lengths, table), call(lengths, nearest))
