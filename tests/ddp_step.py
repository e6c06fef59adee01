"""One TA-SFT step on each of two gloo processes; rank 0 writes gradient and log. Run by test_trainer.py."""

import json
import sys
from pathlib import Path

import torch
from conftest import make_rows
from test_trainer import config, gradient_step
from transformers import AutoModelForCausalLM, AutoTokenizer

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    gradients = {}
    for penalty in ("emd", "nlcl"):
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        args = config(
            folder,
            penalty=penalty,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            train_sampling_strategy="sequential",
        )
        log, gradients[penalty] = gradient_step(model, args, make_rows(8), tokenizer)
        if torch.distributed.get_rank() == 0:
            (folder / f"log_{penalty}.json").write_text(json.dumps(log))
    if torch.distributed.get_rank() == 0:
        torch.save(
            {p: {n.removeprefix("module."): g for n, g in gs.items()} for p, gs in gradients.items()},
            folder / "gradient.pt",
        )
    torch.distributed.destroy_process_group()
