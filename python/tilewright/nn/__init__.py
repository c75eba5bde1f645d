"""Drop-in modules: subclasses of torch.nn where one exists, with its state dict."""

from tilewright.nn import functional
from tilewright.nn.add_rms_norm import AddRMSNorm
from tilewright.nn.attention import Attention, KVCache
from tilewright.nn.experts import Experts
from tilewright.nn.geglu import GeGLU
from tilewright.nn.moe import MoE
from tilewright.nn.moe_router import MoERouter
from tilewright.nn.multihead_attention import MultiheadAttention
from tilewright.nn.quant_embedding import QuantEmbedding
from tilewright.nn.quant_experts import QuantExperts
from tilewright.nn.quant_linear import QuantLinear
from tilewright.nn.rms_norm import RMSNorm
from tilewright.nn.rope import RotaryEmbedding
from tilewright.nn.swiglu import SwiGLU

__all__ = [
    "AddRMSNorm",
    "Attention",
    "Experts",
    "GeGLU",
    "KVCache",
    "MoE",
    "MoERouter",
    "MultiheadAttention",
    "QuantEmbedding",
    "QuantExperts",
    "QuantLinear",
    "RMSNorm",
    "RotaryEmbedding",
    "SwiGLU",
    "functional",
]
