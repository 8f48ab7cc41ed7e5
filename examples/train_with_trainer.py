"""Adapt a SideNet with ``transformers.Trainer``: texts are read in order, each row with its own memory.

    python examples/train_with_trainer.py BACKBONE TEXTS OUT --steps 1000
    accelerate launch --num_processes 8 examples/train_with_trainer.py BACKBONE TEXTS OUT --steps 1000

BACKBONE is a folder or hub id of any causal language model, TEXTS a folder of .txt files.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, TrainingArguments

from longmem import LongMem
from longmem.training import LongMemTrainer

options = argparse.ArgumentParser()
options.add_argument("backbone")
options.add_argument("texts", type=Path)
options.add_argument("out")
options.add_argument("--steps", type=int, default=1000)
options.add_argument("--window", type=int, default=1024)
options.add_argument("--rows", type=int, default=4)
options.add_argument("--resume", action="store_true")
asked = options.parse_args()

tokenizer = AutoTokenizer.from_pretrained(asked.backbone)
# every document whole: the trainer cuts it into segments and keeps them in order
documents = [
    {"name": path.stem, "input_ids": tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"]}
    for path in sorted(asked.texts.glob("*.txt"))
]
model = LongMem.from_backbone(asked.backbone, side_dtype=torch.float32)
trainer = LongMemTrainer(
    model,
    TrainingArguments(
        asked.out,
        per_device_train_batch_size=asked.rows,
        max_steps=asked.steps,
        learning_rate=2e-4,
        warmup_steps=asked.steps // 50,
        save_steps=max(1, asked.steps // 4),
        logging_steps=10,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
    ),
    train_dataset=documents[1:] or documents,
    eval_dataset=documents[:1],
    window=asked.window,
    processing_class=tokenizer,
)
trainer.train(resume_from_checkpoint=asked.resume)
trainer.save_model(f"{asked.out}/final")
print({name: round(value, 4) for name, value in trainer.evaluate().items() if name == "eval_loss"})
