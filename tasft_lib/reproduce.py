"""Run the notebooks of a profile by papermill, one after another, and print what they found."""

from pathlib import Path
from typing import Any

import pandas as pd
import papermill

from .parameters import check_file, coerce, declared_in
from .runs import keep_freed_memory, project_root, runs_folder


def reproduce(
    profile: str,
    notebooks: list[str] | None = None,
    overrides: dict[str, Any] | None = None,
    *,
    prepare_only: bool = False,
) -> list[Path]:
    """Execute `notebooks/<name>.ipynb` with `params/<profile>/<name>.yaml`; the copies go to `runs/<profile>`.

    All parameter files are checked before the first notebook starts. `overrides` apply to every notebook that declares
    them. With `prepare_only` the parameterised copies are written and nothing is run (for nbval).

    Raises `ValueError` for an unknown profile, notebook or parameter, and papermill's own error when a cell fails.
    """
    root = project_root()
    folder = root / "params" / profile
    sources = {path.stem: path for path in (root / "notebooks").glob("*.ipynb")}
    profiles = {p.parent.name for p in (root / "params").glob("*/*.yaml") if p.stem in sources}
    if profile not in profiles:
        raise ValueError(f"no profile {profile!r}; there are {', '.join(sorted(profiles))}.")
    available = sorted(path.stem for path in folder.glob("*.yaml") if path.stem in sources)
    jobs = []
    for name in notebooks or available:
        if name not in available:
            raise ValueError(f"profile {profile} has no notebook {name!r}; it has {', '.join(available)}.")
        source = sources[name]
        parameters, declared = check_file(folder / f"{name}.yaml", source), declared_in(source)
        chosen = {key: coerce(key, value, declared[key]) for key, value in (overrides or {}).items() if key in declared}
        jobs.append((name, source, parameters | chosen))
    unused = set(overrides or {}) - {key for _, _, parameters in jobs for key in parameters}
    if unused:
        raise ValueError(f"no notebook declares {', '.join(sorted(unused))}.")

    keep_freed_memory()
    outputs = []
    for name, source, parameters in jobs:
        output = runs_folder() / profile / f"{name}.ipynb"
        output.parent.mkdir(parents=True, exist_ok=True)
        print(f"{'preparing' if prepare_only else 'running'} {source.relative_to(root)} ({profile})")
        try:
            papermill.execute_notebook(
                str(source), str(output), parameters, cwd=str(root), kernel_name="python3", prepare_only=prepare_only
            )
        except papermill.PapermillExecutionError as error:
            place = f"{name}, cell [{error.exec_count}]: {error.ename}: {error.evalue}"
            raise ValueError(f"{place} (traceback in {output}; finished arms are kept)") from error
        outputs.append(output)
    if not prepare_only:
        _report(root, profile, [name for name, _, _ in jobs], outputs)
    return outputs


def _report(root: Path, profile: str, names: list[str], outputs: list[Path]) -> None:
    for name, output in zip(names, outputs, strict=True):
        figures = root / "figures" / profile
        table = figures / f"{name}_table.csv"
        print(f"\n{name} ({profile})")
        if table.exists():
            rows = pd.read_csv(table)
            if rows.shape[1] > 12:  # too wide for a terminal: one column per row
                print(rows.set_index(rows.columns[0]).T.to_string(float_format="{:.3f}".format))
            else:
                print(rows.to_string(index=False, float_format="{:.3f}".format))
        for path in [output, *sorted(figures.glob(f"{name}_*"))]:
            print(f"  {path.relative_to(root) if path.is_relative_to(root) else path}")
