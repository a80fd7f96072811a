"""Tiny Shakespeare with a token per character, on a GPU: nanoGPT's baby GPT (6 layers, 384 wide, context 256)."""

out_dir = "out/shakespeare_char"
dataset = "shakespeare_char"  # python data/shakespeare_char/prepare.py

# The model: nanoGPT's shape
n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.2  # without it, 11 million weights would memorize the 1 MB of text

# 64 x 256 = 16,384 tokens per step, as in nanoGPT; Muon needs a fraction of nanoGPT's 5,000 steps
batch_size = 64
max_iters = 1000
learning_rate = 5e-3
lr_schedule = "wsd"
decay_fraction = 0.6
weight_decay = 0.1  # against overfitting, like dropout
eval_interval = 100
always_save_checkpoint = False  # the model overfits in the end: keep the best checkpoint only
