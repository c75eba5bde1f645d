"""rope: validate, tilewright::rope_{fwd,bwd}, autograd."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tilewright import _op


def _fake(
    x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> Tensor:
    if x.stride(1) < x.stride(2):
        return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)
    return x.new_empty(x.shape)


_ARGS = "Tensor cos, Tensor sin, Tensor? position_ids, bool interleaved"
_fwd = _op.register("rope", f"rope_fwd(Tensor x, {_ARGS}) -> Tensor", _fake)
_bwd = _op.register("rope", f"rope_bwd(Tensor dy, {_ARGS}) -> Tensor", _fake)

_direct = _op.direct("rope")


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        position_ids: Tensor | None,
        interleaved: bool,
    ) -> Tensor:
        ctx.save_for_backward(cos, sin, position_ids)
        ctx.interleaved = interleaved
        return _fwd(x, cos, sin, position_ids, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _bwd(dy, *ctx.saved_tensors, ctx.interleaved), None, None, None, None


def _check(x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None) -> None:
    if x.dim() != 4:
        raise ValueError(f"rope: x must be [B, H, S, D], not {tuple(x.shape)}")
    B, _, S, D = x.shape
    if cos.dim() != 2 or cos.shape != sin.shape:
        raise ValueError(
            f"rope: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must both be [rows, R / 2 or R]"
        )
    rows, C = cos.shape
    if C > D or (2 * C > D and C % 2):
        raise ValueError(
            f"rope: cos {tuple(cos.shape)} has neither R / 2 nor an even R <= D columns"
            f" for x {tuple(x.shape)}"
        )
    dtype, device = cos.dtype, x.device
    if dtype != sin.dtype or (dtype != torch.float32 and dtype != x.dtype):
        raise ValueError(
            f"rope: cos {dtype} and sin {sin.dtype} must both be float32 or x's {x.dtype}"
        )
    if cos.device != device or sin.device != device:
        raise ValueError(f"rope: cos on {cos.device}, sin on {sin.device}, x on {device}")
    if not x.is_floating_point():
        raise ValueError(f"rope: x must be floating point, not {x.dtype}")
    if position_ids is None:
        if rows < S:
            raise ValueError(
                f"rope: cos {tuple(cos.shape)} has too few rows for x {tuple(x.shape)}"
            )
        return
    if position_ids.shape not in ((S,), (B, S)):
        raise ValueError(
            f"rope: position_ids {tuple(position_ids.shape)} must be [S] or [B, S]"
            f" for x {tuple(x.shape)}"
        )
    if position_ids.dtype != torch.int64 or position_ids.device != device:
        raise ValueError(
            f"rope: position_ids must be int64 on {device},"
            f" not {position_ids.dtype} on {position_ids.device}"
        )
    if rows == 0:
        raise ValueError(f"rope: cos {tuple(cos.shape)} has no rows for position_ids to pick")


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Turn each pair of x's first R features by its token's angle, in float32 arithmetic.

    x [B, H, S, D] with any strides -> [B, H, S, D], fresh and dense with D innermost; where x steps
    less from head to head than from token to token (a [B, S, H, D] tensor or packed qkv,
    transposed), so does the result, and transposing it back is contiguous.
    cos, sin [rows, R / 2], float32 or x's dtype, one angle a pair; or [rows, R] for R > D / 2, one
    angle an element as transformers has them, of which the pair's first is read.  (A table of
    C <= D / 2 columns always means R = 2 C: pass the first half of a doubled narrower one.)
    Features from R on are copied.  Pairs are (i, i + R / 2), or (2i, 2i + 1) where interleaved.
    position_ids [S] or [B, S], int64, picks the row for each token; without it token s takes row s.
    A position outside the table is a ValueError on a CPU, and the nearest row on a GPU.  cos and
    sin get no gradient.  ValueError where shapes, dtypes or devices do not fit.
    Su et al. 2021, arXiv:2104.09864, eq. 34.
    """
    if _direct is not None and x.is_cpu and not torch.compiler.is_compiling():
        y = _direct(x, cos, sin, position_ids, interleaved)
        if y is not None:
            return y
    _check(x, cos, sin, position_ids)
    if not _op.serves("rope", x):
        return _op.twin("rope")(x, cos, sin, interleaved=interleaved, position_ids=position_ids)
    if torch.is_grad_enabled():
        if x.requires_grad:
            return _Rope.apply(x, cos, sin, position_ids, interleaved)
        if cos.requires_grad or sin.requires_grad:
            cos, sin = cos.detach(), sin.detach()
    return _fwd(x, cos, sin, position_ids, interleaved)
