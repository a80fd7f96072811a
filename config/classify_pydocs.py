"""A classifier on top of the masked model: is a docstring a module's, a class's or a function's? A minute on 2 cores.

python data/pydocs_kinds/prepare.py makes the data; config/bert_pydocs.py trains the model that it begins with, in whose
place any other can stand, by --init_from. python sample.py --out_dir=out/classify_pydocs --classify="..." asks it.
"""

init_from = "out/bert_pydocs"
out_dir = "out/classify_pydocs"
dataset = "pydocs_kinds"
objective = "classify"
pool = "mean"  # of the hidden states of all tokens of a text

batch_size = 32  # texts
max_iters = 420  # three passes
learning_rate = 2e-3
lr_schedule = "wsd"
decay_fraction = 0.8
muon_momentum = 0.9

eval_interval = 140
sample_interval = 420
