"""TA-SFT steps on each of two gloo processes; rank 0 writes gradients and logs. Run by test_distributed.py.

torchrun --nproc_per_node=2 distributed_step.py FOLDER ddp fsdp2 | zero3
"""

import copy
import gc
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).with_name("core")))

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from conftest import make_rows
from peft import LoraConfig, get_peft_model
from test_distributed import cases
from test_trainer import LORA, config
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasft_lib import TASFTTrainer


def allow_fsdp_on_cpu() -> None:
    """accelerate turns FSDP on for GPUs only; everything after that switch works on gloo as well."""
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def allow_deepspeed_on_cpu() -> None:
    """accelerate knows no backend for DeepSpeed on a CPU; gloo is one."""
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)


STRATEGIES = {
    "ddp": {},
    "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}},
    "zero3": {
        "use_cpu": False,
        "deepspeed": {
            # Without the threshold a model as small as this one would not be sharded.
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
        },
    },
}


def whole(parameter: torch.Tensor) -> torch.Tensor:
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameter):
            return parameter.detach().clone()
    parameter = parameter.detach()
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).clone()


def gradient(folder: Path, tokenizer, case: dict, strategy: str):
    """(log, gradient by parameter name) of one step, as `test_trainer.gradient_step` gives them."""
    options = dict(case)
    rows = make_rows(8, unsafe_every=options.pop("unsafe_every", 3))
    lora = options.pop("lora", False)
    wrap = options.pop("wrap", ["LlamaDecoderLayer"])
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    if lora:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(**LORA, init_lora_weights=False))
    before = {n: whole(p) for n, p in model.named_parameters() if p.requires_grad}
    options |= copy.deepcopy(STRATEGIES[strategy])
    if strategy == "fsdp2":
        options["fsdp_config"]["transformer_layer_cls_to_wrap"] = wrap
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2} | options
    args = config(folder, train_sampling_strategy="sequential", **options)
    trainer = TASFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    assert len(trainer.train_dataset) % 4 == 0, "accelerate would repeat rows to give all processes as many"
    trainer.train()
    after = {n.removeprefix("module."): whole(p) for n, p in trainer.model.named_parameters() if p.requires_grad}
    mark = {"fsdp2": "full_tensor", "zero3": "ds_id"}.get(strategy)
    assert mark is None or all(hasattr(p, mark) for p in trainer.model.parameters()), "the strategy was not applied"
    return trainer.state.log_history[0], {name: before[name] - after[name] for name in before}


if __name__ == "__main__":
    gc.freeze()  # as in conftest.py
    folder = Path(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    for strategy in sys.argv[2:]:
        {"ddp": lambda: None, "fsdp2": allow_fsdp_on_cpu, "zero3": allow_deepspeed_on_cpu}[strategy]()
        results = {name: gradient(folder, tokenizer, case, strategy) for name, case in cases(strategy).items()}
        if torch.distributed.get_rank() == 0:
            torch.save({name: gradients for name, (_, gradients) in results.items()}, folder / f"{strategy}.pt")
            (folder / f"{strategy}.json").write_text(json.dumps({name: log for name, (log, _) in results.items()}))
    torch.distributed.destroy_process_group()
