"""What attention's kernels may load and must compute, for test_traffic.py: formulas in sizes and tiles."""

import itertools
from math import ceil
from pathlib import Path
from types import ModuleType

import torch

from tilewright.bench import harness

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
FP32, BF16 = torch.float32, torch.bfloat16


def definition(op: str) -> ModuleType:
    return harness.load(BENCHMARKS / f"bench_{op}.py")


def power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def attention_tiles(e: int, S: int, T: int, D: int) -> tuple[int, int, int, list[int]]:
    """BLOCK_M, BLOCK_N, BLOCK_D, and the keys each block of queries visits."""
    from tilewright.kernels._tile import padded
    from tilewright.kernels.attention import FWD

    config = FWD.heuristic(FP32 if e == 4 else BF16, padded(D), True, S)
    m, n = config["BLOCK_M"], config["BLOCK_N"]
    ends = [min(first + m + T - S, T) for first in range(0, S, m)]
    return m, n, padded(D), [ceil(end / n) * n for end in ends]


def attention_loads(e: int, *, B: int, H: int, G: int, S: int, T: int, D: int) -> int:
    *_, visited = attention_tiles(e, S, T, D)
    return B * H * (S + 2 * sum(min(keys, T) for keys in visited)) * D * e


def attention_flops(e: int, *, B: int, H: int, G: int, S: int, T: int, D: int) -> int:
    m, _, d, visited = attention_tiles(e, S, T, D)
    return B * H * sum(visited) * m * d * 4


def documents(N: int, S: int) -> tuple[list[int], list[int]]:
    """Of each packed query the first key it sees, and past the last, causal."""
    starts = definition("attention_varlen").starts_of(N, S)
    begins = [a for a, b in itertools.pairwise(starts) for _ in range(a, b)]
    return begins, list(range(1, N * S + 1))


def spans(begins: list[int], ends: list[int], block: int, tile: int) -> list[tuple[int, int]]:
    """Of each block of queries the keys in the tiles it meets: from a whole tile on, to the last key
    that a tile holds."""
    found = []
    for i in range(0, len(begins), block):
        begin = min(begins[i : i + block]) // tile * tile
        end = max(ends[i : i + block])
        found.append((begin, begin + ceil((end - begin) / tile) * tile))
    return found


def varlen_spans(e: int, N: int, S: int, D: int) -> tuple[int, int, list[tuple[int, int]]]:
    from tilewright.kernels._tile import padded
    from tilewright.kernels.attention import FWD

    config = FWD.heuristic(FP32 if e == 4 else BF16, padded(D), True, power(N * S))
    m, n = config["BLOCK_M"], config["BLOCK_N"]
    return m, padded(D), spans(*documents(N, S), m, n)


def varlen_loads(e: int, *, N: int, H: int, G: int, S: int, D: int) -> int:
    *_, met = varlen_spans(e, N, S, D)
    keys = sum(min(end, N * S) - begin for begin, end in met)
    return H * ((N * S + 2 * keys) * D * e + 8 * N * S)  # of a query, where its keys begin and end


def varlen_flops(e: int, *, N: int, H: int, G: int, S: int, D: int) -> int:
    m, d, met = varlen_spans(e, N, S, D)
    return 4 * H * sum(end - begin for begin, end in met) * m * d


def decode_splits(e: int, B: int, H: int, G: int, T: int, D: int, page: int) -> tuple[int, int]:
    """Splits, and BLOCK_N."""
    from tilewright.kernels import attention_decode as kernels
    from tilewright.kernels._tile import padded

    n = kernels.LAUNCH.heuristic(FP32 if e == 4 else BF16, padded(D), H // G)["BLOCK_N"]
    room = ceil(T / page) * page
    return kernels.splits_for(torch.device("cpu"), B * G, room, n), n


def decode_loads(e: int, *, B: int, H: int, G: int, T: int, D: int, page: int) -> int:
    splits, _ = decode_splits(e, B, H, G, T, D, page)
    keys = sum(definition("attention_decode").lengths_of(B, T))
    # the length once a program; of each key the number of its page
    loaded = splits * (B * H * D * e + 4 * B * G) + G * keys * (2 * D * e + (4 if page < T else 0))
    return loaded + (B * H * (4 + 4 * splits * (D + 2)) if splits > 1 else 0)


def decode_flops(e: int, *, B: int, H: int, G: int, T: int, D: int, page: int) -> int:
    from tilewright.kernels._tile import padded
    from tilewright.kernels.attention_decode import block_rows

    _, n = decode_splits(e, B, H, G, T, D, page)
    rows = block_rows(FP32 if e == 4 else BF16, H // G)
    blocks = sum(ceil(length / n) for length in definition("attention_decode").lengths_of(B, T))
    return 4 * G * blocks * n * rows * padded(D)


def decode_told(B: int, H: int, G: int, T: int, D: int, page: int) -> int:
    """lse; and of splits, written and read again, the outputs, maxima and sums, and again the lengths."""
    told = []
    for e in (2, 4):
        splits, _ = decode_splits(e, B, H, G, T, D, page)
        told.append(B * H + (2 * B * H * splits * (D + 2) + B if splits > 1 else 0))
    return max(told)


def attention_backward(
    e: int, *, B: int, H: int, G: int, S: int, T: int, D: int
) -> tuple[int, int, int, int]:
    from tilewright.kernels._attention_bwd import DKV, DQ
    from tilewright.kernels._tile import padded

    key = FP32 if e == 4 else BF16, padded(D), True, power(S)
    dq, dkv = DQ.heuristic(*key), DKV.heuristic(*key)
    stats = 4 * 4 * B * H * S  # four floats a row, from one kernel to the other
    m, n, d = dq["BLOCK_M"], dq["BLOCK_N"], padded(D)
    keys = [min(first + m + T - S, T) for first in range(0, S, m)]
    visited = [ceil(k / n) * n for k in keys]
    loaded = B * H * (2 * S + 2 * sum(min(k, T) for k in visited)) * D * e
    flops = 8 * B * H * sum(visited) * m * d
    m, n = dkv["BLOCK_M"], dkv["BLOCK_N"]
    # the queries that see a block of keys, from a whole tile on
    rows = [max(S - max(first - (T - S), 0) // m * m, 0) for first in range(0, T, n)]
    loaded += 2 * B * G * T * D * e + B * H * sum(rows) * (2 * D * e + 16)
    flops += 8 * B * H * sum(ceil(r / m) for r in rows) * m * n * d
    # with no atomics q, k, v and dout are read by both kernels
    again = (2 * B * H * S + 2 * B * G * T) * D * e
    return again + 2 * stats, loaded, (B * H * S + 2 * B * G * T) * D * e + stats, flops


def varlen_backward(e: int, *, N: int, H: int, G: int, S: int, D: int) -> tuple[int, int, int, int]:
    from tilewright.kernels._attention_bwd import DKV, DQ
    from tilewright.kernels._tile import padded

    T, d = N * S, padded(D)
    key = FP32 if e == 4 else BF16, d, True, power(T)
    dq, dkv = DQ.heuristic(*key), DKV.heuristic(*key)
    begins, ends = documents(N, S)
    stats = 4 * 4 * H * T
    m, n = dq["BLOCK_M"], dq["BLOCK_N"]
    met = spans(begins, ends, m, n)
    keys = sum(min(end, T) - begin for begin, end in met)
    loaded = H * ((2 * T + 2 * keys) * D * e + 8 * T)
    flops = 8 * H * sum(end - begin for begin, end in met) * m * d
    m, n = dkv["BLOCK_M"], dkv["BLOCK_N"]
    # a key is seen from its own query on, to its document's last
    lasts = [max(i for i in range(T) if begins[i] == begins[j]) + 1 for j in range(T)]
    met = spans(list(range(T)), lasts, n, m)
    rows = sum(min(end, T) - begin for begin, end in met)
    loaded += 2 * G * T * D * e + 8 * G * T + H * rows * (2 * D * e + 16 + 8)
    flops += 8 * H * sum(end - begin for begin, end in met) * n * d
    again = (2 * H * T + 2 * G * T) * D * e
    # both kernels ask of a query where its keys begin and end, one of a key which queries see it
    return again + 2 * stats + 24 * T, loaded, (H * T + 2 * G * T) * D * e + stats, flops
