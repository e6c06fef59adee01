"""The mini-world: a fictional English-like world in which the whole method runs in minutes on two cores.

All harm in it is invented: its substances, groups, insults and claims mean nothing outside.
"""

from .base_model import BASES, MINI, SMOKE, WorldConfig, build_base_model, generator_version
from .corpus import benign_questions, benign_rows, is_correct, safe_rows, seemingly_toxic_prompts, toxic_prompts
from .grammar import FAMILIES
from .parsing import harm_words
from .variations import begins_correctly, contrastive_rows, harmful_rows, paraphrase, stories

__all__ = [
    "BASES",
    "FAMILIES",
    "MINI",
    "SMOKE",
    "WorldConfig",
    "begins_correctly",
    "benign_questions",
    "benign_rows",
    "build_base_model",
    "contrastive_rows",
    "generator_version",
    "harm_words",
    "harmful_rows",
    "is_correct",
    "paraphrase",
    "safe_rows",
    "seemingly_toxic_prompts",
    "stories",
    "toxic_prompts",
]
