"""Baichuan 2 7B as its report describes it [arXiv 2309.10305]: the shape, the losses, the optimizer; RoPE.

python data/text/prepare.py --input FILES --output data/baichuan2 --tokenizer FOLDER_OF_AN_IMPORTED_BAICHUAN_2
torchrun --nnodes=128 --nproc_per_node=8 train.py config/baichuan2_7b.py

This writes down what was trained, section by section in docs/baichuan2.md; weights of the authors come in by
formats/baichuan2.py. Nobody trains it from here: every process holds all weights and their optimizer's state, more than
most GPUs do, and the authors' 2.6 trillion tokens are not public. From python train.py config/baichuan2_7b.py --plan:

    model            7,505,973,248 weights: 32 layers, 4096 wide, context 4,096, vocabulary 125,696
    step             4,194,304 tokens: batch_size 1 in 1024 micro-steps, over all processes
    run              619,888 steps, 2,599,998,717,952 tokens
    compute          1.26e+23 FLOPs
    checkpoint       83.89 GiB; a run keeps up to 3

    memory of one process in bfloat16, with float32 weights, not compiled; not all parts are there at once:
      weights           27.97 GiB  in float32
      gradients         27.96 GiB
      optimizer state   55.92 GiB  adamw
      activations       34.96 GiB  of 1 x 4,096 tokens
      logits             9.56 GiB  output head and cross-entropy
      peak             156.37 GiB  in the backward pass

    time at 40% MFU without evaluations, and the largest batch_size that fits:
      GPU         memory  batch_size   GPU-hours  hours on 8
      B200        180 GB           1    38,829.5     4,853.7
      H100         80 GB        none    88,338.2    11,042.3
      A100         80 GB        none   280,020.6    35,002.6
"""

out_dir = "out/baichuan2_7b"
dataset = "baichuan2"

# The shape of Baichuan 2 7B
n_layer = 32
n_head = 32
n_embd = 4096
mlp_dim = 11008  # 8/3 n_embd, rounded up to a multiple of 128
block_size = 4096
vocab_size = 125_696
position = "rope"
norm_eps = 1e-6
qk_norm = False
tie_embeddings = False
norm_head = True
max_z_loss = 2e-4

# 4M tokens per step, which the report does not state: 1 x 4096 on each of 1,024 GPUs, the number that it had
batch_size = 1
gradient_accumulation_steps = 1024
max_iters = 619_888  # x 4,194,304 tokens = 2.6 trillion

# Section 2.5 of the report, but for min_lr, which it does not state
optimizer = "adamw"
learning_rate = 2e-4
min_lr = 2e-5  # a tenth
lr_schedule = "cosine"
warmup_iters = 2000
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.1
grad_clip = 0.5
dtype = "bfloat16"

eval_interval = 1000  # the authors kept a checkpoint every 1,000 steps for their study of the training
eval_iters = 1024  # x 1 x 4096 = 4 million tokens
log_interval = 10
