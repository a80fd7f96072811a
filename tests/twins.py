"""The same random weights in transformers' models and in ours: theirs are the oracle for logits and for decoding."""

from itertools import product

import torch

from model import GPT, GPTConfig


def randomised(theirs, seed):
    """Every weight of a transformers model random: norms away from 1, biases away from 0."""
    device = next(theirs.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator, device=device), alpha=0.2)
    return theirs.eval()


def load(model, weights):
    """The model with `weights` in the place of all of its own."""
    assert weights.keys() == model.state_dict().keys()
    model.load_state_dict(weights)
    return model.eval()


def qwen3_twins(seed=0, tie=True, kind="flash", vocab_size=101, n_embd=32):
    """Qwen3 and the default architecture."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    theirs = randomised(
        Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=vocab_size, hidden_size=n_embd, intermediate_size=48, num_hidden_layers=3,
                num_attention_heads=4, num_key_value_heads=2, head_dim=12, max_position_embeddings=64,
                tie_word_embeddings=tie, rope_parameters={"rope_type": "default", "rope_theta": 50.0},
                attn_implementation="eager",
            )
        ), seed
    )  # fmt: skip
    w = theirs.state_dict()
    weights = {"tok_emb.weight": w["model.embed_tokens.weight"], "norm.weight": w["model.norm.weight"]}
    weights["head.weight"] = w["model.embed_tokens.weight" if tie else "lm_head.weight"]
    for i in range(3):
        mine, other = f"blocks.{i}.", f"model.layers.{i}."
        names = {
            "norm_attention": "input_layernorm", "norm_mlp": "post_attention_layernorm",
            "attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm",
            "attention.out": "self_attn.o_proj", "mlp.down": "mlp.down_proj",
        }  # fmt: skip
        weights |= {f"{mine}{a}.weight": w[f"{other}{b}.weight"] for a, b in names.items()}
        qkv, gates = [f"self_attn.{x}_proj" for x in "qkv"], ["mlp.gate_proj", "mlp.up_proj"]
        for a, b in (("attention.qkv", qkv), ("mlp.up", gates)):
            weights[f"{mine}{a}.weight"] = torch.cat([w[f"{other}{x}.weight"] for x in b])
    config = GPTConfig(
        block_size=64, vocab_size=vocab_size, n_layer=3, n_head=4, n_kv_head=2, n_embd=n_embd, head_dim=12, mlp_dim=48,
        rope_theta=50.0, tie_embeddings=tie, attention=kind,
    )  # fmt: skip
    return theirs, load(GPT(config), weights)


def gpt2_twins(
    seed=0, kind="flash", vocab_size=101, n_embd=32, n_layer=3, n_head=4, n_positions=64, implementation="eager"
):
    """GPT-2 and the classic architecture."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    sizes = {"vocab_size": vocab_size, "n_embd": n_embd, "n_layer": n_layer, "n_head": n_head}
    config = GPT2Config(**sizes, n_positions=n_positions, attn_implementation=implementation)
    theirs = randomised(GPT2LMHeadModel(config), seed)
    w = theirs.state_dict()
    weights = {"tok_emb.weight": w["transformer.wte.weight"], "head.weight": w["transformer.wte.weight"]}
    weights["pos_emb.weight"] = w["transformer.wpe.weight"]
    weights |= {f"norm.{end}": w[f"transformer.ln_f.{end}"] for end in ("weight", "bias")}
    names = {
        "norm_attention": "ln_1", "attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj",
        "norm_mlp": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
    }  # fmt: skip
    for i, (mine, other), end in product(range(n_layer), names.items(), ("weight", "bias")):
        x = w[f"transformer.h.{i}.{other}.{end}"]
        weights[f"blocks.{i}.{mine}.{end}"] = x.T if x.dim() == 2 else x  # their Conv1D keeps (in, out)
    config = GPTConfig(
        **sizes, block_size=n_positions, position="learned", norm="layernorm", norm_eps=1e-5, mlp="gelu", bias=True,
        qk_norm=False, attention=kind,
    )  # fmt: skip
    return theirs, load(GPT(config), weights)
