"""A masked model, as BERT: it finds hidden words of Python's own documentation, in some minutes on 2 cores.

python data/pydocs/prepare.py makes the corpus, and python sample.py --out_dir=out/bert_pydocs --fill="Return the
<|mask|> of the string." shows what it has learned.
"""

out_dir = "out/bert_pydocs"
dataset = "pydocs"
objective = "masked"
causal = False  # it looks on both sides of what is hidden

# The shape of config/pydocs.py
n_layer = 4
n_head = 4
n_embd = 128
block_size = 128  # tokens of 2.6 bytes on average
rope_theta = 100.0
tie_embeddings = False
dropout = 0.0

# A step learns from 15% of its tokens only, so it takes more of them: here 6.6 passes over the text
batch_size = 16
max_iters = 2000
learning_rate = 1e-2
lr_schedule = "wsd"  # warm up, stay constant, then decay linearly to 0
decay_fraction = 0.6
muon_momentum = 0.9
beta1 = 0.8

eval_interval = 500
sample_interval = 500
