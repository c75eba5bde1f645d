"""Small models of transformers, for the tests of tilewright.patch."""

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 128, "head_dim": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FEW = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
FAMILIES = {
    "Mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 7},
    "Qwen3Moe": FEW | {"norm_topk_prob": True},
    "Qwen2Moe": FEW | {"shared_expert_intermediate_size": 32},
    "Olmoe": {"num_experts": 8, "num_experts_per_tok": 3, "clip_qkv": 1.0},
    "DeepseekV3": {
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "n_group": 2,
        "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4,
    },
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7},
    "Llama": {},
    "Qwen2": {},
    "Gemma2": {"sliding_window": 7, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "Phi3": {},
    "SmolLM3": {"no_rope_layers": [1, 0]},
}  # fmt: skip
MIXTURES = ("Mixtral", "Qwen3Moe", "Olmoe")
IDS = torch.randint(1, 98, (4, 48), generator=torch.Generator().manual_seed(0))


def built(kind: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A model whose attention and experts are transformers' plainest, with weights that matter."""
    torch.manual_seed(0)
    sizes = SMALL | FAMILIES[kind]
    if kind == "DeepseekV3":
        del sizes["head_dim"]
    config = getattr(transformers, f"{kind}Config")(**sizes, attn_implementation="eager")
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
            elif "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.normal_(std=0.1)
    return model.to(dtype)


def results(model: torch.nn.Module, ids: Tensor = IDS) -> dict[str, Tensor]:
    """Logits of a training step, and the gradient of every parameter."""
    model = model.train()
    model.zero_grad()
    logits = model(ids).logits
    torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten()
    ).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}
