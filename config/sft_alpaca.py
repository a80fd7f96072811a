"""Fine-tune a base model with a context of 512 or more on Stanford Alpaca's 52,000 instructions, on a GPU.

python data/alpaca/prepare.py
python finetune.py config/sft_alpaca.py --init_from=out/gpt2_124m
"""

init_from = "out/gpt2_124m"
out_dir = "out/sft_alpaca"
dataset = "alpaca"

batch_size = 16  # rows of block_size tokens, several conversations each
gradient_accumulation_steps = 4
max_iters = 300  # about three passes with a context of 1,024
optimizer = "adamw"
learning_rate = 5e-5
lr_schedule = "cosine"
warmup_iters = 15
weight_decay = 0.0
dropout = 0.1

eval_interval = 50
sample_interval = 50
always_save_checkpoint = False  # three passes overfit: keep the checkpoint with the best validation loss
