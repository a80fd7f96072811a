"""The demo: English and signatures from Python's own documentation, 2 minutes on 2 cores.

python data/pydocs/prepare.py makes the corpus from the installed Python, without a download, and learns a vocabulary of
1,024 tokens from it.
"""

out_dir = "out/pydocs"
dataset = "pydocs"

# A small model with a context of one paragraph: on a CPU, more tokens help more than more weights
n_layer = 4
n_head = 4
n_embd = 128
block_size = 128  # tokens of 2.6 bytes on average
rope_theta = 100.0  # wavelengths up to 600 tokens are enough for a context of 128
tie_embeddings = False  # with 1,024 tokens a separate head costs little, and it learns faster
dropout = 0.0  # two passes over the text leave little to overfit

batch_size = 8
max_iters = 1400
learning_rate = 1e-2
lr_schedule = "wsd"  # warm up, stay constant, then decay linearly to 0
decay_fraction = 0.6
muon_momentum = 0.9
beta1 = 0.8

eval_interval = 350  # steps; each evaluation uses the whole validation split
sample_interval = 350  # steps; print a sample
