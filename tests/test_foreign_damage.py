"""Foreign files that are damaged or absurd: an import fails with one line that names the source, and leaves nothing."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import convert
from tests.foreign_folders import command, publish
from tests.helpers import error_of

CHANGES = {
    "a list": [1],
    "a number": 3,
    "an absurd width": {"hidden_size": 10**30},
    "absurdly many layers": {"num_hidden_layers": 10**6},
    "an infinite epsilon": {"rms_norm_eps": float("inf")},
    "a window in halves": {"sliding_window": 7.5},
    "an absurd context": {"max_position_embeddings": 10**30},
    "a word for RoPE's scaling": {"rope_scaling": "abc"},
    "a word for its base": {"rope_theta": "abc"},
    "truth as a base": {"rope_theta": True},
    "a word for truth": {"tie_word_embeddings": "false"},
    "too many layer types": {"layer_types": ["full_attention"] * 9},
    "a list for the quantisation": {"quantization_config": [1]},
    "heads that do not divide": {"num_key_value_heads": 3},
    "false for an unknown field": {"is_causal": False},
    "code of its own": {"auto_map": {"AutoModel": "x.y"}},
}


def failed(source, tmp_path, *options):
    """The one line with which the import fails."""
    done = command(convert.main, "import", source, f"--out_dir={tmp_path / 'out'}", *options)
    line = error_of(done)
    assert str(source) in line and not [name for name in os.listdir(tmp_path) if name != source.name], line
    return line


@pytest.fixture
def folder(tmp_path):
    publish("llama", tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_config_that_makes_no_sense_is_one_line(change, folder, tmp_path):
    path = folder / "config.json"
    content = json.loads(path.read_text()) | change if isinstance(change, dict) else change
    path.write_text(json.dumps(content))
    assert failed(folder, tmp_path)


@pytest.mark.parametrize("map", [{"a": "../theirs/model.safetensors"}, {"a": 3}, [1], "x"], ids=str)
def test_an_index_names_files_of_its_folder_only(map, folder, tmp_path):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": map}))
    assert failed(folder, tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_tokenizer_or_a_template_that_is_not_one_is_one_line(name, folder, tmp_path):
    (folder / name).write_bytes(b"\xff\xfe{")
    assert failed(folder, tmp_path)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn, torch.bool], ids=str)
def test_weights_of_another_kind_are_refused_by_name(dtype, folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].to(dtype)}, folder / "model.safetensors")
    assert "model.norm.weight" in failed(folder, tmp_path)


@pytest.mark.parametrize("content", [{"model": None, "model_args": {}}, {"model": {}, "model_args": [1]}, [1],
                                     {"model": {"a": 3}, "model_args": {}}], ids=str)  # fmt: skip
def test_a_checkpoint_that_is_not_nanogpts_is_one_line(content, tmp_path):
    torch.save(content, tmp_path / "ckpt.pt")
    assert failed(tmp_path / "ckpt.pt", tmp_path)


def test_only_unknown_fields_can_be_ignored(folder, tmp_path):
    assert "cannot be passed over" in failed(folder, tmp_path, "--ignore=rope_theta")
    assert "cannot be passed over" in failed(folder, tmp_path, "--ignore=nonsense")


def test_numbers_that_a_precision_cannot_hold_are_told(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = 1e6
    save_file(tensors, folder / "model.safetensors")
    assert command(convert.main, "import", folder, f"--out_dir={tmp_path / 'run'}").returncode == 0
    for to, options in ((tmp_path / "half", ["--dtype=float16"]), (tmp_path / "x.gguf", [])):
        done = command(convert.main, "export", f"--out_dir={tmp_path / 'run'}", f"--to={to}", *options)
        assert "too large" in error_of(done) and "down" in error_of(done) and not to.exists()
    assert sorted(os.listdir(tmp_path)) == ["run", "theirs"]
