"""Small random models of foreign families, saved as their owners would, and what import makes of them."""

import json
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from formats.hub_config import Fields
from formats.source import read_family
from formats.weights import Safetensors, WithoutPrefixes, check_names, our_shapes, read_weight
from model import GPT

SIZES = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 50.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 50.0, "factor": 4.0, "low_freq_factor": 0.5, "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0, "beta_slow": 0.25, "beta_fast": 2.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
# name → (transformers' class, its options)
FAMILIES = {
    "llama": ("Llama", {"rope_parameters": ROPE, "head_dim": 12}),
    "llama, linear": ("Llama", {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.0}}),
    "llama 3.1": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama, yarn": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"rope_parameters": ROPE, "sliding_window": None}),
    "mistral 0.1": ("Mistral", {"rope_parameters": ROPE, "sliding_window": 7}),
    "qwen2": ("Qwen2", {"rope_parameters": ROPE}),
    "qwen3": ("Qwen3", {"rope_parameters": ROPE, "head_dim": 12, "tie_word_embeddings": True}),
    "smollm3": ("SmolLM3", {"rope_parameters": ROPE, "pad_token_id": 0, "use_sliding_window": False}),
    "phi3": ("Phi3", {"rope_parameters": ROPE, "pad_token_id": 0, "sliding_window": 9}),
    "gemma": ("Gemma", {"rope_parameters": ROPE, "head_dim": 12}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 101}),
    "gpt2, exact gelu": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 101,
                                  "activation_function": "gelu", "tie_word_embeddings": False}),
}  # fmt: skip


@contextmanager
def doubles():
    """Have both sides compute in float64 what they otherwise compute in float32 whatever the weights' precision.

    That is the tables of RoPE, here and there, and the means of transformers' norms.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        for name in ("float", "float32"):
            patch.setattr(torch, name, torch.float64)
        patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)  # for what looks like float32 now
        yield


def theirs(name, dtype=torch.float32, seed=0):
    """A random model of transformers: norms away from 1, biases away from 0."""
    import transformers

    kind, options = FAMILIES[name]
    sizes = {} if kind == "GPT2" else SIZES
    config = getattr(transformers, f"{kind}Config")(**sizes | options, attn_implementation="eager")
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config).to(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, dtype=dtype), alpha=0.2)
    return model.eval()


def ours(folder, dtype=torch.float32):
    """The model that import makes of a folder's config.json and weights."""
    fields = Fields.of(folder)
    config, renaming, _ = read_family(fields, ())
    tensors = WithoutPrefixes(Safetensors(folder), "transformer.")
    check_names(tensors, renaming, our_shapes(config))
    model = GPT(config).to(dtype)
    weights = {name: read_weight(tensors, weight) for name, weight in renaming.weights.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"head.weight"}  # tied
    return model.eval()


def save_baichuan2(folder, alibi, seed=0, **changes):
    """A small random Baichuan 2 in the layout of the Hub; returns its tensors as float64 arrays."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    config = {
        "architectures": ["BaichuanForCausalLM"], "model_type": "baichuan", "vocab_size": 125_696, "hidden_size": 24,
        "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3 if alibi else 4, "hidden_act": "silu",
        "model_max_length": 32, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "z_loss_weight": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    } | ({} if alibi else {"max_position_embeddings": 32}) | changes  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    C, V, M = config["hidden_size"], config["vocab_size"], config["intermediate_size"]
    shapes = {"model.embed_tokens": (V, C), "model.norm": (C,), "lm_head": (V, C)}
    for i in range(config["num_hidden_layers"]):
        name = f"model.layers.{i}."
        shapes |= {
            name + "self_attn.W_pack": (3 * C, C), name + "self_attn.o_proj": (C, C), name + "input_layernorm": (C,),
            name + "mlp.gate_proj": (M, C), name + "mlp.up_proj": (M, C), name + "mlp.down_proj": (C, M),
            name + "post_attention_layernorm": (C,),
        }  # fmt: skip
    tensors = {f"{name}.weight": torch.randn(shape, dtype=torch.float64) * 0.3 for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return {name: tensor.numpy() for name, tensor in tensors.items()}
