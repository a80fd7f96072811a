"""Translate dates from English to Chinese with an encoder–decoder, 2 minutes on 2 cores.

python data/dates/prepare.py makes the pairs by rule from the calendar, without a download. Its characters are tokens.
"""

objective = "translate"
out_dir = "out/dates"
dataset = "dates"

n_encoder_layer = 2
n_layer = 2
n_head = 4
n_embd = 96
block_size = 80  # tokens of a source, and of a target
dropout = 0.0
label_smoothing = 0.1  # [Vaswani et al. 2017, section 5.4]

batch_size = 32
max_iters = 1500
learning_rate = 5e-3
lr_schedule = "wsd"
decay_fraction = 0.6

eval_interval = 500
eval_iters = 20
sample_interval = 500
