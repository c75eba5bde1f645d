"""The quantised weight: codes, scales and offsets of a [N, K] matrix.  A torch-only leaf.

N output features, K input features, G = K / group groups in a row.  With q the unsigned code:

    w[n, k] = scales[n, g] * (q[n, k] - zeros[n, g])      zero-points (GPTQ, AWQ)
    w[n, k] = scales[n, g] * q[n, k] + minima[n, g]       minima (GGUF Q4_1)
    w[n, k] = scales[n, g] * (q[n, k] - 2^(bits-1))       neither: symmetric (GGUF Q4_0, Q8_0)

where g = k // group, or g_idx[k].  4-bit codes lie two a byte along K, the even k in the low
nibble.  This layout is the same on every device and instruction set, and it is what is saved.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """A frozen view of a quantised weight [N, K]; the tensors belong to the module that made it.

    qweight [N, K/2] (bits 4) or [N, K] (bits 8) uint8; scales [N, G] float32, float16 or bfloat16;
    zeros or minima [N, G], dtype of scales, not both; g_idx [K] int32, the group of each column.
    Raises ValueError where a shape, dtype or device does not fit the others.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    minima: Tensor | None = None
    g_idx: Tensor | None = None
    bits: int = 4
    shape: torch.Size = field(init=False)  # (N, K); kept, since every call of a layer asks for it

    def __post_init__(self) -> None:
        q, s = self.qweight, self.scales
        if self.bits not in (4, 8):
            raise ValueError(f"QuantTensor: bits must be 4 or 8, not {self.bits}")
        if q.dim() != 2 or q.dtype != torch.uint8:
            raise ValueError(
                f"QuantTensor: qweight must be 2-D uint8, not {q.dtype} {list(q.shape)}"
            )
        shape = torch.Size((q.shape[0], q.shape[1] * (8 // self.bits)))
        object.__setattr__(self, "shape", shape)
        if s.dim() != 2 or s.dtype not in SCALE_DTYPES or s.shape[0] != q.shape[0]:
            raise ValueError(
                f"QuantTensor: scales {s.dtype} {list(s.shape)} do not fit qweight {list(q.shape)}"
            )
        if s.shape[1] == 0 or self.in_features % s.shape[1]:
            raise ValueError(
                f"QuantTensor: {self.in_features} columns do not divide into {s.shape[1]} groups"
            )
        if self.bits == 4 and self.group % 2 and s.shape[1] > 1:
            raise ValueError(f"QuantTensor: group {self.group} must be even for 4 bits")
        if self.zeros is not None and self.minima is not None:
            raise ValueError("QuantTensor: give zeros or minima, not both")
        for name in ("zeros", "minima"):
            t = getattr(self, name)
            if t is not None and (t.shape != s.shape or t.dtype != s.dtype):
                raise ValueError(
                    f"QuantTensor: {name} {t.dtype} {list(t.shape)} differ from scales "
                    f"{s.dtype} {list(s.shape)}"
                )
        if self.g_idx is not None and (
            self.g_idx.shape != (self.in_features,) or self.g_idx.dtype != torch.int32
        ):
            raise ValueError(
                f"QuantTensor: g_idx must be int32 [{self.in_features}], "
                f"not {self.g_idx.dtype} {list(self.g_idx.shape)}"
            )
        devices = {t.device for t in (q, s, self.zeros, self.minima, self.g_idx) if t is not None}
        if len(devices) > 1:
            raise ValueError(f"QuantTensor: its tensors are on {sorted(map(str, devices))}")

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.in_features // self.scales.shape[1]

    @property
    def device(self) -> torch.device:
        return self.qweight.device

    def codes(self) -> Tensor:
        """The unsigned codes, uint8 [N, K]."""
        if self.bits == 8:
            return self.qweight
        q = self.qweight
        return torch.stack((q & 15, q >> 4), dim=-1).flatten(1)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K]: computed in float32 (float64 for float64), rounded once to dtype."""
        work = torch.promote_types(dtype, torch.float32)

        def by_column(t: Tensor) -> Tensor:
            t = t.to(work)
            if self.g_idx is not None:
                return t[:, self.g_idx.long()]
            return t.repeat_interleave(self.group, dim=1)

        q, scale = self.codes().to(work), by_column(self.scales)
        if self.minima is not None:
            return (scale * q + by_column(self.minima)).to(dtype)
        zero = by_column(self.zeros) if self.zeros is not None else 2.0 ** (self.bits - 1)
        return (scale * (q - zero)).to(dtype)

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dequantised rows, index [...] int -> [..., K]: an embedding look-up."""
        i = index.reshape(-1)
        picked = QuantTensor(
            self.qweight[i],
            self.scales[i],
            None if self.zeros is None else self.zeros[i],
            None if self.minima is None else self.minima[i],
            self.g_idx,
            self.bits,
        )
        return picked.dequantize(dtype).view(*index.shape, self.in_features)


def pack_int4(codes: Tensor) -> Tensor:
    """uint8 codes 0..15 [N, K], K even -> [N, K/2], the even k in the low nibble."""
    if codes.dtype != torch.uint8 or codes.shape[-1] % 2:
        raise ValueError(
            f"pack_int4: codes must be uint8 with an even last dimension, not {codes.dtype} {list(codes.shape)}"
        )
    return codes[..., 0::2] | (codes[..., 1::2] << 4)
