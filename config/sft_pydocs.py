"""The demo's second part: fine-tune its model on questions about Python's library, a minute or two on 2 cores.

python data/pydocs_sft/prepare.py makes the conversations from the installed Python, without a download.
"""

init_from = "out/pydocs"
out_dir = "out/sft_pydocs"
dataset = "pydocs_sft"

# A high learning rate: a small model must learn a new format, and has little to forget
batch_size = 16  # rows of 128 tokens, two or three conversations each
max_iters = 500
optimizer = "muon"
learning_rate = 3e-3
lr_schedule = "wsd"
decay_fraction = 0.8
muon_momentum = 0.9

eval_interval = 250
sample_interval = 250
