"""tasft_lib: toxicity-avoiding supervised fine-tuning (TA-SFT) on top of TRL."""

from .trainer import TASFTConfig, TASFTTrainer

__all__ = ["TASFTConfig", "TASFTTrainer"]
