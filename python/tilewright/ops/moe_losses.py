"""moe_losses: validate, tilewright::moe_losses_{fwd,bwd}, autograd."""

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tilewright import _op
from tilewright.ops.moe_route import MOST_CHOSEN, MOST_EXPERTS, SCORES


def _fwd_fake(
    logits: Tensor, ids: Tensor, mask: Tensor | None, sigmoid: bool, per_sequence: bool
) -> tuple[Tensor, ...]:
    E, G = logits.shape[-1], prod(logits.shape[:-2]) if per_sequence else 1
    shapes = (), (), (G, E), (2,)
    balance, z, slopes, totals = (logits.new_empty(s, dtype=torch.float32) for s in shapes)
    return balance, z, logits.new_empty(E, dtype=torch.int64), slopes, totals


# slopes [G, E]: E f_e / n of each of G sequences; totals: tokens that count, and sequences that have some.
_fwd = _op.register(
    "moe_losses",
    "moe_losses_fwd(Tensor logits, Tensor ids, Tensor? mask, bool sigmoid, bool per_sequence)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
)
_bwd = _op.register(
    "moe_losses",
    "moe_losses_bwd(Tensor? dbalance, Tensor? dz, Tensor logits, Tensor? mask, Tensor slopes, Tensor totals,"
    " bool sigmoid) -> Tensor",
    fake=lambda dbalance, dz, logits, *_: logits.new_empty(logits.shape),
)


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, mask: Tensor | None, sigmoid: bool, per_sequence: bool
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        balance, z, counts, slopes, totals = _fwd(logits, ids, mask, sigmoid, per_sequence)
        ctx.save_for_backward(logits, mask, slopes, totals)
        ctx.sigmoid = sigmoid
        ctx.mark_non_differentiable(counts)
        return balance, z, counts

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dbalance: Tensor | None, dz: Tensor | None, _: Any
    ) -> tuple[Tensor | None, ...]:
        grad = None
        if dbalance is not None or dz is not None:
            grad = _bwd(dbalance, dz, *ctx.saved_tensors, ctx.sigmoid)
        return grad, None, None, None, None


def _check(
    logits: Tensor, ids: Tensor, scores: str, mask: Tensor | None, per_sequence: bool
) -> None:
    if logits.dim() < (3 if per_sequence else 1) or not logits.is_floating_point():
        wanted = "[B, ..., S, E]" if per_sequence else "[..., E]"
        raise ValueError(
            f"moe_losses: logits must be floating point {wanted}, not {logits.dtype} {tuple(logits.shape)}"
        )
    *leading, E = logits.shape
    if scores not in SCORES:
        raise ValueError(f"moe_losses: scores {scores!r} are none of {', '.join(SCORES)}")
    if not 1 <= E <= MOST_EXPERTS:
        raise ValueError(f"moe_losses: {E} experts; from 1 to {MOST_EXPERTS} are taken")
    if ids.dim() == 0 or [*ids.shape[:-1]] != leading or ids.dtype != torch.int64:
        raise ValueError(
            f"moe_losses: ids {ids.dtype} {tuple(ids.shape)} must be int64 {(*leading, 'k')}"
        )
    if not 1 <= ids.shape[-1] <= MOST_CHOSEN:
        raise ValueError(f"moe_losses: k {ids.shape[-1]} must be from 1 to {MOST_CHOSEN}")
    if mask is not None and ([*mask.shape] != leading or mask.dtype != torch.bool):
        raise ValueError(
            f"moe_losses: mask {mask.dtype} {tuple(mask.shape)} must be bool {tuple(leading)}"
        )
    for name, t in (("ids", ids), ("mask", mask)):
        if t is not None and t.device != logits.device:
            raise ValueError(f"moe_losses: {name} on {t.device}, logits on {logits.device}")


def moe_losses(
    logits: Tensor,
    ids: Tensor,
    *,
    scores: str = "softmax",
    mask: Tensor | None = None,
    per_sequence: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """What keeps a router's load even and its logits small, and how often each expert was chosen.

    logits [..., E], ids [..., k] int64, mask [...] bool -> balance [], z [] float32, counts [E] int64.
    Only tokens where mask is true count (all without one); ids are moe_route's choice, and one that is no
    expert's is counted nowhere.

    balance is E sum_e f_e P_e: f_e how many choices a token has of e, P_e the mean of p, which is softmax(logits)
    or s / sum s of s = sigmoid(logits), in float32.  Of k choices it is k where the load is even (Switch
    Transformer, arXiv:2101.03961, eq. 4 to 6; transformers' load_balancing_loss_func).  With per_sequence, of
    logits [B, ..., S, E], it is the mean of each sequence's own balance, over those that have a token that counts
    (DeepSeek-V3, arXiv:2412.19437, eq. 17 to 20, times k).  z is the mean of logsumexp(logits)^2 (ST-MoE,
    arXiv:2202.08906, eq. 5).  counts are of all sequences.  Without a token that counts all are 0.

    Gradients reach logits alone: f is a constant.  They are 0 where mask is false, whatever stands there; NaN in a
    token that counts is in the losses.  No sigmoid is too small to share (its sum is no 0 / 0); a token whose every
    logit is -inf makes balance NaN and z infinite.  Nothing is raised about the values of ids.  Autocast changes
    nothing.  ValueError where shapes, dtypes or devices do not fit, E is above 1024 or k above 32.
    """
    _check(logits, ids, scores, mask, per_sequence)
    if not _op.serves("moe_losses", logits):
        return _op.twin("moe_losses")(
            logits, ids, scores=scores, mask=mask, per_sequence=per_sequence
        )
    how = scores == "sigmoid", per_sequence
    if torch.is_grad_enabled() and logits.requires_grad:
        return _Losses.apply(logits, ids, mask, *how)
    balance, z, counts, _, _ = _fwd(logits, ids, mask, *how)
    return balance, z, counts
