"""The specification of quant_moe_experts, in eager PyTorch."""

from torch import Tensor

from tilewright.expert_lora import ExpertLora
from tilewright.expert_rows import ExpertRows
from tilewright.quant_tensor import QuantTensor
from tilewright.reference.moe_experts import moe_experts


def quant_moe_experts(
    x: Tensor,
    weights: Tensor,
    placed: ExpertRows,
    w13: QuantTensor,
    w2: QuantTensor,
    *,
    activation: str = "silu",
    limit: float | None = None,
    bias13: Tensor | None = None,
    bias2: Tensor | None = None,
    lora: ExpertLora | None = None,
) -> Tensor:
    """x [..., D], weights [..., k], w13 [E 2 I, D], w2 [E D, I] -> [..., D]: moe_experts of the dequantised weights."""
    E, D = placed.offsets.numel() - 1, x.shape[-1]
    dense13 = w13.dequantize(x.dtype).view(E, -1, D)
    dense2 = w2.dequantize(x.dtype).view(E, D, -1)
    return moe_experts(
        x,
        weights,
        placed,
        dense13,
        dense2,
        activation=activation,
        limit=limit,
        bias13=bias13,
        bias2=bias2,
        lora=lora,
    )
