"""Baichuan 2 13B as its report describes it [arXiv 2309.10305]: as config/baichuan2_7b.py, but deeper, wider, ALiBi.

python data/text/prepare.py --input FILES --output data/baichuan2 --tokenizer FOLDER_OF_AN_IMPORTED_BAICHUAN_2
torchrun --nnodes=128 --nproc_per_node=8 train.py config/baichuan2_13b.py

It writes down what was trained, as the 7B's does. From python train.py config/baichuan2_13b.py --plan:

    model            13,896,668,160 weights: 40 layers, 5120 wide, context 4,096, vocabulary 125,696
    step             4,194,304 tokens: batch_size 1 in 1024 micro-steps, over all processes
    run              619,888 steps, 2,599,998,717,952 tokens
    compute          2.33e+23 FLOPs
    checkpoint       155.31 GiB; a run keeps up to 3

    memory of one process in bfloat16, with float32 weights, not compiled; not all parts are there at once:
      weights           51.77 GiB  in float32
      gradients         51.77 GiB
      optimizer state  103.54 GiB  adamw
      activations       56.01 GiB  of 1 x 4,096 tokens
      logits            11.95 GiB  output head and cross-entropy
      peak             275.04 GiB  in the backward pass

    time at 40% MFU without evaluations, and the largest batch_size that fits:
      GPU         memory  batch_size   GPU-hours  hours on 8
      B200        180 GB        none    71,887.1     8,985.9
      H100         80 GB        none   163,545.0    20,443.1
      A100         80 GB        none   518,416.8    64,802.1
"""

out_dir = "out/baichuan2_13b"
dataset = "baichuan2"

# The shape of Baichuan 2 13B
n_layer = 40
n_head = 40
n_embd = 5120
mlp_dim = 13696  # 8/3 n_embd, rounded up to a multiple of 128
block_size = 4096
vocab_size = 125_696
position = "alibi"
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
learning_rate = 1.5e-4
min_lr = 1.5e-5  # a tenth
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
