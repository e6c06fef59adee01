"""A judge by its name."""

import os
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

from .. import base_models
from .base import Judge

# Name -> module and class, imported when asked for: a help text must not load transformers.
# MODEL is a folder of a checkpoint, or a hub id and its commit: owner/name@<40 hex digits>.
_CLASSES = {
    "miniworld": ("miniworld", "MiniWorldJudge"),
    "local": ("local", "LocalJudge"),
    "compliance": ("compliance", "ComplianceJudge"),
    "xstest": ("compliance", "XSTestJudge"),
    "openai-moderation": ("moderation", "OpenAIModeration"),
    "harmfulness:MODEL": ("guards", "HarmfulnessRegressor"),
    "qwen3guard:MODEL": ("guards", "Qwen3Guard"),
    "wildguard:MODEL": ("guards", "WildGuard"),
    "llamaguard:MODEL": ("guards", "LlamaGuard"),
    "harmbench:MODEL": ("guards", "HarmBenchClassifier"),
}
JUDGES = tuple(_CLASSES)
# Of the judge `local`, as `tasft model fetch` calls it.
ENCODER = "minilm-l6"


def encoder_folder() -> Path:
    """`$TASFT_MINILM`, else where `tasft model fetch minilm-l6` lays the encoder of `local`, be it there or not."""
    return Path(os.environ.get("TASFT_MINILM") or base_models.folder_of(ENCODER))


def default_judge() -> str:
    """For answers of real models: "local" where its encoder was fetched, else "compliance"."""
    return "local" if (encoder_folder() / "model.safetensors").is_file() else "compliance"


def load_judge(name: str) -> Judge:
    """The judge of that name, for example "compliance" or "qwen3guard:Qwen/Qwen3Guard-Gen-0.6B@<commit>"; see `JUDGES`.

    Models are loaded when first asked. Raises ValueError listing the names for any other, and for a model that is no
    folder and has no commit.
    """
    kind, _, source = name.partition(":")
    known = f"{kind}:MODEL" if source else kind
    if known not in _CLASSES:
        raise ValueError(f"unknown judge {name!r}: choose one of {', '.join(JUDGES)}")
    module, judge = _CLASSES[known]
    cls = getattr(import_module(f".{module}", __package__), judge)
    if not source:
        return cls()
    # A folder's own name may hold an @.
    model, _, commit = (source, "", "") if Path(source).expanduser().is_dir() else source.partition("@")
    return cls(model, commit or None)


def load_judges(names: Iterable[str]) -> list[Judge]:
    """`load_judge` of each; raises `ValueError` where two have one name, by which their verdicts are told apart."""
    judges = [load_judge(name) for name in names]
    called = [judge.name for judge in judges]
    if twice := next((name for name in called if called.count(name) > 1), None):
        raise ValueError(f"two judges are called {twice}; give one of them, or rename its folder")
    return judges
