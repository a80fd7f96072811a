"""Llama and its relatives, which share its names: Mistral, Qwen2 and Qwen3, SmolLM3, Phi-3 and Gemma 1.

They differ in few options: biases on queries, keys and values (Qwen2), normalised queries and keys (Qwen3), a sliding
window (Mistral), layers without RoPE (SmolLM3), stacked projections (Phi-3), a GELU gate and scaled embeddings (Gemma).
Sources: Touvron et al. 2023 (arXiv 2302.13971); the config.json and names of the models on the Hugging Face Hub.
"""

import math
from typing import Any

from formats.hub_config import DECODER, Fields
from formats.weights import Renaming, Weight, expand
from model import GPTConfig

TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "gemma")
ACTIVATIONS = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu": "geglu"}  # Gemma's "gelu" is the tanh form too
# What holds where the config does not say, if it is not what holds for Llama; as in transformers
DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4096},
    "qwen3": {"head_dim": 128},
    "smollm3": {"tie_word_embeddings": True, "rope_theta": 2e6},
    "phi3": {"rms_norm_eps": 1e-5},
    "gemma": {"tie_word_embeddings": True, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh"},
}
TABLE = {
    "tok_emb": "model.embed_tokens",
    "blocks.{i}.norm_attention": "model.layers.{i}.input_layernorm",
    "blocks.{i}.attention.qkv": (
        "model.layers.{i}.self_attn.q_proj model.layers.{i}.self_attn.k_proj model.layers.{i}.self_attn.v_proj"
    ),
    "blocks.{i}.attention.q_norm": "model.layers.{i}.self_attn.q_norm",
    "blocks.{i}.attention.k_norm": "model.layers.{i}.self_attn.k_norm",
    "blocks.{i}.attention.out": "model.layers.{i}.self_attn.o_proj",
    "blocks.{i}.norm_mlp": "model.layers.{i}.post_attention_layernorm",
    "blocks.{i}.mlp.up": "model.layers.{i}.mlp.gate_proj model.layers.{i}.mlp.up_proj",
    "blocks.{i}.mlp.down": "model.layers.{i}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
STACKED = {  # Phi-3's
    "blocks.{i}.attention.qkv": "model.layers.{i}.self_attn.qkv_proj",
    "blocks.{i}.mlp.up": "model.layers.{i}.mlp.gate_up_proj",
}


# ---------------------------------------------------------------------------------------------------------------------
# In


def read_config(fields: Fields) -> tuple[GPTConfig, list[str]]:
    """Our config of the model, and notes on what holds only within limits.

    Raises ValueError for an option that our model does not have, with the field's name and value.
    """
    kind = fields.get("model_type")
    usual = DEFAULTS.get(kind, {})
    n_layer, n_head = fields.size("num_hidden_layers"), fields.size("num_attention_heads")
    n_embd, context = fields.size("hidden_size"), fields.size("max_position_embeddings")
    # Llama's attention_bias is also on the output projection; Qwen2 has no such field, and biases on q, k, v
    fields.expect("attention_bias", False)
    fields.expect("mlp_bias", False)
    fields.expect("partial_rotary_factor", 1.0)
    tied = fields.switch("tie_word_embeddings", usual.get("tie_word_embeddings", False))
    if kind == "gemma":
        fields.expect("tie_word_embeddings", True)
    activation = fields.get("hidden_activation", fields.get("hidden_act", usual.get("hidden_act", "silu")))
    if activation not in ACTIVATIONS or (ACTIVATIONS[activation] == "geglu") != (kind == "gemma"):
        raise ValueError(f"{fields.place}: hidden_act = {activation!r} is not supported for {kind}")
    scaling, notes, within = read_scaling(fields, context, usual.get("rope_theta", 10000.0))
    window, window_notes = read_window(fields, kind, n_layer)
    if window and window_notes:  # only some layers have the window: within it, all are alike
        within, window = min(within, window), 0
    config = GPTConfig(
        block_size=min(within, context), vocab_size=fields.size("vocab_size"), n_layer=n_layer, n_head=n_head,
        n_kv_head=fields.size("num_key_value_heads", n_head), n_embd=n_embd,
        head_dim=fields.size("head_dim", usual.get("head_dim", n_embd // n_head)),
        mlp_dim=fields.size("intermediate_size"), qkv_bias=kind == "qwen2", position="rope",
        norm_eps=fields.number("rms_norm_eps", usual.get("rms_norm_eps", 1e-6)), qk_norm=kind == "qwen3",
        mlp=ACTIVATIONS[activation],
        tie_embeddings=tied and kind != "gemma",  # where tokens come in, Gemma's are scaled; see `renaming`
        sliding_window=window, nope_every=read_nope(fields, n_layer) if kind == "smollm3" else 0, **scaling,
    )  # fmt: skip
    return config, [*notes, *window_notes]


def read_scaling(fields: Fields, context: int, usual_theta: float) -> tuple[dict[str, Any], list[str], int]:
    """Settings of RoPE and its scaling, notes, and the longest context within which they hold.

    Until version 4 of transformers, rope_theta and rope_scaling are fields of their own; since 5, rope_parameters.
    """
    place = f"{fields.place}: rope_scaling"
    given = Fields(fields.table("rope_parameters") | fields.table("rope_scaling"), place)
    outside = fields.get("original_max_position_embeddings")  # Phi-3 keeps it there
    theta = given.number("rope_theta", fields.number("rope_theta", usual_theta))
    kind = given.get("rope_type", given.get("type", "default"))
    given.expect("partial_rotary_factor", 1.0)
    settings: dict[str, Any] = {"rope_theta": theta}
    if kind == "default":
        notes, within = [], context
    elif kind == "dynamic":
        within = given.size("original_max_position_embeddings", context)
        factor = given.number("factor")
        notes = [f"RoPE's dynamic scaling (factor {factor:g}) begins beyond {within} tokens: block_size is {within}"]
    elif kind in ("linear", "llama3", "yarn"):
        notes, within = [], context
        original = given.size("original_max_position_embeddings", outside or context)
        settings |= {
            "rope_scaling": kind,
            "rope_factor": given.number("factor"),
            "rope_original": original if kind != "linear" else 0,
        }
        if kind == "llama3":
            settings |= {"rope_low": given.number("low_freq_factor"), "rope_high": given.number("high_freq_factor")}
        elif kind == "yarn":
            settings |= {"rope_low": given.number("beta_slow", 1.0), "rope_high": given.number("beta_fast", 32.0)}
            given.expect("truncate", True)
            usual = 0.1 * math.log(settings["rope_factor"]) + 1  # of cos and sin [Peng et al. 2023, equation 22]
            if not math.isclose(given.number("attention_factor", usual), usual, rel_tol=1e-6):
                raise ValueError(f"{given.place}: attention_factor = {given.get('attention_factor')} is not supported")
    else:
        raise ValueError(
            f"{given.place}: rope_type = {kind!r} is not supported here; linear, dynamic, llama3, yarn are"
        )
    if left := given.unread():
        raise ValueError(f"{given.place}: {', '.join(left)} is not supported here")
    return settings, notes, within


def read_window(fields: Fields, kind: str, n_layer: int) -> tuple[int, list[str]]:
    """The sliding window in tokens, 0 for none, and a note if only some of the layers have it.

    In transformers, Llama and Gemma have no window, whatever the config says; Mistral and Phi-3 have it in all layers;
    Qwen2 and 3 in those from max_window_layers on, and SmolLM3 in those without RoPE, if use_sliding_window says so.
    """
    window = 0 if fields.get("sliding_window") is None else fields.size("sliding_window")
    if kind == "mistral" and "sliding_window" not in fields.content:
        window = DEFAULTS["mistral"]["sliding_window"]
    use, first = fields.switch("use_sliding_window", False), fields.get("max_window_layers", 28)
    layers = fields.get("layer_types")
    if layers is not None and len(layers) != n_layer:
        raise ValueError(f"{fields.place}: layer_types has {len(layers)} entries for {n_layer} layers")
    if unknown := set(layers or ()) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"{fields.place}: layer_types has {unknown.pop()!r}, which is not supported here")
    if kind in ("mistral", "phi3"):
        sliding = n_layer
    elif kind in ("qwen2", "qwen3", "smollm3") and use:
        every = fields.get("no_rope_layer_interval", 4)
        default = max(n_layer - first, 0) if kind != "smollm3" else n_layer // every
        sliding = list(layers).count("sliding_attention") if layers is not None else default
    else:
        sliding = 0
    if not window or not sliding:
        return 0, []
    if sliding == n_layer:
        return window, []
    return window, [f"{sliding} of {n_layer} layers see {window} tokens only: block_size is {window}, where all agree"]


def read_nope(fields: Fields, n_layer: int) -> int:
    """SmolLM3: every n-th layer is without RoPE. Raises ValueError for a list that is not of that kind."""
    every = fields.size("no_rope_layer_interval", 4)
    usual = [int((layer + 1) % every != 0) for layer in range(n_layer)]  # 1: with RoPE
    if (layers := fields.get("no_rope_layers", usual)) != usual:
        raise ValueError(f"{fields.place}: no_rope_layers = {layers} is not supported, only every n-th layer without")
    return every


def renaming(config: GPTConfig, kind: str) -> Renaming:
    """Where the weights of a model of that type come from."""
    table = TABLE | (STACKED if kind == "phi3" else {})
    weights = expand(config, table)
    if kind == "gemma":  # norms hold w - 1, and embeddings are multiplied by √C where tokens come in
        for name in weights:
            if "norm" in name:
                weights[name] = weights[name]._replace(shift=1.0)
        embedding: Weight = weights["tok_emb.weight"]
        weights["head.weight"] = embedding
        weights["tok_emb.weight"] = embedding._replace(scale=math.sqrt(config.n_embd))
    same = (("model.embed_tokens.weight", "lm_head.weight"),) if config.tie_embeddings or kind == "gemma" else ()
    return Renaming(weights, ("rotary_emb.inv_freq",), same)


# ---------------------------------------------------------------------------------------------------------------------
# Out


def type_of(config: GPTConfig) -> tuple[str, list[str]]:
    """The type of model that the config equals, and the options that stand in the way (then the type is empty).

    The head's row normalisation is no obstacle: the exported head is normalised already.
    """
    wanted: dict[str, tuple[Any, ...]] = {
        "position": ("rope",), "norm": ("rmsnorm",), "mlp": ("swiglu",), "bias": (False,),
    } | DECODER  # fmt: skip
    obstacles = [f"{key}={getattr(config, key)}" for key, good in wanted.items() if getattr(config, key) not in good]
    options = {
        "qk_norm": ("qwen3", config.qk_norm), "qkv_bias": ("qwen2", config.qkv_bias),
        "sliding_window": ("mistral", config.sliding_window), "nope_every": ("smollm3", config.nope_every),
    }  # fmt: skip
    used = [name for name, (_, on) in options.items() if on]
    if len(used) > 1:
        obstacles.append(f"{' with '.join(used)}, which no known class has together")
    kind = options[used[0]][0] if used else "llama"
    if config.n_embd % config.n_head:
        obstacles.append(f"n_embd={config.n_embd}, which transformers wants to be a multiple of n_head")
    if kind in ("qwen2", "smollm3") and config.head_dim * config.n_head != config.n_embd:
        obstacles.append(f"head_dim={config.head_dim}, which {kind} takes from n_embd / n_head")
    if config.norm_head and config.tie_embeddings:
        obstacles.append("norm_head=True with tie_embeddings=True")
    return ("" if obstacles else kind), obstacles


CLASSES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "smollm3": "SmolLM3ForCausalLM",
}  # fmt: skip


def write_config(config: GPTConfig, kind: str) -> dict[str, Any]:
    """The config.json of our model as one of that type; versions 4 and 5 of transformers read it."""
    content: dict[str, Any] = {
        "architectures": [CLASSES[kind]], "model_type": kind, "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd, "intermediate_size": config.mlp_dim, "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head, "num_key_value_heads": config.n_kv_head,
        "max_position_embeddings": config.block_size, "rms_norm_eps": config.norm_eps, "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings, "rope_theta": config.rope_theta, "attention_bias": False,
        "initializer_range": 0.02, "use_cache": True,
    }  # fmt: skip
    if kind not in ("qwen2", "smollm3"):
        content["head_dim"] = config.head_dim
    if kind == "mistral":
        content["sliding_window"] = config.sliding_window
    if kind == "smollm3":
        layers = [int((layer + 1) % config.nope_every != 0) for layer in range(config.n_layer)]
        content |= {"no_rope_layer_interval": config.nope_every, "no_rope_layers": layers}
        content["pad_token_id"] = None  # transformers' default, 128004, has no embedding in a smaller vocabulary
    if config.rope_scaling != "none":
        scaling: dict[str, Any] = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
        if config.rope_scaling == "llama3":
            scaling |= {"low_freq_factor": config.rope_low, "high_freq_factor": config.rope_high}
        elif config.rope_scaling == "yarn":
            scaling |= {"beta_slow": config.rope_low, "beta_fast": config.rope_high}
        if config.rope_scaling != "linear":
            scaling["original_max_position_embeddings"] = config.rope_original
        content["rope_scaling"] = scaling
    return content
