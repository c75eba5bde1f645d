"""The public functions: validate, call the operator, autograd.  reference/ has their twins."""

from tilewright.ops.add_rms_norm import add_rms_norm
from tilewright.ops.attention import attention, attention_with_lse, merge_attention
from tilewright.ops.attention_decode import (
    attention_decode,
    attention_decode_append_,
    attention_decode_with_lse,
)
from tilewright.ops.attention_varlen import attention_varlen, attention_varlen_with_lse
from tilewright.ops.geglu import geglu
from tilewright.ops.int8_linear import int8_linear, int8_rows
from tilewright.ops.moe_combine import moe_combine
from tilewright.ops.moe_dispatch import moe_dispatch
from tilewright.ops.moe_experts import moe_experts
from tilewright.ops.moe_losses import moe_losses
from tilewright.ops.moe_route import moe_route
from tilewright.ops.quant_linear import quant_linear
from tilewright.ops.quant_moe_experts import quant_moe_experts
from tilewright.ops.rms_norm import rms_norm
from tilewright.ops.rms_norm_int8 import rms_norm_int8
from tilewright.ops.rope import rope
from tilewright.ops.swiglu import swiglu

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
