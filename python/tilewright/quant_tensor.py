"""The quantised weight: codes, scales and offsets of a [N, K] matrix.  A torch-only leaf.

N output features, K input features, G = K / group groups in a row.  With q the unsigned code:

    w[n, k] = scales[n, g] * (q[n, k] - zeros[n, g])      zero-points (GPTQ, AWQ, HQQ)
    w[n, k] = scales[n, g] * q[n, k] + minima[n, g]       minima (GGUF Q4_1, Q4_K)
    w[n, k] = scales[n, g] * codebook[q[n, k]]            a code book (bitsandbytes NF4, FP4)
    w[n, k] = scales[n, g] * (q[n, k] - 2^(bits-1))       none: symmetric (GGUF Q4_0, Q8_0)

where g = k // group.  4-bit codes lie two a byte along K, the even k in the low nibble.  This layout is
the same on every device and instruction set, and it is what is saved.

Under act-order (GPTQ) a group's columns are not neighbours: the codes lie sorted by group, and stored
column k is the weight's column order[k].  Nested scales (bitsandbytes) are codes too: with j = n G + g
and 256 of them to a block, scales[n, g] = nested.code[scales[n, g]] * nested.scales[j // 256] + nested.offset.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NESTED_BLOCK = 256
# how a quantised layer takes its input: as it is, or rounded to int8 in blocks of 32 columns or by row
ACTIVATIONS = ("float", "int8", "int8_token")
OFFSETS = ("zeros", "minima", "codebook")
PARTS = ("qweight", "scales", "zeros", "minima", "order", "codebook")


class Nested(NamedTuple):
    """What scales of uint8 stand for: code [256], scales [ceil(N G / 256)] and offset [], float32."""

    code: Tensor
    scales: Tensor
    offset: Tensor

    def __call__(self, scales: Tensor) -> Tensor:
        """The scales [N, G], float32."""
        plain = self.code.index_select(0, scales.flatten().int())
        if plain.numel() % NESTED_BLOCK == 0:  # no table of one scale a number
            by_block = plain.view(-1, NESTED_BLOCK) * self.scales[:, None]
            return (by_block + self.offset).view(scales.shape)
        blocks = self.scales.repeat_interleave(NESTED_BLOCK)[: plain.numel()]
        return (plain * blocks + self.offset).view(scales.shape)


class Int8Rows(NamedTuple):
    """Activations of a scale a row: x[..., k] = codes[..., k] * scales[...], which is of `dtype`.

    codes [..., K] int8 of -127 to 127, scales [...] float32; a scale of nan makes its row nan.
    """

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype

    def dequantize(self) -> Tensor:
        """x [..., K]: computed in float32 (float64 for float64), rounded once."""
        work = torch.promote_types(self.dtype, torch.float32)
        return (self.codes.to(work) * self.scales.to(work)[..., None]).to(self.dtype)


NAMES = (*PARTS, *(f"nested_{name}" for name in Nested._fields))  # of a state dict


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """A frozen view of a quantised weight [N, K]; the tensors belong to the module that made it.

    qweight [N, K/2] (bits 4) or [N, K] (bits 8) uint8; scales [N, G] float32, float16 or bfloat16, or
    uint8 beside nested; zeros or minima [N, G], dtype of scales, or codebook [2^bits] float32, one of
    them at most; order [K] int32, a permutation.
    Raises ValueError where a shape, dtype or device does not fit the others.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    minima: Tensor | None = None
    order: Tensor | None = None
    bits: int = 4
    codebook: Tensor | None = None
    nested: Nested | None = None
    # kept, since every call of a layer asks for them: (N, K), and whether codes, scales and zeros or
    # minima are all there is
    shape: torch.Size = field(init=False)
    plain: bool = field(init=False)

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
        plain = self.order is None and self.codebook is None and self.nested is None
        object.__setattr__(self, "plain", plain)
        dtypes = SCALE_DTYPES if self.nested is None else (torch.uint8,)
        if s.dim() != 2 or s.dtype not in dtypes or s.shape[0] != q.shape[0]:
            raise ValueError(
                f"QuantTensor: scales {s.dtype} {list(s.shape)} do not fit qweight {list(q.shape)}"
                + ("" if self.nested is None else " beside nested scales, which are uint8")
            )
        if s.shape[1] == 0 or self.in_features % s.shape[1]:
            raise ValueError(
                f"QuantTensor: {self.in_features} columns do not divide into {s.shape[1]} groups"
            )
        if self.bits == 4 and self.group % 2 and s.shape[1] > 1:
            raise ValueError(f"QuantTensor: group {self.group} must be even for 4 bits")
        given = [name for name in OFFSETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"QuantTensor: give one of {', '.join(OFFSETS)}, not {given}")
        for name in ("zeros", "minima"):
            t = getattr(self, name)
            if t is not None and (t.shape != s.shape or t.dtype != s.dtype):
                raise ValueError(
                    f"QuantTensor: {name} {t.dtype} {list(t.shape)} differ from scales "
                    f"{s.dtype} {list(s.shape)}"
                )
        self._check("codebook", self.codebook, torch.float32, (1 << self.bits,))
        self._check("order", self.order, torch.int32, (self.in_features,))
        if self.nested is not None:
            blocks = -(-s.numel() // NESTED_BLOCK)
            for name, wanted in (("code", (256,)), ("scales", (blocks,)), ("offset", ())):
                t = getattr(self.nested, name)
                self._check(f"nested.{name}", t, torch.float32, wanted)
        devices = {t.device for t in self.tensors().values()}
        if len(devices) > 1:
            raise ValueError(f"QuantTensor: its tensors are on {sorted(map(str, devices))}")

    def _check(
        self, name: str, t: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> None:
        if t is not None and (t.dtype != dtype or t.shape != shape):
            raise ValueError(
                f"QuantTensor: {name} must be {dtype} {list(shape)}, not {t.dtype} {list(t.shape)}"
            )

    @classmethod
    def by_group(
        cls,
        qweight: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        g_idx: Tensor,
        bits: int,
    ) -> "QuantTensor":
        """Of codes whose column k is of group g_idx[k] [K], as GPTQ's act-order leaves them: sorted by it.

        Groups of unlike sizes become as many equal ones as it takes.  Raises ValueError where a column is
        of no group.
        """
        K, G = qweight.shape[1] * (8 // bits), scales.shape[1]
        if g_idx.shape != (K,) or g_idx.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"QuantTensor: g_idx must be int32 [{K}], not {g_idx.dtype} {list(g_idx.shape)}"
            )
        if not K:
            return cls(qweight, scales, zeros, bits=bits)
        low, high = (int(x) for x in g_idx.aminmax())
        if low < 0 or high >= G:
            raise ValueError(f"QuantTensor: g_idx names groups {low} to {high} of {G}")
        step = math.gcd(*torch.bincount(g_idx, minlength=G).tolist())
        ordered = g_idx.argsort(stable=True)
        groups = g_idx[ordered][::step].long()
        plain = torch.arange(K, device=g_idx.device)
        if not torch.equal(ordered, plain):
            codes = unpacked(qweight, bits)[:, ordered]
            qweight = packed(codes, bits)
        return cls(
            qweight,
            scales[:, groups],
            None if zeros is None else zeros[:, groups],
            order=None if torch.equal(ordered, plain) else ordered.to(torch.int32),
            bits=bits,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Those it has, by the names of a state dict; nested's as nested_code and so on."""
        found = {name: t for name in PARTS if (t := getattr(self, name)) is not None}
        if self.nested is not None:
            found |= {f"nested_{name}": t for name, t in self.nested._asdict().items()}
        return found

    @classmethod
    def of(cls, tensors: dict[str, Tensor], bits: int) -> "QuantTensor":
        """Of what tensors() gives."""
        given = dict(tensors)
        nested = [given.pop(f"nested_{name}", None) for name in Nested._fields]
        if any(t is not None for t in nested):
            lacking = [n for n, t in zip(Nested._fields, nested, strict=True) if t is None]
            if lacking:
                raise ValueError(f"QuantTensor: nested scales lack {', '.join(lacking)}")
            return cls(**given, bits=bits, nested=Nested(*nested))  # type: ignore[arg-type]
        return cls(**given, bits=bits)  # type: ignore[arg-type]

    def part(self, first: int, last: int) -> "QuantTensor":
        """Rows first to last - 1, with plain scales: views where they can be."""
        cut = {
            n: t[first:last]
            for n in ("qweight", "zeros", "minima")
            if (t := getattr(self, n)) is not None
        }
        cut["scales"] = self.plain_scales()[first:last]
        shared = {n: t for n in ("order", "codebook") if (t := getattr(self, n)) is not None}
        return QuantTensor.of(cut | shared, self.bits)

    @classmethod
    def stacked(cls, weights: "Sequence[QuantTensor]") -> "QuantTensor | None":
        """Weights of the same inputs, one above the other; None where they are not of one kind, whose
        tensors cannot be stacked."""
        first = weights[0].tensors()
        shared = ("order", "codebook")
        for w in weights:
            theirs = w.tensors()
            if (
                w.bits != weights[0].bits
                or w.nested is not None
                or theirs.keys() != first.keys()
                or any(theirs[n].shape[1:] != t.shape[1:] for n, t in first.items())
                or any(theirs[n].dtype != t.dtype for n, t in first.items())
                or not all(torch.equal(theirs[n], first[n]) for n in shared if n in first)
            ):
                return None
        whole = {
            name: t if name in shared else torch.cat([w.tensors()[name] for w in weights])
            for name, t in first.items()
        }
        return cls.of(whole, weights[0].bits)

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

    @property
    def by_row(self) -> bool:
        """Whether it has 8 bits, a scale a row and nothing else: int8_linear's kind."""
        return self.bits == 8 and self.plain and self.symmetric and self.scales.shape[1] == 1

    @property
    def symmetric(self) -> bool:
        """Whether codes count from the middle of their range."""
        return all(getattr(self, name) is None for name in OFFSETS)

    def codes(self) -> Tensor:
        """The unsigned codes as they are stored, uint8 [N, K]."""
        return unpacked(self.qweight, self.bits)

    def plain_scales(self) -> Tensor:
        """The scales [N, G], of a float dtype: nested ones are worked out."""
        return self.scales if self.nested is None else self.nested(self.scales)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K]: computed in float32 (float64 for float64), rounded once to dtype."""
        w = self._dequantize(self.codes(), self.plain_scales(), self.zeros, self.minima, dtype)
        if self.order is None:
            return w
        return w.index_select(1, self.order.argsort())

    def _dequantize(
        self,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        minima: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        work = torch.promote_types(dtype, torch.float32)

        def by_column(t: Tensor) -> Tensor:
            return t.to(work).repeat_interleave(self.group, dim=1)

        if self.codebook is not None:
            return (by_column(scales) * self.codebook.to(work)[codes.long()]).to(dtype)
        q, scale = codes.to(work), by_column(scales)
        if minima is not None:
            return (scale * q + by_column(minima)).to(dtype)
        zero = by_column(zeros) if zeros is not None else 2.0 ** (self.bits - 1)
        return (scale * (q - zero)).to(dtype)

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dequantised rows, index [...] int -> [..., K]: an embedding look-up."""
        i = index.reshape(-1)
        scales = self.scales.index_select(0, i)  # which takes no row for -1
        if self.nested is not None:  # a row's scales lie in blocks of their own
            G = self.scales.shape[1]
            at = (i[:, None] * G + torch.arange(G, device=i.device)) // NESTED_BLOCK
            n = self.nested
            scales = n.code[scales.long()] * n.scales[at] + n.offset
        zeros, minima = (
            None if t is None else t.index_select(0, i) for t in (self.zeros, self.minima)
        )
        codes = unpacked(self.qweight.index_select(0, i), self.bits)
        w = self._dequantize(codes, scales, zeros, minima, dtype)
        if self.order is not None:
            w = w.index_select(1, self.order.argsort())
        return w.view(*index.shape, self.in_features)


def activations_for(w: QuantTensor, asked: str) -> str:
    """Of ACTIVATIONS what a layer of this weight takes: "int8" where the weight has not "int8_token"'s form."""
    return "int8" if asked == "int8_token" and not w.by_row else asked


def check_order(name: str, order: Tensor | None) -> None:
    """Raises ValueError where a loaded order is no permutation, which would read a column twice."""
    if order is not None:
        each = torch.arange(order.numel(), dtype=order.dtype, device=order.device)
        if not torch.equal(order.sort().values, each):
            raise ValueError(f"{name} {list(order.shape)} is no permutation of the columns")


def unpacked(qweight: Tensor, bits: int) -> Tensor:
    """uint8 codes [N, K] of packed(codes, bits)."""
    if bits == 8:
        return qweight
    return torch.stack((qweight & 15, qweight >> 4), dim=-1).flatten(1)


def packed(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [N, K], below 2^bits -> qweight."""
    return codes if bits == 8 else pack_int4(codes)


def pack_int4(codes: Tensor) -> Tensor:
    """uint8 codes 0..15 [N, K], K even -> [N, K/2], the even k in the low nibble."""
    if codes.dtype != torch.uint8 or codes.shape[-1] % 2:
        raise ValueError(
            f"pack_int4: codes must be uint8 with an even last dimension, not {codes.dtype} {list(codes.shape)}"
        )
    return codes[..., 0::2] | (codes[..., 1::2] << 4)
