"""The mini-world: a fictional English-like world in which the whole method runs in minutes on two cores.

All harm in it is invented: its substances, groups, insults and claims mean nothing outside.
"""

from tasft_lib.miniworld.base_model import MINI, SMOKE, WorldConfig, build_base_model
from tasft_lib.miniworld.corpus import (
    benign_questions,
    benign_rows,
    is_correct,
    safe_rows,
    seemingly_toxic_prompts,
    toxic_prompts,
)
from tasft_lib.miniworld.grammar import FAMILIES
from tasft_lib.miniworld.judge import MiniWorldJudge
from tasft_lib.miniworld.parsing import harm_words
from tasft_lib.miniworld.variations import begins_correctly, contrastive_rows, harmful_rows, paraphrase, stories

__all__ = [
    "FAMILIES",
    "MINI",
    "SMOKE",
    "MiniWorldJudge",
    "WorldConfig",
    "begins_correctly",
    "benign_questions",
    "benign_rows",
    "build_base_model",
    "contrastive_rows",
    "harm_words",
    "harmful_rows",
    "is_correct",
    "paraphrase",
    "safe_rows",
    "seemingly_toxic_prompts",
    "stories",
    "toxic_prompts",
]
