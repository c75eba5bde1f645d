"""What a mixture of experts' kernels may load, for test_traffic.py: formulas in sizes and tiles."""

from math import ceil
from typing import Any

import torch

ROUTE = ({"T": 70, "E": 60, "K": 4}, {"T": 5, "E": 128, "K": 8, "grouped": True})
LOSSES = (
    {"B": 1, "S": 70, "E": 60, "K": 4},
    {"B": 3, "S": 5, "E": 128, "K": 8, "sigmoid": True},
)
DISPATCH = ({"T": 5, "E": 7, "K": 2}, {"T": 70, "E": 60, "K": 4})
# of every expert for every token, so that each has as many
EXPERTS = (
    {"T": 5, "E": 3, "K": 3, "D": 96, "I": 40},
    {"T": 40, "E": 2, "K": 2, "D": 64, "I": 128},
    {"T": 40, "E": 2, "K": 2, "D": 64, "I": 128, "R": 16},
)
QUANT = (
    {"T": 5, "E": 3, "K": 3, "D": 96, "I": 64, "bits": 4, "group": 32},
    {"T": 40, "E": 2, "K": 2, "D": 64, "I": 128, "bits": 8, "group": 64},
    {"T": 40, "E": 2, "K": 2, "D": 64, "I": 128, "bits": 8, "group": 64, "R": 16},
)
COMBINE = ({"T": 5, "K": 3, "D": 96}, {"T": 3, "K": 2, "D": 5000})


def power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def route_rows(T: int, E: int) -> int:
    """Rows of a program."""
    from tilewright.kernels.moe_route import FWD

    return FWD.heuristic(power(T), max(16, power(E)))["BLOCK_M"]


def route_loads(e: int, *, T: int, E: int, K: int, grouped: bool = False) -> int:
    """Logits once, the bias once a block of rows."""
    return T * E * e + (ceil(T / route_rows(T, E)) * 4 * E if grouped else 0)


def route_backward(
    e: int, *, T: int, E: int, K: int, grouped: bool = False
) -> tuple[int, int, int, int]:
    return 0, T * E * e + 12 * T * K, T * E * e, 0


def losses_sizes(B: int, S: int, E: int, sigmoid: bool) -> tuple[int, int, int, int]:
    """Sequences, blocks and programs of a sequence that count and add, and blocks of the backward."""
    from tilewright.kernels.moe_losses import BWD, COLUMNS, COUNT

    G, S = (B, S) if sigmoid else (1, B * S)
    # few: a tile each
    blocks, back = (
        ceil(S / tunable.heuristic(power(S), max(16, power(E)))["BLOCK_M"])
        for tunable in (COUNT, BWD)
    )
    return G, blocks, ceil(E / COLUMNS), back


def losses_told(B: int, S: int, E: int, K: int, sigmoid: bool = False) -> int:
    """Numbers of four bytes: of blocks, of sequences in eight, both stored and loaded; slopes and totals."""
    G, blocks, parts, _ = losses_sizes(B, S, E, sigmoid)
    return 2 * G * blocks * (2 * E + 2) + 4 * G * (parts + E + 2) + G * E + 2


def losses_loads(e: int, *, B: int, S: int, E: int, K: int, sigmoid: bool = False) -> int:
    """Logits and ids once; sums and counts once, squares and tokens for every few experts."""
    G, blocks, parts, _ = losses_sizes(B, S, E, sigmoid)
    blocked = 8 * G * blocks * (E + parts)
    return B * S * (E * e + 8 * K) + blocked + 8 * G * (parts + E + 2)


def losses_backward(
    e: int, *, B: int, S: int, E: int, K: int, sigmoid: bool = False
) -> tuple[int, int, int, int]:
    """Slopes, gradients and totals once a block of rows."""
    G, _, _, blocks = losses_sizes(B, S, E, sigmoid)
    return 0, B * S * E * e + G * blocks * (4 * E + 16), B * S * E * e, 0


def dispatch_counts(T: int, E: int, K: int) -> int:
    """Numbers of four bytes: how many slots each block has of each expert."""
    from tilewright.kernels.moe_dispatch import BLOCK

    return ceil(T * K / BLOCK) * E


def dispatch_loads(e: int, *, T: int, E: int, K: int) -> int:
    """Ids twice; the counts, added up, and the totals, once a block."""
    return 16 * T * K + 12 * dispatch_counts(T, E, K)


def dispatch_told(T: int, E: int, K: int) -> int:
    """Ids again, counts stored and loaded twice, totals."""
    return 2 * T * K + 4 * dispatch_counts(T, E, K) + 2 * E


def combine_loads(e: int, *, T: int, K: int, D: int) -> int:
    from tilewright.kernels.moe_combine import WHOLE

    return T * K * D * e + 12 * T * K * ceil(D / WHOLE)


def combine_backward(e: int, *, T: int, K: int, D: int) -> tuple[int, int, int, int]:
    """The last offset, which every row asks for."""
    return 8, 2 * T * K * D * e + 20 * T * K, T * K * D * e + 4 * T * K, 0


def tiles(
    tunable: Any, e: int, T: int, E: int, N: int, K: int, thin: bool = False
) -> tuple[dict[str, int], int, int, int]:
    """A product's tile, its tiles of rows an expert and of columns, and the bytes of offsets its programs load."""
    from tilewright.kernels._moe import most_tiles
    from tilewright.kernels._moe_products import narrowed
    from tilewright.kernels._tune import fitted

    t = tunable.heuristic(torch.float32 if e == 4 else torch.bfloat16, power(T), power(N), power(K))
    t = fitted(t, K)
    if thin:
        t = narrowed(t, BLOCK_N=N)
    columns = ceil(N / t["BLOCK_N"])
    return t, ceil(T / t["BLOCK_M"]), columns, 16 * E * columns * most_tiles(T * E, E, t["BLOCK_M"])


def rank(e: int, R: int) -> int:
    """R as tl.dot has it."""
    from tilewright.kernels._moe_products import rank_block

    block = rank_block(torch.float32 if e == 4 else torch.bfloat16, R)
    return ceil(R / block) * block if R else 0


def products(e: int, T: int, E: int, D: int, I: int, R: int = 0) -> dict[str, tuple[Any, ...]]:
    """Of each product with a weight: as tiles says, and the FLOPs of one, what an adapter adds included."""
    from tilewright.kernels import _moe_products as shared
    from tilewright.kernels._moe_experts_bwd import DH
    from tilewright.kernels.moe_experts import UP

    found = {}
    for name, tunable, N, K in (
        ("up", UP, I, D), ("down", shared.DOWN, D, I), ("dh", DH, I, D), ("dx", shared.DX, D, 2 * I),
    ):  # fmt: skip
        t, rows, columns, offsets = tiles(tunable, e, T, E, N, K)
        area = E * rows * t["BLOCK_M"] * columns * t["BLOCK_N"]
        walked = ceil(K / t["BLOCK_K"]) * t["BLOCK_K"] + rank(e, R)
        found[name] = rows, columns, offsets, 2 * area * walked
    return found


def thin_product(
    e: int, T: int, E: int, R: int, K: int, *, back: bool = False, tokens: bool = False
) -> tuple[int, int]:
    """Bytes loaded and FLOPs of an adapter's product of rows of K."""
    from tilewright.kernels._moe_products import DOWN, DX

    t, rows, columns, offsets = tiles(DX if back else DOWN, e, T, E, R, K, True)
    loaded = offsets + columns * T * E * (K * e + 8 * tokens) + rows * E * R * K * e
    area = E * rows * t["BLOCK_M"] * columns * t["BLOCK_N"]
    return loaded, 2 * area * ceil(K / t["BLOCK_K"]) * t["BLOCK_K"]


def thin_forward(e: int, T: int, E: int, D: int, I: int, R: int) -> tuple[int, int]:
    """Of u13 and u2."""
    both = thin_product(e, T, E, R, D, tokens=True), thin_product(e, T, E, R, I)
    return both[0][0] + both[1][0], both[0][1] + both[1][1]


def gradient(
    e: int, T: int, E: int, N: int, K: int, *, scaled: bool, thin: bool = False
) -> tuple[int, int]:
    """Bytes loaded and FLOPs of a weight's gradient [E, N, K]."""
    from tilewright.kernels._moe_products import DW, narrowed

    dtype = torch.float32 if e == 4 else torch.bfloat16
    t = DW.heuristic(dtype, power(T), power(N), power(K))
    if thin:
        t = narrowed(t, BLOCK_N=N, BLOCK_K=K)
    down, across, P = ceil(N / t["BLOCK_N"]), ceil(K / t["BLOCK_K"]), T * E
    loaded = down * across * (16 * E + (12 if scaled else 8) * P) + P * (across * N + down * K) * e
    area = E * down * t["BLOCK_N"] * across * t["BLOCK_K"]
    return loaded, 2 * area * ceil(T / t["BLOCK_M"]) * t["BLOCK_M"]


def thin_backward(e: int, T: int, E: int, D: int, I: int, R: int) -> tuple[int, int]:
    """Bytes loaded and FLOPs of v2, v13, u13 and u2 again, and of the adapters' gradients."""
    found = [
        thin_product(e, T, E, R, D, back=True, tokens=True),
        thin_product(e, T, E, R, 2 * I, back=True),
        thin_forward(e, T, E, D, I, R),
        gradient(e, T, E, R, D, scaled=False, thin=True),
        gradient(e, T, E, 2 * I, R, scaled=False, thin=True),
        gradient(e, T, E, R, I, scaled=True, thin=True),
        gradient(e, T, E, D, R, scaled=True, thin=True),
    ]
    return sum(loaded for loaded, _ in found), sum(flops for _, flops in found)


def experts_between(e: int, *, T: int, E: int, K: int, D: int, I: int, R: int = 0) -> int:
    """Bytes that one launch tells the next: where tokens are, a and y, and the last offset; u13 and u2, and for them
    tokens and a again."""
    P = T * K
    placed = 24 * P + 8 * (E + 1) + 4 * dispatch_told(T, E, K)
    more = (4 * P * R + T * D + P * I) * e + 16 * (E + 1) + 8 * P if R else 0
    return placed + 16 * (E + 1) + 8 + 8 * P + 2 * P * (I + D) * e + more


def summed_loads(e: int, T: int, K: int, D: int) -> int:
    """As moe_combine's, and the last offset."""
    from tilewright.kernels.moe_combine import WHOLE

    return combine_loads(e, T=T, K=K, D=D) + 8 * T * ceil(D / WHOLE)


def experts_loads(e: int, *, T: int, E: int, K: int, D: int, I: int, R: int = 0) -> int:
    P, of = T * K, products(e, T, E, D, I, R)
    (up_rows, up_columns, up_offsets, _), (rows, columns, offsets, _) = of["up"], of["down"]
    up = up_offsets + up_columns * P * (8 + D * e) + up_rows * 2 * E * I * (D + R) * e
    down = offsets + columns * P * (I + R) * e + rows * E * D * (I + R) * e
    thin = 2 * up_columns * P * R * e + thin_forward(e, T, E, D, I, R)[0] if R else 0
    return dispatch_loads(e, T=T, E=E, K=K) + up + down + thin + summed_loads(e, T, K, D)


def experts_flops(e: int, *, T: int, E: int, K: int, D: int, I: int, R: int = 0) -> int:
    of = products(e, T, E, D, I, R)
    return 2 * of["up"][3] + of["down"][3] + (thin_forward(e, T, E, D, I, R)[1] if R else 0)


def experts_backward(
    e: int, *, T: int, E: int, K: int, D: int, I: int, R: int = 0
) -> tuple[int, int, int, int]:
    """With adapters of theirs and not of w13 and w2; dout and x then once more for each product with tokens."""
    P, of = T * K, products(e, T, E, D, I, R)
    (dh_rows, dh_columns, dh_offsets, dh_flops), (rows, columns, offsets, dx_flops) = (
        of["dh"],
        of["dx"],
    )
    parts = 4 * P * dh_columns
    loaded = dh_offsets + dh_columns * P * (12 + (D + R) * e) + dh_rows * E * (D + R) * I * e
    loaded += 2 * P * I * e
    loaded += offsets + columns * P * (2 * I + R) * e + rows * E * D * (2 * I + R) * e
    loaded += summed_loads(e, T, K, D)
    stored = (3 * P * I + P * D + T * D) * e + parts
    if R:
        more = (3 * T * D + 11 * P * I + 2 * P * D + 10 * P * R + E * R * (D + I)) * e
        more += 64 * P + 80 * (E + 1) + 8 + parts
        of_weights = [thin_backward(e, T, E, D, I, R)]
        stored += (4 * P * R + E * R * (2 * D + 3 * I)) * e
    else:
        more = (T * D + 8 * P * I + 2 * P * D) * e + 28 * P + 32 * (E + 1) + 8 + parts
        of_weights = [
            gradient(e, T, E, 2 * I, D, scaled=False),
            gradient(e, T, E, D, I, scaled=True),
        ]
        stored += 3 * E * D * I * e
    loaded += sum(bytes_loaded for bytes_loaded, _ in of_weights)
    return more, loaded, stored, dh_flops + dx_flops + sum(flops for _, flops in of_weights)


def quant_product(
    tunable: Any, e: int, T: int, E: int, N: int, K: int, bits: int, group: int
) -> tuple[dict[str, int], int, int, int]:
    """A product's tile, tiles of rows an expert, columns' tiles in the weight's rows, and the bytes of that weight a
    tile of rows loads: codes once, scales and zero-points once a tile."""
    from tilewright.kernels._quant_moe import finished, tiles_in
    from tilewright.kernels._quant_weight import SYMMETRIC, ZEROS

    dtype = torch.float32 if e == 4 else torch.bfloat16
    t = tunable.heuristic(dtype, bits, group, power(T), power(N), power(K))
    t = finished(t, dtype, group, ZEROS if bits == 4 else SYMMETRIC)
    tiles = K // group * tiles_in(group, t)
    return t, ceil(T / t["BLOCK_M"]), tiles, N * (K * bits // 8 + tiles * (4 if bits == 4 else 2))


def quant_offsets(t: dict[str, int], T: int, E: int, columns: int) -> int:
    from tilewright.kernels._moe import most_tiles

    return 16 * E * columns * most_tiles(T * E, E, t["BLOCK_M"])


def quant_between(
    e: int, *, T: int, E: int, K: int, D: int, I: int, bits: int, group: int, R: int = 0
) -> int:  # fmt: skip
    return experts_between(e, T=T, E=E, K=K, D=D, I=I, R=R)


def quant_loads(
    e: int, *, T: int, E: int, K: int, D: int, I: int, bits: int, group: int, R: int = 0
) -> int:  # fmt: skip
    from tilewright.kernels.quant_moe_experts import DOWN, UP

    P, loaded = T * K, dispatch_loads(e, T=T, E=E, K=K) + summed_loads(e, T, K, D)
    t, rows, _, weight = quant_product(UP, e, T, E, I, D, bits, group)
    columns = ceil(I / t["BLOCK_N"])
    loaded += quant_offsets(t, T, E, columns) + columns * P * (8 + D * e) + rows * E * 2 * weight
    loaded += (columns * 2 * P + rows * E * 2 * I) * R * e
    t, rows, _, weight = quant_product(DOWN, e, T, E, D, I, bits, group)
    columns = ceil(D / t["BLOCK_N"])
    loaded += (columns * P + rows * E * D) * R * e
    loaded += quant_offsets(t, T, E, columns) + columns * P * I * e + rows * E * weight
    return loaded + (thin_forward(e, T, E, D, I, R)[0] if R else 0)


def quant_flops(
    e: int, *, T: int, E: int, K: int, D: int, I: int, bits: int, group: int, R: int = 0
) -> int:  # fmt: skip
    from tilewright.kernels.quant_moe_experts import DOWN, UP

    done = thin_forward(e, T, E, D, I, R)[1] if R else 0
    for tunable, N, width, products in ((UP, I, D, 2), (DOWN, D, I, 1)):
        t, rows, tiles, _ = quant_product(tunable, e, T, E, N, width, bits, group)
        area = E * rows * t["BLOCK_M"] * ceil(N / t["BLOCK_N"]) * t["BLOCK_N"]
        done += 2 * products * area * (tiles * t["BLOCK_K"] + rank(e, R))
    return done


def quant_backward(
    e: int, *, T: int, E: int, K: int, D: int, I: int, bits: int, group: int, R: int = 0
) -> tuple[int, int, int, int]:
    """Of dh and dx the launches' key has N and K of the forward's sense, the tile its own columns."""
    from tilewright.kernels._quant_moe_experts_bwd import DH, DX

    P, flops, loaded = T * K, 0, summed_loads(e, T, K, D)
    parts = 0
    for tunable, N, columns, walked in ((DH, I, I, D), (DX, D, D, 2 * I)):
        t, rows, tiles, _ = quant_product(
            tunable, e, T, E, N, walked, bits, group
        )  # whose tiles are of what is walked
        tiles = columns // group * ceil(group / t["BLOCK_K"])
        scales = tiles * (4 if bits == 4 else 2)
        loaded += rows * E * walked * (columns * bits // 8 + scales)
        loaded += quant_offsets(t, T, E, tiles) + tiles * P * (walked + R) * e
        loaded += rows * E * columns * R * e
        area = E * rows * t["BLOCK_M"] * tiles * t["BLOCK_K"]
        flops += 2 * area * (ceil(walked / t["BLOCK_N"]) * t["BLOCK_N"] + rank(e, R))
        if tunable is DH:
            parts, loaded = 4 * P * tiles, loaded + 12 * P * tiles + 2 * P * I * e
    stored = (2 * P * I + P * D + T * D) * e + parts
    more = (4 * P * I + 2 * P * D) * e + parts + 8 * P + 16 * (E + 1) + 8
    if R:  # a too, and what the dense weights' adapters ask for
        thin_loaded, thin_flops = thin_backward(e, T, E, D, I, R)
        loaded, flops = loaded + thin_loaded, flops + thin_flops
        stored += (P * I + 4 * P * R + E * R * (2 * D + 3 * I)) * e
        more += (3 * T * D + 7 * P * I + 10 * P * R + E * R * (D + I)) * e + 56 * P + 64 * (E + 1)
    return more, loaded, stored, flops


# what the forward's launches tell each other
BETWEEN = {"moe_experts": experts_between, "quant_moe_experts": quant_between}
