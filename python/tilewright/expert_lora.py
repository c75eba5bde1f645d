"""Low-rank adapters (LoRA) of a mixture's experts, which the experts' operators add without forming b a."""

from typing import NamedTuple

from torch import Tensor


class ExpertLora(NamedTuple):
    """A pair for w13, a pair for w2, or both:  w13 + scale b13 a13,  w2 + scale b2 a2  of each expert.

    a13 [E, R, D], b13 [E, 2 I, R], a2 [E, R', I], b2 [E, D, R'], of ranks 1 to 512; scale is alpha / R, or what rsLoRA
    says.  Of x's dtype, which autocast sees to: outside it, adapters that PEFT keeps in float32 over bfloat16 weights
    are to be cast.  Hu et al. 2021, arXiv:2106.09685, eq. 3.
    """

    a13: Tensor | None = None
    b13: Tensor | None = None
    a2: Tensor | None = None
    b2: Tensor | None = None
    scale: float = 1.0

    @classmethod
    def from_peft(
        cls,
        num_experts: int,
        w13: tuple[Tensor, Tensor] | None,
        w2: tuple[Tensor, Tensor] | None,
        scale: float,
    ) -> "ExpertLora":
        """Views of what PEFT's target_parameters train, lora_A.weight [E R, inputs] and lora_B.weight [outputs, R E],
        of which an expert's delta is einsum("o r e, e r i -> e o i", B as [o, R, E], A as [E, R, i]): gradients reach
        them.  PEFT 0.18 had inputs for outputs, which do not fit; scale is its scaling.
        """

        def pair(given: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
            if given is None:
                return None, None
            a, b = given
            a = a.view(num_experts, -1, a.shape[-1])
            return a, b.view(b.shape[0], -1, num_experts).permute(2, 0, 1)

        return cls(*pair(w13), *pair(w2), scale=scale)
