"""Tiny Shakespeare, character by character, on a CPU: nanoGPT's CPU shape (4 layers, 128 wide, context 64).

About two minutes on 2 cores. For less time ask for fewer steps: --max_iters=200 is already past nanoGPT's final loss.
"""

out_dir = "out/shakespeare_char_cpu"
dataset = "shakespeare_char"  # python data/shakespeare_char/prepare.py

# The model: nanoGPT's shape, and no more weights than it has
n_layer = 4
n_head = 4
n_embd = 128
mlp_dim = 336  # 8/3 of n_embd, rounded down to stay below nanoGPT's count
block_size = 64
tie_embeddings = False  # 65 characters: a head of its own costs next to nothing
dropout = 0.0  # two passes over the text leave little to overfit

# The run
batch_size = 16
max_iters = 2000
learning_rate = 1e-2
lr_schedule = "wsd"
decay_fraction = 0.6
eval_interval = 250
