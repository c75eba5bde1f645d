"""Quantisers of a weight matrix [N, K]: of it alone (rtn, hqq), or of it and of what its layer saw (gptq).

awq and smoothquant give factors of the inputs instead, which the layer before takes over.
"""

from tilewright.quant.quantisers.awq import awq
from tilewright.quant.quantisers.gptq import gptq
from tilewright.quant.quantisers.hqq import hqq
from tilewright.quant.quantisers.rtn import rtn
from tilewright.quant.quantisers.smoothquant import smoothquant

__all__ = ["awq", "gptq", "hqq", "rtn", "smoothquant"]
