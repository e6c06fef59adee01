"""A judge by its name."""

from pathlib import Path

from .base import Judge
from .compliance import ComplianceJudge, XSTestJudge

# What `load_judge` takes. MODEL is a folder of a checkpoint, or a hub id and its commit: owner/name@<40 hex digits>.
JUDGES = (
    "miniworld",
    "compliance",
    "xstest",
    "openai-moderation",
    "harmfulness:MODEL",
    "qwen3guard:MODEL",
    "wildguard:MODEL",
    "llamaguard:MODEL",
    "harmbench:MODEL",
)


def load_judge(name: str) -> Judge:
    """The judge of that name, for example "compliance" or "qwen3guard:Qwen/Qwen3Guard-Gen-0.6B@<commit>"; see `JUDGES`.

    Models are loaded when first asked. Raises ValueError listing the names for any other, and for a model that is no
    folder and has no commit.
    """
    kind, _, source = name.partition(":")
    # A folder's own name may hold an @.
    model, _, commit = (source, "", "") if Path(source).expanduser().is_dir() else source.partition("@")
    match kind, bool(source):
        case "miniworld", False:
            from .miniworld import MiniWorldJudge

            return MiniWorldJudge()
        case "compliance", False:
            return ComplianceJudge()
        case "xstest", False:
            return XSTestJudge()
        case "openai-moderation", False:
            from .moderation import OpenAIModeration

            return OpenAIModeration()
        case "harmfulness", True:
            from .guards import HarmfulnessRegressor

            return HarmfulnessRegressor(model, commit or None)
        case "qwen3guard", True:
            from .guards import Qwen3Guard

            return Qwen3Guard(model, commit or None)
        case "wildguard", True:
            from .guards import WildGuard

            return WildGuard(model, commit or None)
        case "llamaguard", True:
            from .guards import LlamaGuard

            return LlamaGuard(model, commit or None)
        case "harmbench", True:
            from .guards import HarmBenchClassifier

            return HarmBenchClassifier(model, commit or None)
    raise ValueError(f"unknown judge {name!r}: choose one of {', '.join(JUDGES)}")
