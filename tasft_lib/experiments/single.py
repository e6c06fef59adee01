"""One arm by its name, for a shell: what a scheduler can start that knows nothing of tasft.

runs/arms/<arm>/unit.json    the notebook that lists the arm, and its parameters; written by `write_arms`
"""

import os
from typing import Any

from ..storage.files import read_object, runs_folder, write_json
from . import designs, engine, settings


def write_arms(profile: str, notebooks: list[str] | None, overrides: dict[str, Any] | None) -> list[str]:
    """Write `unit.json` for every arm of `reproduce.jobs_of`; the arms' names, each once, plain SFT first."""
    from .reproduce import arms_of, jobs_of

    names = {}
    for job in jobs_of(profile, notebooks, overrides):
        for spec, _ in arms_of(job):
            if spec.name not in names:
                spec.folder.mkdir(parents=True, exist_ok=True)
                write_json(spec.folder / "unit.json", {"notebook": job.name, "parameters": job.parameters})
                names[spec.name] = spec.method
    return sorted(names, key=lambda name: names[name] != "sft")


def run_arm(name: str) -> str:
    """Train the arm, answer the evaluation prompts, judge the answers; what is there is not made again. Its folder.

    Raises `ValueError` where no `unit.json` says what the arm is, or now says another.
    """
    folder = runs_folder() / "arms" / name
    if not (folder / "unit.json").exists():
        raise ValueError(f"{folder}/unit.json: no such file; tasft reproduce --write_arms writes it for every arm.")
    unit = read_object(folder / "unit.json")
    study = designs.study_of(settings.load(unit["notebook"], given=unit["parameters"]))
    specs = {spec.name: spec for spec in getattr(designs, unit["notebook"])(study)}
    if name not in specs:
        raise ValueError(f"{folder}: {unit['notebook']} lists no such arm any more; write the arms again.")
    if engine.name() != "debug":
        os.environ["TASFT_ENGINE"] = "processes"  # one arm is one process, this one
    study.answers([specs[name]])
    return str(folder)
