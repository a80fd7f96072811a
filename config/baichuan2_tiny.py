"""Baichuan 2's architecture, losses and optimizer, small: about 2 minutes on 2 cores.

python data/pydocs/prepare.py
python train.py config/baichuan2_tiny.py

It learns more slowly than config/pydocs.py, with its QK-norm and Muon, which are younger than Baichuan 2. The 13B's
positions: --position=alibi. See docs/baichuan2.md.
"""

out_dir = "out/baichuan2_tiny"
dataset = "pydocs"

n_layer = 4
n_head = 4
n_embd = 128
mlp_dim = 384  # 8/3 n_embd, rounded up to a multiple of 128
block_size = 128
position = "rope"
norm_eps = 1e-6
qk_norm = False
tie_embeddings = False
norm_head = True
max_z_loss = 2e-4

batch_size = 8
max_iters = 800

# The report's optimizer; a small model wants larger steps, and takes fewer of them to warm up
optimizer = "adamw"
learning_rate = 3e-3
min_lr = 3e-4
lr_schedule = "cosine"
warmup_iters = 40
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.1
grad_clip = 0.5

eval_interval = 400  # steps; each evaluation uses the whole validation split
sample_interval = 400  # steps; print a sample
