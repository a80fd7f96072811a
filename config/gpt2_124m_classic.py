"""GPT-2's architecture and AdamW, the baseline for config/gpt2_124m.py: same data, same tokens per step.

torchrun --nproc_per_node=8 train.py config/gpt2_124m_classic.py
"""

out_dir = "out/gpt2_124m_classic"
dataset = "fineweb_edu"

# Radford et al. 2019: the shapes of GPT2LMHeadModel in transformers
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
vocab_size = 50304  # 50257, rounded up to a multiple of 128 for faster matrix products
position = "learned"
norm = "layernorm"
norm_eps = 1e-5
qk_norm = False
mlp = "gelu"
bias = True
tie_embeddings = True
dropout = 0.0  # one pass over the data does not overfit

batch_size = 32
gradient_accumulation_steps = 8 * 2  # 32 x 1024 x 16 = 0.5M tokens per step
max_iters = 19_073  # 10 billion tokens

optimizer = "adamw"
learning_rate = 6e-4  # GPT-3's for this size
min_lr = 6e-5  # a tenth of it
lr_schedule = "cosine"
warmup_iters = 700
weight_decay = 0.1

eval_interval = 500
eval_iters = 160
log_interval = 10
