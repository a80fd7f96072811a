"""The encoder–decoder: equal to PyTorch's own, blind to padding and to other pairs, and decoded through the cache."""

import itertools

import pytest
import torch
from torch import nn

from decoding.beam import beam_search
from decoding.fast import speed_up
from decoding.stream import generate
from model import GPTConfig
from seq2seq import EncoderDecoder, cross_attention_map, model_of

TINY = {"block_size": 16, "vocab_size": 20, "n_layer": 2, "n_encoder_layer": 2, "n_head": 4, "n_embd": 32}
START, END = 18, 19


def make(seed: int = 0, **options) -> EncoderDecoder:
    """A tiny model with weights large enough to matter, in float64."""
    torch.manual_seed(seed)
    model = model_of(GPTConfig(**TINY | options)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, START, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def copy_into_pytorchs(ours: EncoderDecoder, theirs: nn.Transformer) -> None:
    """Give PyTorch's transformer the weights of ours."""

    def copy(layer: nn.Module, to: nn.Module, prefix: str = "") -> None:
        for kind in ("weight", "bias"):
            getattr(to, prefix + kind).copy_(getattr(layer, kind))

    def common(block, layer) -> None:
        copy(block.attention.qkv, layer.self_attn, "in_proj_")
        copy(block.attention.out, layer.self_attn.out_proj)
        copy(block.norm_attention, layer.norm1)
        copy(block.mlp.up, layer.linear1)
        copy(block.mlp.down, layer.linear2)

    for block, layer in zip(ours.encoder, theirs.encoder.layers, strict=True):
        common(block, layer)
        copy(block.norm_mlp, layer.norm2)
    for block, layer in zip(ours.blocks, theirs.decoder.layers, strict=True):
        common(block, layer)
        for kind in ("weight", "bias"):
            both = [getattr(part, kind) for part in (block.cross.queries, block.cross.keys_values)]
            getattr(layer.multihead_attn, f"in_proj_{kind}").copy_(torch.cat(both))
        copy(block.cross.out, layer.multihead_attn.out_proj)
        copy(block.norm_cross, layer.norm2)
        copy(block.norm_mlp, layer.norm3)
    copy(ours.encoder_norm, theirs.encoder.norm)
    copy(ours.norm, theirs.decoder.norm)


@pytest.mark.parametrize(("post_norm", "attention"), list(itertools.product([False, True], ["flash", "math"])))
def test_it_equals_pytorchs_transformer(post_norm, attention):
    ours = make(bias=True, norm="layernorm", norm_eps=1e-5, qk_norm=False, mlp="gelu_exact", position="learned",
                post_norm=post_norm, attention=attention)  # fmt: skip
    theirs = nn.Transformer(32, 4, 2, 2, ours.config.mlp_dim, 0.0, "gelu", batch_first=True, norm_first=not post_norm,
                            dtype=torch.float64).eval()  # fmt: skip
    copy_into_pytorchs(ours, theirs)
    source, idx = tokens(3, 9), tokens(3, 7, seed=2)
    hidden = torch.arange(9) >= torch.tensor([9, 4, 6])[:, None]  # PyTorch's masks say what is hidden
    inputs = [ours.tok_emb(x) + ours.pos_emb.weight[: x.size(1)] for x in (source, idx)]
    future = torch.ones(7, 7, dtype=torch.bool).triu(1)
    with torch.no_grad():
        expected = ours.head(theirs(*inputs, tgt_mask=future, src_key_padding_mask=hidden,
                                    memory_key_padding_mask=hidden))  # fmt: skip
        logits, _ = ours(idx, source=source, source_padding=~hidden)
    torch.testing.assert_close(logits, expected, atol=1e-10, rtol=0)


POSITIONS = ["rope", "learned", "sinusoidal", "alibi", "none"]


@pytest.mark.parametrize(("position", "n_kv_head"), [*((p, 4) for p in POSITIONS), ("rope", 2)])
def test_a_pair_alone_equals_the_same_pair_padded_and_packed(position, n_kv_head):
    model = make(position=position, n_kv_head=n_kv_head)
    sources, targets = [tokens(5), tokens(8, seed=3)], [tokens(4, seed=4), tokens(6, seed=5)]
    with torch.no_grad():
        alone = [model(t[None], source=s[None])[0][0] for s, t in zip(sources, targets, strict=True)]
        source, idx = (nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (sources, targets))
        real = torch.arange(8) < torch.tensor([5, 8])[:, None]
        padded, _ = model(idx, source=source, source_padding=real)
        numbers = [torch.cat([torch.full_like(x, i) for i, x in enumerate(xs)])[None] for xs in (targets, sources)]
        places = [torch.cat([torch.arange(len(x)) for x in xs])[None] for xs in (targets, sources)]
        packed, _ = model(
            torch.cat(targets)[None], source=torch.cat(sources)[None], positions=places[0], documents=numbers[0],
            source_positions=places[1], source_documents=numbers[1],
        )  # fmt: skip
    for one, row, n in zip(alone, padded, (4, 6), strict=True):
        torch.testing.assert_close(row[:n], one, atol=1e-10, rtol=0)
    torch.testing.assert_close(packed[0], torch.cat(alone), atol=1e-10, rtol=0)


def plain_greedy(model: EncoderDecoder, source: torch.Tensor, n: int) -> list[int]:
    """Greedy decoding that reads everything anew for every token."""
    written = [START]
    while len(written) <= n and (len(written) == 1 or written[-1] != END):
        with torch.no_grad():
            written.append(int(model(torch.tensor([written]), source=source[None])[0][0, -1].argmax()))
    return written[1:]


@pytest.mark.parametrize("position", POSITIONS)
def test_decoding_through_the_cache_equals_reading_everything_anew(position):
    model = make(position=position)
    sources = [tokens(n, seed=n) for n in (3, 9, 9, 6)] + [tokens(3, seed=3)]  # one of them twice
    expected = [plain_greedy(model, source, 12) for source in sources]
    prompts = [[*source.tolist(), START] for source in sources]
    assert generate(model, prompts, 12, temperature=0, eos_id=END) == expected
    one_beam = beam_search(model, prompts, 12, num_beams=1, eos_id=END)
    assert [found[0].tokens for found in one_beam] == expected


def every_text(model: EncoderDecoder, source: torch.Tensor, n: int) -> tuple[float, list[int]]:
    """The likeliest of all texts of at most n tokens, by the mean log-probability of a token."""
    best = (-torch.inf, [])
    for length in range(1, n + 1):
        for middle in itertools.product(range(model.config.vocab_size), repeat=length):
            if END in middle[:-1] or (length < n and middle[-1] != END):
                continue
            idx = torch.tensor([[START, *middle[:-1]]])
            with torch.no_grad():
                logprobs = model(idx, source=source[None])[0][0].log_softmax(-1)
            score = sum(float(logprobs[t, token]) for t, token in enumerate(middle)) / length
            best = max(best, (score, list(middle)))
    return best


def test_a_full_beam_finds_the_best_of_all_targets():
    global END, START
    model = make(vocab_size=6)
    source = torch.tensor([1, 2, 3])
    (found,) = beam_search(model, [[1, 2, 3, 4]], 3, num_beams=40, eos_id=5)
    END, START = 5, 4
    try:
        score, best = every_text(model, source, 3)
    finally:
        END, START = 19, 18
    assert found[0].tokens == best and found[0].score == pytest.approx(score)


def test_a_long_target_keeps_its_source_when_the_context_is_full():
    model = make(block_size=8)
    source = tokens(5)
    (new,) = generate(model, [[*source.tolist(), START]], 20, temperature=0)
    written = [START]
    for _ in range(20):
        start = -(-max(0, len(written) - 8) // 4) * 4
        with torch.no_grad():
            written.append(int(model(torch.tensor([written[start:]]), source=source[None])[0][0, -1].argmax()))
    assert new == written[1:]


def test_faster_layers_do_not_change_the_translation():
    model, prompts = make().float(), [[*tokens(6).tolist(), START], [*tokens(4).tolist(), START]]
    plain = beam_search(model, prompts, 8, num_beams=3, eos_id=END)
    fast = beam_search(speed_up(model, rows=6), prompts, 8, num_beams=3, eos_id=END)
    for a, b in zip(plain, fast, strict=True):
        assert a[0].tokens == b[0].tokens and a[0].score == pytest.approx(b[0].score, abs=1e-4)


def test_the_map_of_cross_attention_is_what_the_model_computes():
    model = make(n_layer=1, qk_norm=False)
    source, idx = tokens(7), tokens(5, seed=2)
    weights = cross_attention_map(model, source, idx, 0)
    assert weights.shape == (4, 5, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 5, dtype=torch.float64))
    found = []
    model.blocks[0].cross.out.register_forward_hook(lambda layer, given, y: found.append(given[0]))
    with torch.no_grad():
        model(idx[None], source=source[None])
        _, v = model.blocks[0].cross.read(model.encode(source[None]))
    torch.testing.assert_close(found[0][0], (weights @ v[0]).transpose(0, 1).flatten(1))


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="leave causal=True"):
        model_of(GPTConfig(**TINY, causal=False))
    model = make()
    with pytest.raises(ValueError, match="a source of 17 tokens does not fit into block_size=16"):
        model(tokens(1, 3), source=tokens(1, 17))
    with pytest.raises(ValueError, match="needs a source"):
        generate(model, [[START]], 3)
