"""The same random weights in transformers' models and in ours: theirs are the oracle for logits and for decoding."""

from dataclasses import replace

import torch

from formats import gpt2
from formats.hub_config import Fields
from formats.source import read_family
from formats.weights import InMemory, WithoutPrefixes, check_names, our_shapes, read_weight
from model import GPT


def randomised(theirs, seed):
    """Every weight of a transformers model random: norms away from 1, biases away from 0."""
    device = next(theirs.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator, device=device), alpha=0.2)
    return theirs.eval()


def twin(theirs, kind="flash"):
    """Our model with the config and the weights of a transformers model, as an import makes it."""
    fields = Fields(theirs.config.to_diff_dict(), "the twin's config")
    config, renaming, _ = read_family(fields, ())
    tensors = WithoutPrefixes(InMemory("the twin", theirs.state_dict()), gpt2.PREFIX)
    check_names(tensors, renaming, our_shapes(config))
    ours = GPT(replace(config, attention=kind)).to(next(theirs.parameters()).dtype)
    weights = {name: read_weight(tensors, weight) for name, weight in renaming.weights.items()}
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"head.weight"}  # of tied embeddings
    return ours.eval()


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
    return theirs, twin(theirs, kind)


def gpt2_twins(
    seed=0, kind="flash", vocab_size=101, n_embd=32, n_layer=3, n_head=4, n_positions=64, implementation="eager"
):
    """GPT-2 and the classic architecture."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    sizes = {"vocab_size": vocab_size, "n_embd": n_embd, "n_layer": n_layer, "n_head": n_head}
    config = GPT2Config(**sizes, n_positions=n_positions, attn_implementation=implementation)
    theirs = randomised(GPT2LMHeadModel(config), seed)
    return theirs, twin(theirs, kind)


def mistral_twins(seed=0, kind="flash", vocab_size=101, n_embd=64):
    """Mistral with a window of 5 tokens, and ours."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=vocab_size, hidden_size=n_embd, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, sliding_window=5, bos_token_id=None,
        eos_token_id=None, rope_parameters={"rope_type": "default", "rope_theta": 50.0}, attn_implementation="eager",
    )  # fmt: skip
    theirs = randomised(MistralForCausalLM(config), seed)
    return theirs, twin(theirs, kind)
