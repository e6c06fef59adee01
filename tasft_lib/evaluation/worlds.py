"""The worlds a model can be evaluated in: the published files, or the mini-world."""

from .. import miniworld

# Base models that are made here.
MINIWORLDS = {"miniworld": miniworld.MINI, "miniworld-smoke": miniworld.SMOKE}


def base_model(name: str) -> str:
    """A local folder or hub id as it is; one of `MINIWORLDS` is built, or found in the cache."""
    return str(miniworld.build_base_model(MINIWORLDS[name])) if name in MINIWORLDS else name
