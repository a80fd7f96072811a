"""The model and the steps of config/gpt2_124m.py on one GPU with 24 GB, such as an RTX 4090: a day and a half or more.

python data/fineweb_edu/prepare.py
python train.py config/gpt2_124m_24gb.py

The step has the same 0.5M tokens, in micro-steps that fit, and so the same result, but for rounding. It has not been
trained to its end yet. This is what is known before, from python train.py config/gpt2_124m_24gb.py --plan:

    model            123,588,864 weights: 12 layers, 768 wide, context 1,024, vocabulary 50,304
    step             524,288 tokens: batch_size 16 in 32 micro-steps, over all processes
    run              19,073 steps, 9,999,745,024 tokens
    compute          8.55e+18 FLOPs
    checkpoint       1.06 GiB; a run keeps up to 3

    memory of one process in bfloat16, with float32 weights, not compiled; not all parts are there at once:
      weights            0.46 GiB  in float32
      gradients          0.46 GiB
      optimizer state    0.60 GiB  muon
      activations        7.80 GiB  of 16 x 1,024 tokens
      logits             1.72 GiB  output head and cross-entropy
      peak              11.04 GiB  in the backward pass

    time at 40% MFU without evaluations, and the largest batch_size that fits:
      GPU         memory  batch_size   GPU-hours  hours on 8
      L4           24 GB          37        49.0         6.1
      RTX 4090     24 GB          37        36.0         4.5
      RTX 3090     24 GB          37        83.6        10.4
"""

out_dir = "out/gpt2_124m_24gb"
dataset = "fineweb_edu"

# The model, as in config/gpt2_124m.py
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
vocab_size = 50304  # GPT-2's 50257, rounded up to a multiple of 128: faster matrix products
tie_embeddings = True

batch_size = 16
gradient_accumulation_steps = 32  # x 16 x 1024 = 0.5M tokens per step
max_iters = 19_073  # x 524,288 tokens = 10 billion; a tenth of them already give a model that writes English

learning_rate = 3e-3
lr_schedule = "wsd"
warmup_iters = 250
decay_fraction = 0.4
weight_decay = 0.1
grad_clip = 1.0

eval_interval = 500
eval_iters = 320  # x 16 x 1024 = 5 million tokens
log_interval = 10
