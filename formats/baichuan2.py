"""Baichuan 2 [arXiv 2309.10305]: Llama's shape with W_pack, NormHead, and ALiBi in place of RoPE in the 13B model.

The models' own code on the Hugging Face Hub stacks queries, keys and values in W_pack, and divides each row of the
output head by its length (NormHead, section 2.5 of the report). Baichuan 1 has the same names and no NormHead.
"""

from formats.hub_config import Fields
from formats.llama import TABLE
from formats.weights import Renaming, expand
from model import GPTConfig

TYPES = ("baichuan",)
PACKED = {"blocks.{i}.attention.qkv": "model.layers.{i}.self_attn.W_pack"}
VOCABULARY_OF_2 = 125_696  # table 1 of the report; Baichuan 1 has 64,000 tokens and a plain output head


def read_config(fields: Fields) -> tuple[GPTConfig, list[str]]:
    """Our config of the model, and notes. The 7B model says max_position_embeddings and has RoPE; the 13B has ALiBi."""
    n_head, n_embd, vocab_size = (fields.size(x) for x in ("num_attention_heads", "hidden_size", "vocab_size"))
    fields.get("auto_map")  # the models' own code, in whose place this file is
    fields.expect("hidden_act", "silu")
    fields.expect("tie_word_embeddings", False)
    rope = "max_position_embeddings" in fields.content
    length = fields.size("model_max_length", fields.get("max_position_embeddings"))
    context = fields.size("max_position_embeddings", length)
    norm_head = vocab_size == VOCABULARY_OF_2 or bool(fields.get("norm_head", False))
    config = GPTConfig(
        block_size=min(length, context), vocab_size=vocab_size, n_layer=fields.size("num_hidden_layers"),
        n_head=n_head, n_embd=n_embd, mlp_dim=fields.size("intermediate_size"),
        position="rope" if rope else "alibi", norm_eps=fields.number("rms_norm_eps", 1e-6), qk_norm=False,
        tie_embeddings=False, norm_head=norm_head,
    )  # fmt: skip
    kind = "with NormHead" if norm_head else f"1, without NormHead, by its {vocab_size:,} tokens"
    return config, [f"Baichuan {kind}, and {'RoPE' if rope else 'ALiBi'}"]


def renaming(config: GPTConfig, kind: str) -> Renaming:
    """Where the weights of a model come from."""
    return Renaming(expand(config, TABLE | PACKED), ("rotary_emb.inv_freq", "future_mask"))
