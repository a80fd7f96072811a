"""Tiny Shakespeare with a token per character, on a CPU: nanoGPT's CPU shape (4 layers, 128 wide, context 64).

About two minutes on 2 cores. For a shorter run, --max_iters=120 is enough to beat nanoGPT's final loss.
"""

out_dir = "out/shakespeare_char_cpu"
dataset = "shakespeare_char"  # python data/shakespeare_char/prepare.py

# The model: nanoGPT's shape, and no more weights than it has
n_layer = 4
n_head = 4
n_embd = 128
mlp_dim = 336  # 8/3 of n_embd, rounded down to stay below nanoGPT's count
block_size = 64
rope_theta = 100.0  # wavelengths up to 600 tokens are enough for a context of 64
tie_embeddings = False  # with 65 characters a separate head costs almost nothing
dropout = 0.0  # two passes over the text leave little to overfit

# The text is small and the steps are few: a high learning rate, and low decay rates of the gradients' running means
batch_size = 16
max_iters = 2000
learning_rate = 1.5e-2
lr_schedule = "wsd"  # warm up, stay constant, then decay linearly to 0
warmup_iters = 1
decay_fraction = 0.8
muon_momentum = 0.8
beta1 = 0.8
eval_interval = 250
