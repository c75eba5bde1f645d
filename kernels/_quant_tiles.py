"""The launch configurations of quant_linear.py's matrix products.

Their key is (dtype, bits, group, M, N, K): what x is, what the weight is, and the bucketed sizes.
A BLOCK_K that does not divide the group masks its last tile.  SHARES programs divide K between them
where tiles of the output are fewer than a GPU has room for.
"""

import torch
import triton

from ._tune import Config, Tunable, grid

PROGRAMS = 512  # that a large GPU has room for, several to a multiprocessor
SHARED_ROWS = 256  # from which their tiles are enough
MOST_ROWS = 4096  # rows, and
MOST_FEATURES = 32768  # features, from which more make no difference


def is_gemv(dtype: torch.dtype, M: int) -> bool:
    """Whether M rows of x are multiplied without tensor cores: as many as take fewer instructions so, counted
    in sm_90's code; of float32 tensor cores take three products."""
    most = 8 if dtype == torch.float32 else 2
    return most >= M


def columns_of(group: int, widest: int) -> int:
    """Columns a tile: the widest power of two in the group, or one that covers it masked."""
    for block in (128, 64, 32):
        if block <= widest and group % block == 0:
            return block
    return min(widest, 64, max(16, triton.next_power_of_2(group)))


def _tiles(M: int, dtype: torch.dtype) -> Config:
    """The configuration of a matrix product of M rows; BLOCK_K the widest wanted."""
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    if dtype == torch.float32:  # three products and twice the bytes: half the tile
        chosen = (64 if M > 32 else 16, 64, 32, 4, 3)
    elif M <= 32:
        chosen = (16 if M <= 16 else 32, 64, 128, 4, 4)
    elif M <= 128:
        chosen = (64, 64, 64, 4, 4)
    else:
        chosen = (128, 128, 64, 8, 3)
    return dict(zip(names, chosen, strict=True))


def _gemv_heuristic(dtype: torch.dtype, bits: int, group: int, M: int, N: int, K: int) -> Config:
    """Where is_gemv."""
    block_k = columns_of(group, 128)
    # one row keeps 64 codes in flight a thread, or 128 where that leaves programs enough; more rows hold more x,
    # and masked tiles more addresses, so they take fewer columns lest registers spill
    columns = 1024 if M == 1 else 512 if M == 2 else 256
    block_n = 16 if M == 1 and N >= 16 * PROGRAMS else 8
    if group % block_k:
        columns, block_n = 128, 4 if M <= 4 else 2
    block = {"BLOCK_N": block_n, "SPLIT": max(1, columns // block_k), "BLOCK_K": block_k}
    return block | {"num_warps": 4, "num_stages": 1}


def _gemm_heuristic(dtype: torch.dtype, bits: int, group: int, M: int, N: int, K: int) -> Config:
    config = _tiles(M, dtype)
    config |= {"BLOCK_K": columns_of(group, config["BLOCK_K"])}
    if M <= 128 and dtype != torch.float32 and config["BLOCK_K"] * bits < 256:
        config["BLOCK_N"] = 128  # lest a thread loads fewer than 16 bytes
    programs = triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"])
    shares = 1
    while M <= SHARED_ROWS and shares < 8 and 2 * shares * programs <= PROGRAMS:
        # four tiles each at least, a pipeline to fill, and sums that take no more bytes than the codes
        if K // config["BLOCK_K"] < 8 * shares or 2 * shares * M * 64 > K * bits:
            break
        shares *= 2
    return config | {"SHARES": shares}


def _dense_heuristic(dtype: torch.dtype, bits: int, group: int, M: int, N: int, K: int) -> Config:
    """By the bytes, not yet measured: writing w and reading it again takes what a product of some 256 rows does,
    which a library's must save over one that decodes as it goes.  Not float32, of which torch's is no faster."""
    return {"DENSE": int(M >= 512 and dtype != torch.float32)}


def _dgrad_heuristic(dtype: torch.dtype, bits: int, group: int, M: int, N: int, K: int) -> Config:
    """_gemm_heuristic with the output's columns along K, the walk along N."""
    config = _tiles(M, dtype)
    block_n, block_k = min(64, config["BLOCK_K"]), columns_of(group, config["BLOCK_N"])
    return config | {"BLOCK_N": block_n, "BLOCK_K": block_k}


def _widths(group: int) -> tuple[int, ...]:
    """The BLOCK_K that divide a group; where none does, the one that masks it."""
    return tuple(k for k in (32, 64, 128) if group % k == 0) or (columns_of(group, 128),)


def _gemv_space(dtype: torch.dtype, bits: int, group: int, M: int, N: int, K: int) -> list[Config]:
    """Tiles of 256 to 16384 weights."""
    found = grid(
        BLOCK_N=(1, 2, 4, 8, 16), SPLIT=(1, 2, 4, 8, 16, 32, 64), BLOCK_K=_widths(group),
        num_warps=(2, 4, 8), num_stages=(1,),
    )  # fmt: skip
    tile = lambda c: c["BLOCK_N"] * c["SPLIT"] * c["BLOCK_K"]  # noqa: E731
    return [c for c in found if 256 <= tile(c) <= 16384 // M] or [
        _gemv_heuristic(dtype, bits, group, M, N, K)
    ]


def _product_space(
    dtype: torch.dtype, bits: int, group: int, M: int, N: int, K: int
) -> list[Config]:
    """Tiles of which a thread holds 128 sums at most."""
    found = grid(
        BLOCK_M=(16, 32, 64, 128, 256), BLOCK_N=(32, 64, 128), BLOCK_K=_product_widths(group),
        num_warps=(4, 8), num_stages=(2, 3, 4, 5),
    )  # fmt: skip
    return [
        c
        for c in found
        if c["BLOCK_M"] <= max(64, M)
        if c["BLOCK_M"] * max(c["BLOCK_N"], c["BLOCK_K"]) <= 4096 * c["num_warps"]
    ]


def _product_widths(group: int) -> tuple[int, ...]:
    dividing = tuple(k for k in (32, 64, 128) if group % k == 0)
    return dividing or tuple(sorted({columns_of(group, widest) for widest in (32, 64, 128)}))


def _gemm_space(dtype: torch.dtype, bits: int, group: int, M: int, N: int, K: int) -> list[Config]:
    return [
        c | {"SHARES": shares}
        for c in _product_space(dtype, bits, group, M, N, K)
        for shares in (1, 2, 4, 8)
        if shares == 1 or M <= SHARED_ROWS
    ]


def _dense_space(dtype: torch.dtype, *_: int) -> list[Config]:
    return grid(DENSE=(0,) if dtype == torch.float32 else (0, 1))


KEYS = ("dtype", "bits", "group", "M", "N", "K")
OPS = ("quant_linear",)
BOTH = ("quant_linear", "int8_linear")  # whose input gradient is the same
GEMV = Tunable("quant_linear_gemv", OPS, KEYS, _gemv_heuristic, _gemv_space)
GEMM = Tunable("quant_linear_gemm", OPS, KEYS, _gemm_heuristic, _gemm_space)
DENSE = Tunable("quant_linear_dense", OPS, KEYS, _dense_heuristic, _dense_space, is_way=True)
DGRAD = Tunable("quant_linear_dgrad", BOTH, KEYS, _dgrad_heuristic, _product_space)
DENSE_DGRAD = Tunable(
    "quant_linear_dgrad_dense", BOTH, KEYS, _dense_heuristic, _dense_space, is_way=True
)
