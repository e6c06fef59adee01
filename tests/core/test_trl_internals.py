"""What `trainer.py` and `forward.py` build on in TRL and transformers, by the source it was written against.

Fails when one of these changes, even where every other test still passes. Then read the new source beside them,
adapt them, and only after that put the new hash here, the new version into constraints.txt and `trainer.TESTED_TRL`.
"""

import hashlib
import inspect

import pytest
from transformers import Trainer
from trl import SFTTrainer, pack_dataset
from trl.trainer import utils
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

BUILT_ON = {
    "SFTTrainer.compute_loss": (SFTTrainer.compute_loss, "the benign loss from `log_probs`, and the metrics"),
    "SFTTrainer._prepare_dataset": (SFTTrainer._prepare_dataset, "tokenisation and truncation, packing left to us"),
    "SFTTrainer._set_signature_columns_if_needed": (SFTTrainer._set_signature_columns_if_needed, "columns to keep"),
    "SFTTrainer.log": (SFTTrainer.log, "our metrics are added before it"),
    "DataCollatorForLanguageModeling.torch_call": (DataCollatorForLanguageModeling.torch_call, "the layout of a batch"),
    "add_fused_lm_head": (utils.add_fused_lm_head, "the forward that ours stands in for"),
    "maybe_gather_lm_head_ctx": (utils.maybe_gather_lm_head_ctx, "whole heads under ZeRO-3"),
    "pack_dataset": (pack_dataset, "packing of token columns"),
    "Trainer.get_batch_samples": (Trainer.get_batch_samples, "where the denominators are counted"),
    "Trainer.training_step": (Trainer.training_step, "scaling by accumulation steps"),
    "Trainer._get_grad_norm": (Trainer._get_grad_norm, "a gradient that is not finite stops before it is taken"),
}
WRITTEN_AGAINST = {  # TRL 1.16.0, transformers 5.23.0; where TRL 1.15 has another source, that too
    "SFTTrainer.compute_loss": "ca448211ff653fe6",
    "SFTTrainer._prepare_dataset": "04b668d28493f693",
    "SFTTrainer._set_signature_columns_if_needed": "aaa1b89b48a68db6",
    "SFTTrainer.log": "0d4c8e5d64f894ac",
    "DataCollatorForLanguageModeling.torch_call": ("e9f4cd36d5ba7c3c", "5ed96ab06b4b6070"),
    "add_fused_lm_head": ("422d009f04b66659", "2722842b5d139e76"),
    "maybe_gather_lm_head_ctx": "d4d59d01150623ce",
    "pack_dataset": "9b34aacf605efa8e",
    "Trainer.get_batch_samples": "0b3727386f73f670",
    "Trainer.training_step": "e9760c8ee10308d5",
    "Trainer._get_grad_norm": "913ba6f52f074d10",
}


@pytest.mark.parametrize("name", BUILT_ON)
def test_the_source_is_the_one_trainer_py_was_written_against(name):
    function, use = BUILT_ON[name]
    current = hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]
    assert current in WRITTEN_AGAINST[name], f"{name} ({use}) changed; see the head of this file. New hash: {current}"
