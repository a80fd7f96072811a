"""Fine-tuning on your own conversations, from any run of train.py or finetune.py: three passes, whatever their number.

python data/chat/prepare.py --input mine.jsonl --output data/mine
python finetune.py --dataset=mine --init_from=out/x --out_dir=out/mine
"""

init_from = "out/pydocs"
out_dir = "out/sft"
dataset = "mine"

batch_size = 8  # rows of block_size tokens, several conversations each
num_epochs = 3
optimizer = "muon"
learning_rate = 1e-3
lr_schedule = "wsd"
decay_fraction = 0.8
warmup_iters = 5

sample_interval = 1  # after each pass
