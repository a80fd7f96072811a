"""Fine-tuning on your own conversations, from any run of train.py or finetune.py: three passes, whatever their number.

python data/chat/prepare.py --input mine.jsonl --output data/mine
python finetune.py --dataset=mine --init_from=out/x --out_dir=out/mine

The learning rate follows the model's width (see finetune.py), unless you say another one by --learning_rate.
"""

init_from = "out/pydocs"
out_dir = "out/sft"
dataset = "mine"

batch_size = 2  # rows of block_size tokens, several conversations each: a hundred of them make some 50 steps
num_epochs = 3
optimizer = "adamw"
lr_schedule = "cosine"
warmup_iters = 5

sample_interval = 1  # answer held-out questions after each pass
