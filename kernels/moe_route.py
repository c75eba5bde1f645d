"""Which k experts each token takes, and their weights:  w_j = scale * s_j / (sum_i s_i + 1e-20), or scale * s_j.

s is softmax(logits) or sigmoid(logits) of the k experts of the greatest logits, or of the greatest s + bias
among the best groups.  M rows (tokens), E experts, k of them chosen.  A rank is one 64-bit number, the
order of a float above and the lower id below, so that one maximum finds an expert and ties go to the
lowest.  A row stays in registers; the backward computes its scores again.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tune import Config, Tunable, bucket, grid, split

MOST_ROWS = 8192  # rows, from which more make no difference
LEAST = tl.constexpr(-(1 << 63))


@triton.jit
def _scores(logits_ptr, rows, mask_m, stride_m, E, SIGMOID: tl.constexpr, BLOCK_E: tl.constexpr):
    """Logits of rows [BLOCK_M], -inf from E on, and their scores, from E on 0, but nan in a row of nan; float32
    [BLOCK_M, BLOCK_E]."""
    cols = tl.arange(0, BLOCK_E)
    mask = mask_m[:, None] & (cols < E)[None, :]
    at = rows[:, None] * stride_m + cols[None, :]
    x = tl.load(logits_ptr + at, mask=mask, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        s = 1.0 / (1.0 + tl.exp(-x))
    else:
        p = tl.exp(x - tl.max(x, axis=1)[:, None])  # nan where x is, and so is the sum
        s = p / tl.sum(p, axis=1)[:, None]
    return x, s


@triton.jit
def _ranks(x, N, BLOCK: tl.constexpr):
    """Numbers [.., BLOCK] whose order is x's, nan lowest, ties by the lower column; LEAST from N on."""
    cols = tl.arange(0, BLOCK)[None, :]
    x = tl.where(x != x, float("-inf"), x) + 0.0  # -0 is 0
    bits = x.to(tl.int32, bitcast=True)
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    return tl.where(cols < N, (order << 32) | (BLOCK - 1 - cols), LEAST)


@triton.jit
def _best(ranks, BLOCK: tl.constexpr):
    """The column of each row's greatest rank [BLOCK_M]."""
    return BLOCK - 1 - (tl.max(ranks, axis=1) & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def _kept(
    x, E, GROUPS: tl.constexpr, GROUP_K: tl.constexpr, GROUP_TOP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Whether each expert's group is among the GROUP_K whose GROUP_TOP best have the greatest sum."""
    cols = tl.arange(0, BLOCK_E)[None, :]
    size = E // GROUPS
    group = cols // size
    each = tl.arange(0, BLOCK_G)[None, :]
    totals = tl.zeros((BLOCK_M, BLOCK_G), tl.float32)
    x = tl.where(x != x, float("-inf"), x)
    every = _ranks(x, E, BLOCK_E)
    for g in range(GROUPS):
        ranks = tl.where(group == g, every, LEAST)
        total = tl.zeros((BLOCK_M,), tl.float32)
        for _ in range(GROUP_TOP):
            hit = cols == _best(ranks, BLOCK_E)[:, None]
            total += tl.sum(tl.where(hit, x, 0.0), axis=1)
            ranks = tl.where(hit, LEAST, ranks)
        totals = tl.where(each == g, total[:, None], totals)
    ranks = _ranks(totals, GROUPS, BLOCK_G)
    kept = tl.zeros((BLOCK_M, BLOCK_E), tl.int1)
    for _ in range(GROUP_K):
        best = _best(ranks, BLOCK_G)[:, None]
        kept = kept | (group == best)
        ranks = tl.where(each == best, LEAST, ranks)
    return kept


@triton.jit
def _moe_route_fwd_kernel(
    logits_ptr, bias_ptr, given_ptr, weights_ptr, ids_ptr,
    stride_m, stride_g,
    M, E, TOP_K, scale,
    SIGMOID: tl.constexpr, RENORMALISE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_IDS: tl.constexpr,
    GROUPS: tl.constexpr, GROUP_K: tl.constexpr, GROUP_TOP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < M
    cols = tl.arange(0, BLOCK_E)[None, :]
    slots = tl.arange(0, BLOCK_K)[None, :]
    x, s = _scores(logits_ptr, rows, mask_m, stride_m, E, SIGMOID, BLOCK_E)
    weights = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    ids = tl.zeros((BLOCK_M, BLOCK_K), tl.int32)
    if not HAS_IDS:
        if HAS_BIAS:
            x = s + tl.load(bias_ptr + cols, mask=cols < E, other=0.0).to(tl.float32)
        elif GROUP_K < GROUPS:
            x = s
        ranks = _ranks(x, E, BLOCK_E)
        if GROUP_K < GROUPS:
            kept = _kept(x, E, GROUPS, GROUP_K, GROUP_TOP, BLOCK_M, BLOCK_E, BLOCK_G)
            ranks = tl.where(kept, ranks, LEAST)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for j in range(TOP_K):
        if HAS_IDS:
            i = tl.load(given_ptr + rows * stride_g + j, mask=mask_m, other=-1)
            hit = (cols == i[:, None]) & (cols < E)  # none where i is no expert's
        else:
            i = _best(ranks, BLOCK_E)
            hit = cols == i[:, None]
            ranks = tl.where(hit, LEAST, ranks)
            ids = tl.where(slots == j, i[:, None], ids)
        w = tl.sum(tl.where(hit, s, 0.0), axis=1)
        total += w
        weights = tl.where(slots == j, w[:, None], weights)
    if RENORMALISE:
        weights = weights / (total + 1e-20)[:, None]
    to = rows[:, None] * TOP_K + slots
    mask = mask_m[:, None] & (slots < TOP_K)
    tl.store(weights_ptr + to, weights * scale, mask=mask)
    if not HAS_IDS:
        tl.store(ids_ptr + to, ids.to(tl.int64), mask=mask)


@triton.jit
def _moe_route_bwd_kernel(
    dweights_ptr, logits_ptr, ids_ptr, dlogits_ptr,
    stride_dm, stride_m,
    M, E, TOP_K, scale,
    SIGMOID: tl.constexpr, RENORMALISE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """ds_j = scale (g_j - sum_i g_i s_i / S) / S with S = sum_i s_i + 1e-20, or scale g_j; then
    dx = ds s (1 - s), or s (ds - sum ds s)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < M
    cols = tl.arange(0, BLOCK_E)[None, :]
    slots = tl.arange(0, BLOCK_K)[None, :]
    _, s = _scores(logits_ptr, rows, mask_m, stride_m, E, SIGMOID, BLOCK_E)
    ds = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)  # of each expert: the gradients of its slots
    taken = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)  # how many those are: an id may come twice
    weights = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    grads = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for j in range(TOP_K):
        i = tl.load(ids_ptr + rows * TOP_K + j, mask=mask_m, other=-1)
        g = tl.load(dweights_ptr + rows * stride_dm + j, mask=mask_m, other=0.0).to(tl.float32)
        hit = (cols == i[:, None]) & (cols < E)
        ds += tl.where(hit, g[:, None], 0.0)
        if RENORMALISE:
            taken += tl.where(hit, 1.0, 0.0)
            w = tl.sum(tl.where(hit, s, 0.0), axis=1)
            weights = tl.where(slots == j, w[:, None], weights)
            grads = tl.where(slots == j, g[:, None], grads)
    if RENORMALISE:
        total = tl.sum(weights, axis=1) + 1e-20
        # divided first: of one expert the weight is 1 and the gradient 0
        dot = tl.sum(grads * (weights / total[:, None]), axis=1)
        ds = tl.where(taken > 0.0, (ds - taken * dot[:, None]) / total[:, None], 0.0)
    ds *= scale
    if not SIGMOID:
        ds -= tl.sum(ds * s, axis=1)[:, None]
    dx = ds * s
    if SIGMOID:
        dx *= 1.0 - s
    to = dlogits_ptr + rows[:, None] * E + cols
    tl.store(to, dx, mask=mask_m[:, None] & (cols < E))


def _heuristic(M: int, BLOCK_E: int) -> Config:
    """A row a program where they are few; else about 8 numbers a thread, what a 16-byte load holds at most."""
    rows = 1 if M <= 64 else min(32, max(1, 1024 // BLOCK_E))
    return {"BLOCK_M": rows, "num_warps": max(1, BLOCK_E // 256, min(4, rows))}


def _space(M: int, BLOCK_E: int) -> list[Config]:
    found = grid(BLOCK_M=(1, 2, 4, 8, 16, 32), num_warps=(1, 2, 4, 8))
    threads = lambda c: 32 * c["num_warps"]  # noqa: E731
    numbers = lambda c: c["BLOCK_M"] * BLOCK_E  # noqa: E731
    return [
        c
        for c in found
        if numbers(c) <= 64 * threads(c) and (numbers(c) >= threads(c) or c["num_warps"] == 1)
    ]


KEYS = ("M", "BLOCK_E")
FWD = Tunable("moe_route_fwd", ("moe_route",), KEYS, _heuristic, _space)
BWD = Tunable("moe_route_bwd", ("moe_route",), KEYS, _heuristic, _space)


def _config(tunable: Tunable, logits: Tensor, M: int, E: int) -> dict[str, Any]:
    block = max(16, triton.next_power_of_2(E))
    return {**tunable(logits.device, bucket(M, MOST_ROWS), block), "BLOCK_E": block}


def _rows(t: Tensor, columns: int) -> Tensor:
    """t [..., columns] as [M, columns] with a last stride of 1."""
    t = t.reshape(-1, columns)
    return t if t.stride(-1) == 1 else t.contiguous()


def moe_route_fwd(
    logits: Tensor, bias: Tensor | None, ids: Tensor | None, k: int, groups: int, group_k: int, group_top: int,
    sigmoid: bool, renormalise: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """logits [..., E], bias [E], ids [..., k] -> weights [..., k] float32, ids [..., k] int64, or none where they
    are given."""
    E = logits.shape[-1]
    weights = logits.new_empty((*logits.shape[:-1], k), dtype=torch.float32)
    found = weights.new_empty(weights.shape if ids is None else 0, dtype=torch.int64)
    M = weights.numel() // k
    if M == 0:
        return weights, found
    x = _rows(logits, E)
    given = found.view(M, k) if ids is None else _rows(ids, k)
    config = _config(FWD, logits, M, E)
    _moe_route_fwd_kernel[(triton.cdiv(M, config["BLOCK_M"]),)](
        x, x if bias is None else bias.contiguous(), given, weights, found,
        x.stride(0), given.stride(0),
        M, E, k, scale,
        SIGMOID=sigmoid, RENORMALISE=renormalise, HAS_BIAS=bias is not None, HAS_IDS=ids is not None,
        GROUPS=groups, GROUP_K=group_k, GROUP_TOP=min(group_top, E // groups),
        BLOCK_K=triton.next_power_of_2(k), BLOCK_G=triton.next_power_of_2(groups),
        **config, enable_fp_fusion=True,
    )  # fmt: skip
    return weights, found


def moe_route_bwd(
    dweights: Tensor, logits: Tensor, ids: Tensor, sigmoid: bool, renormalise: bool, scale: float
) -> Tensor:
    """dweights [..., k], logits [..., E], ids [..., k] -> dlogits [..., E] of logits' dtype."""
    E, k = logits.shape[-1], ids.shape[-1]
    dlogits = logits.new_empty(logits.shape)
    M = ids.numel() // k
    if M == 0:
        return dlogits
    x, dw, given = _rows(logits, E), _rows(dweights, k), ids.reshape(M, k).contiguous()
    config = _config(BWD, logits, M, E)
    _moe_route_bwd_kernel[(triton.cdiv(M, config["BLOCK_M"]),)](
        dw, x, given, dlogits,
        dw.stride(0), x.stride(0),
        M, E, k, scale,
        SIGMOID=sigmoid, RENORMALISE=renormalise, BLOCK_K=triton.next_power_of_2(k),
        **config, enable_fp_fusion=True,
    )  # fmt: skip
    return dlogits


def variants() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(kernel, signature, constexprs, options) of what the launchers use, to compile offline."""
    sizes = {"M": "i32", "E": "i32", "TOP_K": "i32", "scale": "fp32"}
    found = []
    for M, E, t, grouped in (
        (64, 128, "*fp32", False),
        (4096, 128, "*bf16", False),
        (4096, 256, "*fp32", True),
        (8192, 1024, "*bf16", False),
    ):
        tile, options = split(FWD.heuristic(M, E))
        tile |= {"BLOCK_E": E, "BLOCK_K": 8, "SIGMOID": grouped, "RENORMALISE": True}
        given = {"HAS_BIAS": grouped, "HAS_IDS": False, "BLOCK_G": 8 if grouped else 1}
        given |= {"GROUPS": given["BLOCK_G"], "GROUP_K": 4 if grouped else 1, "GROUP_TOP": 2}
        forward = {"logits_ptr": t, "bias_ptr": "*fp32", "given_ptr": "*i64"}
        forward |= {"weights_ptr": "*fp32", "ids_ptr": "*i64", "stride_m": "i32", "stride_g": "i32"}
        found.append((_moe_route_fwd_kernel, forward | sizes, tile | given, options))
        backward = {"dweights_ptr": "*fp32", "logits_ptr": t, "ids_ptr": "*i64", "dlogits_ptr": t}
        backward |= {"stride_dm": "i32", "stride_m": "i32"}
        found.append((_moe_route_bwd_kernel, backward | sizes, tile, options))
    return found
