"""A model of 1.1 billion weights in Llama 3.2's shape, with a context of 2,048, on one node of 8 GPUs with 80 GB.

python data/fineweb_edu/prepare.py
torchrun --nproc_per_node=8 train.py config/llama_1b.py

The parts are Llama's: RoPE, RMSNorm, SwiGLU, grouped queries, no biases. It has not been trained to its end yet. This
is what is known before, from python train.py config/llama_1b.py --plan:

    model            1,076,168,704 weights: 16 layers, 2048 wide, context 2,048, vocabulary 50,304
    step             1,048,576 tokens: batch_size 8 in 64 micro-steps, over all processes
    run              9,537 steps, 10,000,269,312 tokens
    compute          7.26e+19 FLOPs
    checkpoint       8.40 GiB; a run keeps up to 3

    memory of one process in bfloat16, with float32 weights, not compiled; not all parts are there at once:
      weights            4.01 GiB  in float32
      gradients          4.01 GiB
      optimizer state    4.39 GiB  muon
      activations       28.10 GiB  of 8 x 2,048 tokens
      logits             2.08 GiB  output head and cross-entropy
      peak              42.59 GiB  in the backward pass

    time at 40% MFU without evaluations, and the largest batch_size that fits:
      GPU         memory  batch_size   GPU-hours  hours on 8
      B200        180 GB          43        22.4         2.8
      H100         80 GB          16        51.0         6.4
      A100         80 GB          16       161.6        20.2
"""

out_dir = "out/llama_1b"
dataset = "fineweb_edu"

# The shape of Llama 3.2 1B, with GPT-2's vocabulary instead of its own 128,256 tokens
n_layer = 16
n_head = 32
n_kv_head = 8  # four queries share a key and a value: the KV cache is a quarter as large
n_embd = 2048
mlp_dim = 8192
block_size = 2048
vocab_size = 50304  # GPT-2's 50257, rounded up to a multiple of 128: faster matrix products
norm_eps = 1e-5
qk_norm = False  # Llama has none
tie_embeddings = True

# 1M tokens per step: 8 x 2048 on each of 8 GPUs, eight times
batch_size = 8
gradient_accumulation_steps = 8 * 8
max_iters = 9_537  # x 1,048,576 tokens = 10 billion: FineWeb-Edu's sample once. 20 per weight would be twice as many

learning_rate = 1.5e-3  # with Muon, for a width of 2,048; not tuned
lr_schedule = "wsd"
warmup_iters = 500
decay_fraction = 0.4
weight_decay = 0.1
grad_clip = 1.0

eval_interval = 500
eval_iters = 320  # x 8 x 2048 = 5 million tokens
log_interval = 10
