"""A router's losses:  balance = mean_g E sum_e f_ge P_ge,  z = mean_t lse_t^2,  and how often each expert was chosen.

G sequences of S tokens, E experts.  f_ge = c_ge / n_g, choices of expert e by the n_g tokens of g that count;
P_ge the mean of p over them, p = softmax(x) or s / sum s with s = sigmoid(x); g only where n_g > 0.  With
w_ge = E c_ge / n_g^2, which the forward keeps, and A such g of N tokens in all,
    dx = p (w - sum p w) [1 - s] dbalance / A + 2 lse softmax(x) dz / N.
Three launches and no atomic: blocks of rows add up float32 in an order of their own; a program for a few experts
of a sequence adds its blocks, in float64; one program adds the sequences.  No p is stored: the backward computes it
again.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tune import Config, Tunable, row_warps, split
from .moe_route import KEYS, _config, _space
from .rms_norm import rows_of

# Partial sums of all sequences, at least and at most, but one a sequence; between them one of so many tiles.  Fixed,
# not the number of SMs: the same bits everywhere.
PROGRAMS, TILES = (256, 2048), 8
BLOCKS, COLUMNS = 128, 16  # blocks of a step, and experts, of a program that adds blocks
SEQUENCES = 16  # of a step of the program that adds sequences
FAR = tl.constexpr(1e30)


@triton.jit
def _tokens(sequence, first, mask_ptr, S, HAS_MASK: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rows [BLOCK_M] from a sequence's first, whether each is one of it, and whether it counts."""
    s = first + tl.arange(0, BLOCK_M)
    inside = s < S
    rows = sequence * S + s
    counted = inside
    if HAS_MASK:
        counted = inside & (tl.load(mask_ptr + rows, mask=inside, other=0) != 0)
    return rows, inside, counted


@triton.jit
def _softmax(logits_ptr, rows, counted, stride_m, E, BLOCK_E: tl.constexpr):
    """Logits, -inf from E on, their greatest, softmax and log-sum-exp; nothing is read of tokens that do not count."""
    cols = tl.arange(0, BLOCK_E)[None, :]
    at = rows[:, None] * stride_m + cols
    x = tl.load(logits_ptr + at, mask=counted[:, None] & (cols < E), other=0.0).to(tl.float32)
    x = tl.where(cols < E, x, float("-inf"))
    most = tl.max(x, axis=1)
    most = tl.where(tl.abs(most) == float("inf"), 0.0, most)  # no inf - inf: lse is inf, or -inf
    p = tl.exp(x - most[:, None])
    total = tl.sum(p, axis=1)
    return x, most, p / total[:, None], most + tl.log(total)


@triton.jit
def _sigmoid(x, most):
    """s / sum s and 1 - s.  Both sides of 1 / (1 + e^-x) are multiplied so that the greatest s is 1/2 at least."""
    least = tl.minimum(most, 0.0)[:, None]
    away = tl.exp(least - x)
    s = 1.0 / (tl.exp(least) + away)
    share = 1.0 / tl.sum(s, axis=1)  # a quotient a number spills
    # inf * 0 where s is 0, and so is p
    return s * share[:, None], tl.where(away > FAR, 1.0, away * s)


@triton.jit
def _moe_losses_count_kernel(
    logits_ptr, ids_ptr, mask_ptr, sums_ptr, squares_ptr, counts_ptr, tokens_ptr,
    stride_m, stride_i,
    S, E, TOP_K, blocks, tiles,
    SIGMOID: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Of so many tiles of one sequence: sums of p and counts [programs, E], squares of lse and tokens [programs]."""
    pid = tl.program_id(0)
    # divided in 32 bits: in 64 it is a call
    sequence, block = (pid // blocks).to(tl.int64), (pid % blocks).to(tl.int64)
    cols = tl.arange(0, BLOCK_E)
    sums = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    counts = tl.zeros((BLOCK_M, BLOCK_E), tl.int32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    tokens = tl.zeros((BLOCK_M,), tl.int32)
    for tile in range(tiles):
        first = (block * tiles + tile) * BLOCK_M
        rows, _, counted = _tokens(sequence, first, mask_ptr, S, HAS_MASK, BLOCK_M)
        for j in range(TOP_K):
            i = tl.load(ids_ptr + rows * stride_i + j, mask=counted, other=-1)
            i = tl.where((i >= 0) & (i < E), i, -1).to(tl.int32)
            counts += (cols[None, :] == i[:, None]).to(tl.int32)
        x, most, p, lse = _softmax(logits_ptr, rows, counted, stride_m, E, BLOCK_E)
        if SIGMOID:
            p, _ = _sigmoid(x, most)
        sums += tl.where(counted[:, None], p, 0.0)
        squares += tl.where(counted, lse * lse, 0.0)
        tokens += counted.to(tl.int32)
    pid = pid.to(tl.int64)
    tl.store(sums_ptr + pid * E + cols, tl.sum(sums, axis=0), mask=cols < E)
    tl.store(counts_ptr + pid * E + cols, tl.sum(counts, axis=0), mask=cols < E)
    tl.store(squares_ptr + pid, tl.sum(squares, axis=0))
    tl.store(tokens_ptr + pid, tl.sum(tokens, axis=0))


@triton.jit
def _moe_losses_sum_kernel(
    sums_ptr, squares_ptr, counts_ptr, tokens_ptr, shares_ptr, sequence_squares_ptr, slopes_ptr, chosen_ptr, n_ptr,
    E, blocks, parts,
    BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of some experts of a sequence: their share of balance [G, parts], slopes and choices [G, E]; squares, n [G]."""
    sequence, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cols = part * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((COLUMNS,), tl.float64)
    counts = tl.zeros((COLUMNS,), tl.int64)
    squares = tl.zeros((BLOCKS,), tl.float64)
    tokens = tl.zeros((BLOCKS,), tl.int64)
    for start in range(0, blocks, BLOCKS):
        b = start + tl.arange(0, BLOCKS)
        rows = sequence * blocks + b
        at = rows[:, None] * E + cols[None, :]
        mask = (b < blocks)[:, None] & (cols < E)[None, :]
        sums += tl.sum(tl.load(sums_ptr + at, mask=mask, other=0.0).to(tl.float64), axis=0)
        counts += tl.sum(tl.load(counts_ptr + at, mask=mask, other=0).to(tl.int64), axis=0)
        tokens += tl.load(tokens_ptr + rows, mask=b < blocks, other=0).to(tl.int64)
        squares += tl.load(squares_ptr + rows, mask=b < blocks, other=0.0).to(tl.float64)
    n = tl.sum(tokens, axis=0)
    some = tl.maximum(n, 1).to(tl.float64)
    slopes = counts.to(tl.float64) * E / (some * some)
    tl.store(shares_ptr + sequence * parts + part, tl.sum(slopes * sums, axis=0))
    tl.store(slopes_ptr + sequence * E + cols, slopes.to(tl.float32), mask=cols < E)
    tl.store(chosen_ptr + sequence * E + cols, counts, mask=cols < E)
    if part == 0:
        tl.store(sequence_squares_ptr + sequence, tl.sum(squares, axis=0))
        tl.store(n_ptr + sequence, n)


@triton.jit
def _moe_losses_mean_kernel(
    shares_ptr, squares_ptr, chosen_ptr, n_ptr, balance_ptr, z_ptr, counts_ptr, totals_ptr,
    G, E, parts,
    SEQUENCES: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """balance, z and counts [E] of all sequences; totals: tokens that count, and sequences that have some."""
    cols, part = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_P)
    shares = tl.zeros((SEQUENCES, BLOCK_P), tl.float64)
    squares = tl.zeros((SEQUENCES,), tl.float64)
    tokens = tl.zeros((SEQUENCES,), tl.int64)
    active = tl.zeros((SEQUENCES,), tl.int64)
    counts = tl.zeros((BLOCK_E,), tl.int64)
    for start in range(0, G, SEQUENCES):
        g = start + tl.arange(0, SEQUENCES).to(tl.int64)
        here = g < G
        n = tl.load(n_ptr + g, mask=here, other=0)
        tokens += n
        active += (n > 0).to(tl.int64)
        squares += tl.load(squares_ptr + g, mask=here, other=0.0)
        at = shares_ptr + g[:, None] * parts + part[None, :]
        shares += tl.load(at, mask=here[:, None] & (part < parts)[None, :], other=0.0)
        at = chosen_ptr + g[:, None] * E + cols[None, :]
        counts += tl.sum(tl.load(at, mask=here[:, None] & (cols < E)[None, :], other=0), axis=0)
    N, A = tl.sum(tokens, axis=0).to(tl.float64), tl.sum(active, axis=0).to(tl.float64)
    balance = tl.sum(tl.sum(shares, axis=1), axis=0) / tl.maximum(A, 1.0)
    tl.store(balance_ptr, balance.to(tl.float32))
    tl.store(z_ptr, (tl.sum(squares, axis=0) / tl.maximum(N, 1.0)).to(tl.float32))
    tl.store(counts_ptr + cols, counts, mask=cols < E)
    tl.store(totals_ptr, N.to(tl.float32))
    tl.store(totals_ptr + 1, A.to(tl.float32))


@triton.jit
def _moe_losses_bwd_kernel(
    dbalance_ptr, dz_ptr, logits_ptr, mask_ptr, slopes_ptr, totals_ptr, dlogits_ptr,
    stride_m,
    S, E, blocks,
    SIGMOID: tl.constexpr, HAS_BALANCE: tl.constexpr, HAS_Z: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    sequence, first = (pid // blocks).to(tl.int64), (pid % blocks).to(tl.int64) * BLOCK_M
    cols = tl.arange(0, BLOCK_E)
    rows, inside, counted = _tokens(sequence, first, mask_ptr, S, HAS_MASK, BLOCK_M)
    x, most, softmax, lse = _softmax(logits_ptr, rows, counted, stride_m, E, BLOCK_E)
    dx = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    if HAS_Z:
        by = 2.0 * tl.load(dz_ptr).to(tl.float32) / tl.maximum(tl.load(totals_ptr), 1.0)
        dx = softmax * (by * lse)[:, None]
    if HAS_BALANCE:
        active = tl.maximum(tl.load(totals_ptr + 1), 1.0)
        by = tl.load(dbalance_ptr).to(tl.float32) / active
        slopes = tl.load(slopes_ptr + sequence * E + cols, mask=cols < E, other=0.0)[None, :] * by
        p = softmax
        if SIGMOID:
            p, opposite = _sigmoid(x, most)
        by_score = p * (slopes - tl.sum(p * slopes, axis=1)[:, None])
        if SIGMOID:
            by_score *= opposite
        dx += by_score
    at = dlogits_ptr + rows[:, None] * E + cols[None, :]
    dx = tl.where(counted[:, None], dx, 0.0)
    tl.store(at, dx.to(dlogits_ptr.dtype.element_ty), mask=inside[:, None] & (cols < E)[None, :])


def _tile(M: int, BLOCK_E: int) -> Config:
    """About 8 numbers a thread, who holds two sums of each.  Of few rows too: a program each would write as much as it
    reads."""
    rows = min(M, 32, max(1, 1024 // BLOCK_E))
    return {"BLOCK_M": rows, "num_warps": row_warps(rows * BLOCK_E)}


COUNT = Tunable("moe_losses_count", ("moe_losses",), KEYS, _tile, _space)
BWD = Tunable("moe_losses_bwd", ("moe_losses",), KEYS, _tile, _space)


def _flat(mask: Tensor | None, otherwise: Tensor) -> Tensor:
    return otherwise if mask is None else mask.reshape(-1).contiguous().view(torch.uint8)


def moe_losses_fwd(
    logits: Tensor, ids: Tensor, mask: Tensor | None, sigmoid: bool, per_sequence: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logits [..., E], ids [..., k], mask [...] -> balance, z [] float32, counts [E] int64, slopes [G, E] and totals
    [2] float32."""
    E = logits.shape[-1]
    G = logits.shape[:-2].numel() if per_sequence else 1
    T = logits.shape[:-1].numel()

    def new(dtype: torch.dtype, *shape: int) -> Tensor:
        return (logits.new_empty if T else logits.new_zeros)(shape, dtype=dtype)

    balance, z, slopes, totals = (new(torch.float32, *shape) for shape in ((), (), (G, E), (2,)))
    counts = new(torch.int64, E)
    if T == 0:
        return balance, z, counts, slopes, totals
    S, x, given = T // G, rows_of(logits), rows_of(ids)
    config = _config(COUNT, logits, S, E)
    every = triton.cdiv(S, config["BLOCK_M"])
    least, most = (triton.cdiv(every, triton.cdiv(n, G)) for n in PROGRAMS)  # the tiles of each
    tiles = max(most, min(least, TILES))
    blocks, parts = triton.cdiv(every, tiles), triton.cdiv(E, COLUMNS)
    sums, squares = new(torch.float32, G * blocks, E), new(torch.float32, G * blocks)
    choices, tokens = new(torch.int32, G * blocks, E), new(torch.int32, G * blocks)
    _moe_losses_count_kernel[(G * blocks,)](
        x, given, _flat(mask, x), sums, squares, choices, tokens,
        x.stride(0), given.stride(0),
        S, E, ids.shape[-1], blocks, tiles,
        SIGMOID=sigmoid, HAS_MASK=mask is not None, **config, enable_fp_fusion=True,
    )  # fmt: skip
    shares, sequence_squares = new(torch.float64, G, parts), new(torch.float64, G)
    chosen, n = new(torch.int64, G, E), new(torch.int64, G)
    _moe_losses_sum_kernel[(G, parts)](
        sums, squares, choices, tokens, shares, sequence_squares, slopes, chosen, n,
        E, blocks, parts,
        BLOCKS=min(BLOCKS, triton.next_power_of_2(blocks)), COLUMNS=COLUMNS,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    step = min(SEQUENCES, triton.next_power_of_2(G))
    _moe_losses_mean_kernel[(1,)](
        shares, sequence_squares, chosen, n, balance, z, counts, totals,
        G, E, parts,
        SEQUENCES=step, BLOCK_E=config["BLOCK_E"], BLOCK_P=triton.next_power_of_2(parts),
        num_warps=row_warps(step * config["BLOCK_E"]), enable_fp_fusion=True,
    )  # fmt: skip
    return balance, z, counts, slopes, totals


def moe_losses_bwd(
    dbalance: Tensor | None, dz: Tensor | None, logits: Tensor, mask: Tensor | None, slopes: Tensor, totals: Tensor,
    sigmoid: bool,
) -> Tensor:  # fmt: skip
    """dbalance, dz [], logits [..., E], mask [...], slopes [G, E], totals [2] -> dlogits [..., E] of logits' dtype."""
    E, G, T = logits.shape[-1], slopes.shape[0], logits.shape[:-1].numel()
    dlogits = logits.new_empty(logits.shape)
    if T == 0:
        return dlogits
    S, x = T // G, rows_of(logits)
    config = _config(BWD, logits, S, E)
    blocks = triton.cdiv(S, config["BLOCK_M"])
    _moe_losses_bwd_kernel[(G * blocks,)](
        x if dbalance is None else dbalance, x if dz is None else dz, x, _flat(mask, x), slopes, totals, dlogits,
        x.stride(0),
        S, E, blocks,
        SIGMOID=sigmoid, HAS_BALANCE=dbalance is not None, HAS_Z=dz is not None, HAS_MASK=mask is not None,
        **config, enable_fp_fusion=True,
    )  # fmt: skip
    return dlogits


def variants() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(kernel, signature, constexprs, options) of what the launchers use, to compile offline."""
    found = []
    partial = {"sums_ptr": "*fp32", "squares_ptr": "*fp32", "counts_ptr": "*i32"}
    partial |= {"tokens_ptr": "*i32"}
    sizes = {"S": "i32", "E": "i32", "blocks": "i32"}
    for S, E, t, sigmoid in (
        (64, 128, "*fp32", False),
        (4096, 128, "*bf16", False),
        (4096, 256, "*fp32", True),
        (4096, 256, "*bf16", True),
        (8192, 1024, "*bf16", False),
    ):
        flags = {"BLOCK_E": E, "SIGMOID": sigmoid, "HAS_MASK": True}
        rows = {"logits_ptr": t, "mask_ptr": "*u8", "stride_m": "i32"}
        count = {**rows, "ids_ptr": "*i64", **partial, "stride_i": "i32", **sizes}
        count |= {"TOP_K": "i32", "tiles": "i32"}
        tile, options = split(COUNT.heuristic(S, E))
        found.append((_moe_losses_count_kernel, count, tile | flags, options))
        scalars = dict.fromkeys(("dbalance_ptr", "dz_ptr", "slopes_ptr", "totals_ptr"), "*fp32")
        backward = {**scalars, **rows, "dlogits_ptr": t, **sizes}
        flags |= {"HAS_BALANCE": True, "HAS_Z": True}
        tile, options = split(BWD.heuristic(S, E))
        found.append((_moe_losses_bwd_kernel, backward, tile | flags, options))
    each = {"shares_ptr": "*fp64", "chosen_ptr": "*i64", "n_ptr": "*i64"}
    total = {**partial, **each, "sequence_squares_ptr": "*fp64", "slopes_ptr": "*fp32"}
    total |= {"E": "i32", "blocks": "i32", "parts": "i32"}
    adding = {"BLOCKS": BLOCKS, "COLUMNS": COLUMNS}
    launch = {"num_warps": 4, "enable_fp_fusion": True}
    found.append((_moe_losses_sum_kernel, total, adding, launch))
    mean = {**each, "squares_ptr": "*fp64", "balance_ptr": "*fp32", "z_ptr": "*fp32"}
    mean |= {"counts_ptr": "*i64", "totals_ptr": "*fp32", "G": "i32", "E": "i32", "parts": "i32"}
    for G, E in ((1, 128), (SEQUENCES, 1024)):
        given = {"SEQUENCES": G, "BLOCK_E": E, "BLOCK_P": E // COLUMNS}
        found.append(
            (_moe_losses_mean_kernel, mean, given, launch | {"num_warps": row_warps(G * E)})
        )
    return found
