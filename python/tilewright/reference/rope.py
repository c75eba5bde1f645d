"""The specification of rope, in eager PyTorch."""

import torch
from torch import Tensor


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
) -> Tensor:
    """x [B, H, S, D], cos and sin [rows, R / 2 or R] -> [B, H, S, D]."""
    S, D = x.shape[-2:]
    C = cos.shape[-1]
    R = C if 2 * C > D else 2 * C
    high = torch.promote_types(x.dtype, torch.float32)
    pair = slice(None, None, 2) if interleaved else slice(R // 2)  # of a table of R columns

    def angles(table: Tensor) -> Tensor:  # [S, R / 2], [1, S, R / 2] or [B, 1, S, R / 2]
        table = (table[:, pair] if R == C else table).detach().to(high)
        if position_ids is None:
            return table[:S]
        rows = table.index_select(0, position_ids.flatten())
        return rows.view(*position_ids.shape, R // 2).unsqueeze(-3)

    cos, sin = angles(cos), angles(sin)
    rotated, rest = x.to(high).split([R, D - R], dim=-1)
    if interleaved:
        first, second = rotated[..., ::2], rotated[..., 1::2]
    else:
        first, second = rotated.chunk(2, dim=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    y = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat([y, rest], dim=-1).to(x.dtype)
