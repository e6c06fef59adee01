"""A notebook's parameters: declared in its `parameters` cell, overridden by papermill, checked before anything runs.

papermill only warns about an unknown name, so a typo would silently run the default; and YAML reads `2e-4` as text.
"""

from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

import yaml

_SCALARS = (str, int, float, bool)


def resolve(namespace: dict[str, Any]) -> Any:
    """A frozen dataclass of the parameters declared (`name: type = value`) in the notebook whose `globals()` this is.

    Values are brought to their declared type ("2e-4" to float, 3 to float, "true" to bool). Prints the result.

    Raises:
        ValueError: a value that is not of its declared type, or a name that papermill injected but the notebook does
            not declare; one line.
    """
    declared = namespace.get("__annotations__", {})
    known = set(declared) | {"In", "Out"}
    # Later, in JupyterLab, the notebook's own variables are there too; papermill injects before the first call only.
    first_call = not namespace.get("_parameters_resolved")
    namespace["_parameters_resolved"] = True
    for name, value in list(namespace.items()) if first_call else ():
        if name not in known and not name.startswith("_") and isinstance(value, (*_SCALARS, list, dict, type(None))):
            raise ValueError(f"parameter {name!r} is not declared in this notebook; it has {', '.join(declared)}.")
    values = {name: coerce(name, namespace[name], kind) for name, kind in declared.items()}
    for name, value in values.items():
        print(f"{name:<28} {value!r}")
    return make_dataclass("Parameters", list(declared.items()), frozen=True)(**values)


def coerce(name: str, value: Any, kind: type) -> Any:
    """`value` as `kind` (str, int, float or bool), or a ValueError that names the parameter."""
    if kind is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    try:
        if kind is float and not isinstance(value, bool):
            return float(value)
        if kind is int and not isinstance(value, bool) and float(value) == int(float(value)):
            return int(float(value))
    except (TypeError, ValueError):
        pass
    if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"parameter {name}={value!r} is not of type {kind.__name__}.")


def declared_in(notebook: Path) -> dict[str, type]:
    """Name -> type of the parameters a notebook declares in the cell tagged `parameters`."""
    import nbformat  # which takes a second, and a running notebook does not need it

    cells = nbformat.read(notebook, as_version=4).cells
    source = next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    return namespace["__annotations__"]


def check_file(path: Path, notebook: Path) -> dict[str, Any]:
    """The parameters of a flat YAML file, checked against the notebook that will get them.

    Raises ValueError naming file and parameter: unknown, of another type, or not flat.
    """
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML ({str(error).splitlines()[0]}); correct it.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds no `name: value` lines.")
    declared = declared_in(notebook)
    for name, value in values.items():
        if name not in declared:
            raise ValueError(f"{path}: {name} is no parameter of {notebook.name}; it has {', '.join(declared)}.")
        try:
            coerce(name, value, declared[name])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return values
