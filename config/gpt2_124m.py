"""A modern 124M model on 10 billion tokens of FineWeb-Edu, on one node of 8 GPUs.

python data/fineweb_edu/prepare.py
torchrun --nproc_per_node=8 train.py config/gpt2_124m.py

It has not been trained to its end yet. This is what is known before, from python train.py config/gpt2_124m.py --plan:

    model            123,588,864 weights: 12 layers, 768 wide, context 1,024, vocabulary 50,304
    step             524,288 tokens: batch_size 32 in 16 micro-steps, over all processes
    run              19,073 steps, 9,999,745,024 tokens
    compute          8.55e+18 FLOPs
    checkpoint       1.06 GiB; a run keeps up to 3

    memory of one process in bfloat16, with float32 weights, not compiled; not all parts are there at once:
      weights            0.46 GiB  in float32
      gradients          0.46 GiB
      optimizer state    0.60 GiB  muon
      activations       15.44 GiB  of 32 x 1,024 tokens
      logits             1.72 GiB  output head and cross-entropy
      peak              18.68 GiB  in the backward pass

    time at 40% MFU without evaluations, and the largest batch_size that fits:
      GPU         memory  batch_size   GPU-hours  hours on 8
      H100         80 GB         141         6.0         0.8
      A100         80 GB         141        19.0         2.4
"""

out_dir = "out/gpt2_124m"
dataset = "fineweb_edu"

# GPT-2's size with the default architecture: RoPE, RMSNorm, QK-norm, SwiGLU, no biases
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
vocab_size = 50304  # GPT-2's 50257, rounded up to a multiple of 128 for faster matrix products
tie_embeddings = True  # a separate head would add 39 million weights

# 0.5M tokens per step, as in GPT-3 for this size: 2 micro-batches of 32 x 1024 on each of 8 GPUs
batch_size = 32
gradient_accumulation_steps = 8 * 2
max_iters = 19_073  # x 524,288 tokens = 10 billion

learning_rate = 3e-3  # for Muon; AdamW alone would need 6e-4
lr_schedule = "wsd"
warmup_iters = 250
decay_fraction = 0.4
weight_decay = 0.1
grad_clip = 1.0

eval_interval = 500
eval_iters = 160  # x 32 x 1024 = 5 million tokens; 0 would use the whole validation split
log_interval = 10
