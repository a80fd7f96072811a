"""Every family's weights and config: our logits are those of transformers, or of a reference from the equations."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from formats.hub_config import Fields
from formats.source import read_family
from tests import baichuan2_reference
from tests.foreign_models import FAMILIES, SIZES, doubles, ours, save_baichuan2, theirs

TOKENS = torch.randint(101, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name, tmp_path):
    other = theirs(name)
    other.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(tmp_path)(TOKENS)[0], other(TOKENS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_in_double_precision_are_those_of_transformers(name, tmp_path):
    with doubles(), torch.no_grad():
        other = theirs(name, torch.float64)
        other.save_pretrained(tmp_path)
        expected, found = other(TOKENS).logits, ours(tmp_path, torch.float64)(TOKENS)[0]
    assert expected.dtype == found.dtype == torch.float64
    tolerance = 1e-6 if name == "gemma" else 1e-9  # transformers keeps Gemma's √C in float32
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("alibi", [False, True], ids=["7B", "13B"])
def test_baichuan_2_follows_its_report(alibi, tmp_path):
    weights = save_baichuan2(tmp_path, alibi)
    tokens = np.random.default_rng(0).integers(125_696, size=20)
    expected = baichuan2_reference.logits(weights, tokens, n_layer=2, n_head=3 if alibi else 4, alibi=alibi)
    with doubles(), torch.no_grad():
        found = ours(tmp_path, torch.float64)(torch.tensor(tokens)[None])[0][0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_shards_are_read_like_one_file(tmp_path):
    other = theirs("llama")
    other.save_pretrained(tmp_path / "one")
    other.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    a, b = ours(tmp_path / "one").state_dict(), ours(tmp_path / "many").state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def changed(folder, **fields):
    """Change fields of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "change,complaint",
    [
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0}}, "rope_type = 'longrope'"),
        ({"model_type": "mamba"}, "model_type = 'mamba'"),
        ({"logit_scale": 0.5}, "logit_scale=0.5"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config = 'awq'"),
        ({"num_hidden_layers": "four"}, "num_hidden_layers must be a whole number"),
        ({"num_hidden_layers": 5}, "lacks the tensor model.layers.4"),
        ({"num_hidden_layers": 3}, "has a tensor model.layers.3"),
        ({"intermediate_size": 47}, "has shape .*48.*config asks for .*47"),
        ({"layer_types": ["full_attention", "linear_attention"] * 2}, "layer_types has 'linear_attention'"),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(change, complaint, tmp_path):
    theirs("llama").save_pretrained(tmp_path)
    changed(tmp_path, **change)
    with pytest.raises(ValueError, match=complaint):
        ours(tmp_path)


def test_a_missing_shard_a_pickle_and_a_damaged_file_are_refused(tmp_path):
    other = theirs("llama")
    other.save_pretrained(tmp_path, max_shard_size="20KB")
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match="lacks model-00002"):
        ours(tmp_path)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    other.config.save_pretrained(pickled)
    torch.save(other.state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickle"):
        ours(pickled)
    (pickled / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        ours(pickled)


def test_tied_tensors_that_differ_are_refused(tmp_path):
    other = theirs("llama 3.1")
    other.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, tmp_path / "model.safetensors")
    ours(tmp_path)
    save_file(tensors | {"lm_head.weight": embedding + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="differ"):
        ours(tmp_path)


def notes_of(folder, **change):
    changed(folder, **change)
    config, _, notes = read_family(Fields.of(folder), ())
    return config, " ".join(notes)


def test_what_holds_within_a_shorter_context_is_imported_for_that_and_said(tmp_path):
    theirs("qwen2").save_pretrained(tmp_path)
    mixed = ["full_attention"] * 2 + ["sliding_attention"] * 2
    config, notes = notes_of(tmp_path, use_sliding_window=True, sliding_window=10, layer_types=mixed)
    assert (config.block_size, config.sliding_window) == (10, 0) and "2 of 4 layers" in notes
    rope = {"rope_type": "dynamic", "rope_theta": 50.0, "factor": 2.0}
    config, notes = notes_of(tmp_path, layer_types=None, use_sliding_window=False, rope_parameters=rope)
    assert config.block_size == 64 and config.rope_scaling == "none" and "beyond 64 tokens" in notes


def test_older_config_files_mean_the_same(tmp_path):
    """Until version 4, transformers kept RoPE's base and scaling in two fields."""
    theirs("llama 3.1").save_pretrained(tmp_path)
    new, _, _ = read_family(Fields.of(tmp_path), ())
    content = json.loads((tmp_path / "config.json").read_text())
    rope = content.pop("rope_parameters")
    content |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    old, _, _ = read_family(Fields(content, "old"), ())
    assert old == new


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Phi3", "Gemma"])
def test_what_a_config_leaves_out_has_transformers_defaults(kind, tmp_path):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, pad_token_id=0)
    other = getattr(transformers, f"{kind}ForCausalLM")(config)
    other.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    kept = {name: value for name, value in content.items() if name in (*SIZES, "model_type", "architectures")}
    path.write_text(json.dumps(kept | {"pad_token_id": 0}))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(ours(tmp_path)(TOKENS)[0], again(TOKENS).logits, rtol=1e-4, atol=1e-4)
