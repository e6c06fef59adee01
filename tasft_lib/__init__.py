"""tasft_lib: toxicity-avoiding supervised fine-tuning (TA-SFT) on top of TRL, and SAFT's filter of harmful rows."""

import logging

# PEFT imports bitsandbytes, which warns about an optional CPU kernel even where nothing is quantised.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__all__ = ["SAFTFilter", "SAFTFitter", "TASFTConfig", "TASFTTrainer"]


def __getattr__(name: str):
    # On first use: TRL takes seconds to import, and `losses` or `tasft --help` do not need it.
    if name in ("TASFTConfig", "TASFTTrainer"):
        from . import trainer  # which has both names

        return getattr(trainer, name)
    if name in ("SAFTFilter", "SAFTFitter"):
        from .saft import filter as filter_module

        return getattr(filter_module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
