"""The demo: English and signatures from Python's own documentation, 2 minutes on 2 cores.

python data/pydocs/prepare.py makes the corpus from the Python that runs it, and learns a vocabulary of 1,024 tokens
from it; nothing is downloaded.
"""

out_dir = "out/pydocs"
dataset = "pydocs"

# A small model with a context of a paragraph: on a CPU, seeing more text beats having more weights
n_layer = 4
n_head = 4
n_embd = 128
block_size = 128  # tokens of 2.6 bytes on average
rope_theta = 100.0  # wavelengths up to 600 tokens are enough for a context of 128
tie_embeddings = False  # 1,024 tokens: a head of its own costs little, and learns faster
dropout = 0.0  # two passes over the text leave little to overfit

batch_size = 8
max_iters = 1400
learning_rate = 1e-2
lr_schedule = "wsd"  # warm up, stay, then fall in a straight line to 0
decay_fraction = 0.6
muon_momentum = 0.9
beta1 = 0.8

eval_interval = 350  # the whole validation split each time
sample_interval = 350  # and a sample, to watch it learn to write
