"""Floats that numpy lacks, as the interpreter holds them: bfloat16 in uint16, float8 in uint8."""

import numpy as np
import torch
import triton.language as tl

FLOAT8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits, uint16 -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(x: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits, to the nearest even."""
    x = np.ascontiguousarray(x, np.float32)
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def tf32(x: np.ndarray) -> np.ndarray:
    """float32 rounded to 10 bits of mantissa, to the nearest, ties away, as cvt.rna.tf32 does."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)


def to_float32(data: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    if dtype == tl.bfloat16:
        return widen(data)
    if dtype in FLOAT8:
        bits = torch.from_numpy(np.ascontiguousarray(data))
        return bits.view(FLOAT8[dtype]).to(torch.float32).numpy()
    return data.astype(np.float32)


def to_float8(x: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """float32 -> float8 bits, to the nearest even; beyond the range, the largest finite number."""
    kind = FLOAT8[dtype]
    most = torch.finfo(kind).max
    t = torch.from_numpy(np.ascontiguousarray(x, np.float32))
    return t.clamp(-most, most).to(kind).view(torch.uint8).numpy()
