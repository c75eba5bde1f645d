"""The specification of every op, in eager PyTorch: same names and signatures as ops/."""

from tilewright.reference.add_rms_norm import add_rms_norm
from tilewright.reference.attention import attention, attention_with_lse, merge_attention
from tilewright.reference.attention_decode import (
    attention_decode,
    attention_decode_append_,
    attention_decode_with_lse,
)
from tilewright.reference.attention_varlen import attention_varlen, attention_varlen_with_lse
from tilewright.reference.geglu import geglu
from tilewright.reference.int8_linear import int8_linear, int8_rows
from tilewright.reference.moe_combine import moe_combine
from tilewright.reference.moe_dispatch import moe_dispatch
from tilewright.reference.moe_experts import moe_experts
from tilewright.reference.moe_losses import moe_losses
from tilewright.reference.moe_route import moe_route
from tilewright.reference.quant_linear import quant_linear
from tilewright.reference.quant_moe_experts import quant_moe_experts
from tilewright.reference.rms_norm import rms_norm
from tilewright.reference.rms_norm_int8 import rms_norm_int8
from tilewright.reference.rope import rope
from tilewright.reference.swiglu import swiglu

__all__ = [
    "add_rms_norm",
    "attention",
    "attention_decode",
    "attention_decode_append_",
    "attention_decode_with_lse",
    "attention_varlen",
    "attention_varlen_with_lse",
    "attention_with_lse",
    "geglu",
    "int8_linear",
    "int8_rows",
    "merge_attention",
    "moe_combine",
    "moe_dispatch",
    "moe_experts",
    "moe_losses",
    "moe_route",
    "quant_linear",
    "quant_moe_experts",
    "rms_norm",
    "rms_norm_int8",
    "rope",
    "swiglu",
]
