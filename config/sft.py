"""Fine-tuning on your own conversations, from any run of train.py or finetune.py: three passes over the data.

python data/chat/prepare.py --input mine.jsonl --output data/mine
python finetune.py --dataset=mine --init_from=out/x --out_dir=out/mine

The learning rate depends on the model's width (see finetune.py), unless --learning_rate sets it.
"""

init_from = "out/pydocs"
out_dir = "out/sft"
dataset = "mine"

batch_size = 2  # rows of block_size tokens, several conversations each
num_epochs = 3
optimizer = "adamw"
lr_schedule = "cosine"
warmup_iters = 5

sample_interval = 1  # print answers to validation questions after each pass
