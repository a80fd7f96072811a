"""The demo's second half: its model learns to answer questions about Python's library, a minute or two on 2 cores.

python data/pydocs_sft/prepare.py makes the conversations from the Python that runs it; nothing is downloaded.
"""

init_from = "out/pydocs"
out_dir = "out/sft_pydocs"
dataset = "pydocs_sft"

# A small model at a high learning rate: it has to learn a new form, and has little to forget
batch_size = 16  # rows of 128 tokens, two or three conversations each
max_iters = 500
optimizer = "muon"
learning_rate = 3e-3
lr_schedule = "wsd"
decay_fraction = 0.8
muon_momentum = 0.9

eval_interval = 250
sample_interval = 250
