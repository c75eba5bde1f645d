"""moe_route: validate, tilewright::moe_route_{fwd,bwd}, autograd."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tilewright import _op

MOST_EXPERTS, MOST_CHOSEN = 1024, 32
SCORES = ("softmax", "sigmoid")

_BWD = "bool sigmoid, bool renormalise, float scale"
_fwd = _op.register(
    "moe_route",
    "moe_route_fwd(Tensor logits, Tensor? bias, Tensor? ids, int k, int groups, int group_k, int group_top,"
    f" {_BWD}) -> (Tensor, Tensor)",
    fake=lambda logits, bias, ids, k, *_: (
        logits.new_empty((*logits.shape[:-1], k), dtype=torch.float32),
        logits.new_empty((*logits.shape[:-1], k) if ids is None else 0, dtype=torch.int64),
    ),
)
_bwd = _op.register(
    "moe_route",
    f"moe_route_bwd(Tensor dweights, Tensor logits, Tensor ids, {_BWD}) -> Tensor",
    fake=lambda dweights, logits, *_: logits.new_empty(logits.shape),
)


class _How(NamedTuple):
    """What both operators end with."""

    sigmoid: bool
    renormalise: bool
    scale: float


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        bias: Tensor | None,
        ids: Tensor | None,
        k: int,
        groups: tuple[int, int, int],
        how: _How,
    ) -> tuple[Tensor, Tensor]:
        weights, found = _fwd(logits, bias, ids, k, *groups, *how)
        ctx.save_for_backward(logits, found if ids is None else ids)
        ctx.how = how
        ctx.mark_non_differentiable(found)
        return weights, found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dweights: Tensor, _: Tensor) -> tuple[Any, ...]:
        logits, ids = ctx.saved_tensors
        return _bwd(dweights, logits, ids, *ctx.how), None, None, None, None, None


def _check(
    logits: Tensor, k: int, scores: str, bias: Tensor | None, groups: int, group_k: int, group_top: int,
    ids: Tensor | None,
) -> None:  # fmt: skip
    if logits.dim() == 0 or not logits.is_floating_point():
        raise ValueError(
            f"moe_route: logits must be floating point [..., E], not {logits.dtype} {tuple(logits.shape)}"
        )
    E = logits.shape[-1]
    if scores not in SCORES:
        raise ValueError(f"moe_route: scores {scores!r} are none of {', '.join(SCORES)}")
    if not 1 <= E <= MOST_EXPERTS:
        raise ValueError(f"moe_route: {E} experts; from 1 to {MOST_EXPERTS} are taken")
    if groups < 1 or E % groups or not 1 <= group_k <= groups or group_top < 1:
        raise ValueError(
            f"moe_route: groups {groups}, group_k {group_k} and group_top {group_top} do not fit {E} experts"
        )
    if not 1 <= k <= MOST_CHOSEN or (ids is None and k > E // groups * group_k):
        raise ValueError(
            f"moe_route: k {k} must be from 1 to {min(MOST_CHOSEN, E // groups * group_k)}, the experts of"
            f" {group_k} groups of {E // groups}"
        )
    if bias is not None and (bias.shape != (E,) or not bias.is_floating_point()):
        raise ValueError(
            f"moe_route: bias {bias.dtype} {tuple(bias.shape)} must be floating point [{E}]"
        )
    if ids is not None and (ids.shape != (*logits.shape[:-1], k) or ids.dtype != torch.int64):
        raise ValueError(
            f"moe_route: ids {ids.dtype} {tuple(ids.shape)} must be int64 {(*logits.shape[:-1], k)}"
        )
    for name, t in (("bias", bias), ("ids", ids)):
        if t is not None and t.device != logits.device:
            raise ValueError(f"moe_route: {name} on {t.device}, logits on {logits.device}")


def moe_route(
    logits: Tensor,
    k: int,
    *,
    scores: str = "softmax",
    bias: Tensor | None = None,
    groups: int = 1,
    group_k: int = 1,
    group_top: int = 2,
    renormalise: bool = True,
    scale: float = 1.0,
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k experts of each token, and how much of each.

    logits [..., E] -> weights [..., k] float32, ids [..., k] int64, best first, ties by the lowest id.
    A score is softmax(logits) or sigmoid(logits), in float32.  Experts are ranked by their logits; by score + bias
    where there is a bias [E], which only chooses (DeepSeek-V3's e_score_correction_bias), or group_k < groups.  Of
    so many groups of consecutive experts those group_k are asked whose group_top best have the greatest sum
    (DeepSeek-V3: 2 best, DeepSeek-V2: 1).  Weights are the scores of the chosen, divided by their sum + 1e-20 if
    renormalise, times scale.

    With ids [..., k] int64 nothing is chosen, and they are returned (a router's choice replayed, or experts on
    other devices): the weight of an id of -1 is 0, and no part of the sum.  Another id that is no expert's is a
    ValueError of the CPU's kernel, and as -1 elsewhere: a GPU's cannot raise.

    NaN ranks as -inf, which scores 0.  Where scores are softmax's, a token with a logit of NaN or +inf, or with
    none above -inf, has weights of NaN; its ids are experts all the same, no two alike.  Gradients reach logits
    alone.  Autocast changes nothing.  ValueError where shapes, dtypes or devices do not fit, E is above 1024 or
    k above 32.  Shazeer et al. 2017, arXiv:1701.06538, eq. 3 to 5; DeepSeek-V3, arXiv:2412.19437, eq. 12 to 16.
    """
    _check(logits, k, scores, bias, groups, group_k, group_top, ids)
    if not _op.serves("moe_route", logits):
        return _op.twin("moe_route")(
            logits, k, scores=scores, bias=bias, groups=groups, group_k=group_k, group_top=group_top,
            renormalise=renormalise, scale=scale, ids=ids,
        )  # fmt: skip
    how = _How(scores == "sigmoid", renormalise, float(scale))
    grouping = groups, group_k, group_top
    bias = None if bias is None else bias.detach()  # it only chooses
    if torch.is_grad_enabled() and logits.requires_grad:
        weights, found = _Route.apply(logits, bias, ids, k, grouping, how)
    else:
        weights, found = _fwd(logits, bias, ids, k, *grouping, *how)
    return weights, found if ids is None else ids
