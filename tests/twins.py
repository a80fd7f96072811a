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


def llama_weights(theirs, qk_norm=False):
    """The weights of a transformers model whose layers are named as Llama's, by our names."""
    w = theirs.state_dict()
    weights = {"tok_emb.weight": w["model.embed_tokens.weight"], "norm.weight": w["model.norm.weight"]}
    weights["head.weight"] = w["lm_head.weight"]
    names = {
        "norm_attention": "input_layernorm", "norm_mlp": "post_attention_layernorm",
        "attention.out": "self_attn.o_proj", "mlp.down": "mlp.down_proj",
    }  # fmt: skip
    names |= {f"attention.{x}_norm": f"self_attn.{x}_norm" for x in "qk"} if qk_norm else {}
    stacks = {
        "attention.qkv": [f"self_attn.{x}_proj" for x in "qkv"],
        "mlp.up": ["mlp.gate_proj", "mlp.up_proj"],
    }
    for i in range(theirs.config.num_hidden_layers):
        mine, other = f"blocks.{i}.", f"model.layers.{i}."
        weights |= {f"{mine}{a}.weight": w[f"{other}{b}.weight"] for a, b in names.items()}
        for a, parts in stacks.items():
            weights[f"{mine}{a}.weight"] = torch.cat([w[f"{other}{x}.weight"] for x in parts])
            if f"{other}{parts[0]}.bias" in w:
                weights[f"{mine}{a}.bias"] = torch.cat([w[f"{other}{x}.bias"] for x in parts])
    return weights


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
    config = GPTConfig(
        block_size=64, vocab_size=vocab_size, n_layer=3, n_head=4, n_kv_head=2, n_embd=n_embd, head_dim=12, mlp_dim=48,
        rope_theta=50.0, tie_embeddings=tie, attention=kind,
    )  # fmt: skip
    return theirs, load(GPT(config), llama_weights(theirs, qk_norm=True))


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


SHAPE = {"block_size": 64, "n_layer": 4, "n_head": 4, "n_kv_head": 2, "head_dim": 16, "mlp_dim": 48, "qk_norm": False}
ORIGINAL = 16  # the context before scaling, of 64
# A family, or a way to scale RoPE: (transformers' class, what its config has beside the sizes, what ours has)
FAMILIES = {
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}, {"qkv_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 5}, {"sliding_window": 5}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 4, "pad_token_id": 0}, {"nope_every": 4}),
    "gemma": ("Gemma", {"tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"}, {"mlp": "geglu"}),
    "linear": ("Llama", {"rope": {"factor": 4.0}}, {"rope_scaling": "linear", "rope_factor": 4.0}),
    "llama3": (
        "Llama",
        {"rope": {"factor": 4.0, "low_freq_factor": 0.5, "high_freq_factor": 2.0}},
        {"rope_scaling": "llama3", "rope_factor": 4.0, "rope_low": 0.5, "rope_high": 2.0, "rope_original": ORIGINAL},
    ),
    "yarn": (
        "Llama",
        {"rope": {"factor": 4.0, "beta_slow": 0.25, "beta_fast": 2.0}},
        {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_low": 0.25, "rope_high": 2.0, "rope_original": ORIGINAL},
    ),
}


def family_twins(family, seed=0, kind="flash", vocab_size=101, n_embd=64, dtype=torch.float32):
    """A model of the family, with tied embeddings where it has them, and ours."""
    import transformers

    name, options, ours = FAMILIES[family]
    options = {"tie_word_embeddings": False, "sliding_window": None} | options
    rope = {"rope_type": family if "rope" in options else "default", "rope_theta": 50.0} | options.pop("rope", {})
    if family in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = ORIGINAL
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=vocab_size, hidden_size=n_embd, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, rms_norm_eps=1e-6, rope_parameters=rope,
        bos_token_id=None, eos_token_id=None, attn_implementation="eager", **options,
    )  # fmt: skip
    theirs = randomised(getattr(transformers, f"{name}ForCausalLM")(config), seed).to(dtype)
    weights, tie = llama_weights(theirs), config.tie_word_embeddings and family != "gemma"
    if family == "gemma":  # its norms multiply by 1 + w, and its embeddings, but not its head, by √C
        weights = {n: x + 1 if "norm" in n else x for n, x in weights.items()}
        weights["tok_emb.weight"] = weights["tok_emb.weight"] * n_embd**0.5
    config = GPTConfig(
        **SHAPE, **ours, vocab_size=vocab_size, n_embd=n_embd, rope_theta=50.0, tie_embeddings=tie, attention=kind
    )  # fmt: skip
    return theirs, load(GPT(config).to(dtype), weights)


def mistral_twins(seed=0, **options):
    """Mistral and ours, with a window of 5 tokens."""
    return family_twins("mistral", seed, **options)
