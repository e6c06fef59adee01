"""The notebooks' parameters: what they share is declared here once, what one of them varies in its `parameters` cell.

Later wins: the defaults; `params/<profile>/common.yaml`; `params/<profile>/<notebook>.yaml`; plain `name = value`
lines, papermill's or a reader's own. All of them are checked here: papermill only warns about an unknown name, so that
a typo would silently run the default; and YAML reads `2e-4` as text.
"""

import ast
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from ..storage.files import notebooks, project_root


@dataclass(frozen=True)
class Settings:
    """What the notebooks that train have in common, named as in `ArmSpec`, `TASFTConfig` and `peft.LoraConfig`."""

    model: str = "miniworld"  # base model: a folder, a hub id, a GGUF file, or a name of `worlds.base_model`
    model_revision: str = ""  # commit of a hub id
    dtype: str = "float32"
    load_in_4bit: bool = False
    template: str = "short"  # prompt template: alpaca (the paper's), short, none or chat (the base's own)

    benign: str = "miniworld"  # benign rows: Alpaca-format file, hub id, or "miniworld"
    benign_revision: str = ""
    n_benign: int = 1000
    drop_truncated: bool = False  # draw from the benign rows that max_length leaves whole; manifests count the others
    harvest_prompts: str = "miniworld"  # toxic prompts to harvest from: a file, a folder, "stl" or "miniworld"
    n_harvest: int = 240  # unsafe answers wanted
    rounds: int = 4  # times a prompt is asked at most
    unsafe_visits: int = 1  # times an epoch that each unsafe row is seen, and each of STL's safe ones
    n_held_out_unsafe: int = 0  # further ones, on which no arm is trained and likelihoods are measured; 0: none are
    n_held_out_benign: int = 100  # benign rows beside them

    benchmark_prompts: str = "miniworld"  # evaluation prompts: a folder, "stl" or "miniworld"
    judge: str = "miniworld"  # see judges.load
    max_new_tokens: int = 48
    temperature: float = 0.7  # of sampled answers
    generation_batch_size: int = 64
    n_seeds: int = 1  # seeds of data order, unsafe subset, adapter and sampling; of "miniworld" each on its own base
    seed: int = 0  # the first of them

    penalty_weights: str = "figures/search/penalty_weight_chosen.csv"  # λ by method and n_unsafe
    penalty_reduction: str = "batch"
    unsafe_per_batch: int = 0  # unsafe rows in each step of a penalty's training; 0: uniform draws, the paper's
    penalty_embedding: str = "lm_head"  # what EMD measures distance in: also centred, isotropic; see TASFTConfig
    penalty_components: int = 3  # principal components that "isotropic" takes away

    learning_rate: float = 1e-3
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 10
    num_train_epochs: float = 2.0
    train_sampling_strategy: str = "random"  # group_by_length: rows of about one length together, with less padding
    per_device_train_batch_size: int = 24
    gradient_accumulation_steps: int = 1
    max_length: int = 128  # tokens of a training row
    save_steps: int = 20  # a checkpoint, and so a point of every curve, each so many steps
    lora_r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    lora_target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])


SHARED = {f.name: f.type for f in fields(Settings)}
CAN_BE_ZERO = ("seed", "unsafe_per_batch", "warmup_steps", "n_held_out_unsafe")
ABOVE_ZERO = ("learning_rate", "num_train_epochs", "temperature")
DEFAULTS = {f.name: f.default_factory() if f.default is MISSING else f.default for f in fields(Settings)}
# Of these the code is gone: they read what an earlier commit's run left.
STORED = ("beyond_optimizer", "beyond_targets", "beyond_weight")
# What a notebook has no use for. It passes these over in common.yaml, and has none of them itself.
UNTRAINED = ("method", "degenerate_answers", "performance", "performance_filter", *STORED)
HELD_OUT = ("n_held_out_unsafe", "n_held_out_benign")
JUDGED = ("over_alignment", "contrastive_augmentation", "response_quality", "jailbreak", "emd_bound")
JUDGED += ("beyond_sampler", "beyond_recover")
UNUSED = {
    **dict.fromkeys(UNTRAINED, tuple(SHARED)),
    **dict.fromkeys(JUDGED, HELD_OUT),
    **dict.fromkeys(("build_unsafe_set", "your_model"), ("penalty_weights", *HELD_OUT)),
    "trade_off": ("penalty_weights",),
    "beyond_durability": ("penalty_weights", *HELD_OUT),
    "harmful_data_filter": HELD_OUT,
}
KINDS = {str(kind): kind for kind in (list[int], list[float], list[str], list[dict])}
KINDS |= {kind.__name__: kind for kind in (str, int, float, bool)}


def resolve(notebook: str, namespace: dict[str, Any]) -> Any:
    """A frozen dataclass of a notebook's parameters, the shared ones and its own; prints each with where it is from.

    Args:
        notebook: its name without number, "safety".
        namespace: its `globals()`. Cells that hold nothing but assignments of constants are read from its history `In`:
            `name: type = value` declares, `name = value` (papermill's cell, or one of yours) sets.

    Raises:
        ValueError: an unknown profile, an unknown name or a value of the wrong type, by the file it is from; one line.
    """
    # A cell that ran after the first call may assign what it likes.
    history = namespace["In"]
    first_call = namespace.setdefault("_cells_before_settings", len(history))
    own, given = {}, {}
    for place, source in enumerate(history):
        declared, assigned = _constants(source)
        if place >= first_call:
            known = {**SHARED, **own}
            declared, assigned = ({n: v for n, v in part.items() if n in known} for part in (declared, assigned))
        own |= declared
        given |= assigned
    if "profile" not in own:  # nbval keeps no history: what differs from the notebook's file was set
        own = declared_in(notebooks()[notebook])
        defaults = {name: default for name, (_, default) in own.items()}
        known = [name for name in {**SHARED, **own} if name in namespace]
        given = {name: namespace[name] for name in known if name not in own or namespace[name] != defaults[name]}
    values, sources = _layered(notebook, own, given)
    for name, value in values.items():
        print(f"{name:<28} {value!r:<40} {sources[name]}".rstrip())
    return _frozen(notebook, own, values)


def load(notebook: str, profile: str | None = None, given: dict[str, Any] | None = None) -> Any:
    """The same parameters without running the notebook; `profile` is by default the one its cell declares.

    Raises `ValueError` as `resolve` does.
    """
    own = declared_in(notebooks()[notebook])
    values, _ = _layered(notebook, own, (given or {}) | ({} if profile is None else {"profile": profile}))
    return _frozen(notebook, own, values)


def used(notebook: str) -> dict[str, type]:
    """Name -> type of all parameters of a notebook."""
    own = {name: kind for name, (kind, _) in declared_in(notebooks()[notebook]).items()}
    return {name: kind for name, kind in SHARED.items() if name not in UNUSED.get(notebook, ())} | own


def declared_in(path: Path) -> dict[str, tuple[type, Any]]:
    """Name -> type and default of the parameters in the cell tagged `parameters`."""
    import nbformat  # which takes a second, and a running notebook does not need it

    cells = nbformat.read(path, as_version=4).cells
    return _constants(next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])))[0]


def profiles() -> dict[str, list[str]]:
    """Profile -> its notebooks in reading order: those with a `params/<profile>/<notebook>.yaml`.

    Raises `ValueError` outside the project.
    """
    folders = sorted(path.parent for path in (project_root() / "params").glob("*/common.yaml"))
    if not folders:
        raise ValueError(f"{project_root()}: no profiles in params/; run this inside a checkout of the project.")
    return {folder.name: [name for name in notebooks() if (folder / f"{name}.yaml").exists()] for folder in folders}


def read(path: Path, known: dict[str, type]) -> dict[str, Any]:
    """The parameters of a flat YAML file, brought to their types; `ValueError` names file and parameter."""
    shown = path.relative_to(project_root()) if path.is_relative_to(project_root()) else path
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{shown}: not valid YAML ({str(error).splitlines()[0]}); correct it.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{shown}: holds no `name: value` lines.")
    for name in values:
        if name not in known:
            raise ValueError(f"{shown}: {name} is no parameter here; there are {', '.join(known)}.")
    try:
        return {name: coerce(name, value, known[name]) for name, value in values.items()}
    except ValueError as error:
        raise ValueError(f"{shown}: {error}") from error


def coerce(name: str, value: Any, kind: type) -> Any:
    """`value` as `kind`, or a ValueError that names the parameter.

    "2e-4" and 3 become a float, "true" a bool; a list may be one number, or words in a row as on a command line.
    """
    if get_origin(kind) is list:
        return _list(name, value, kind)
    if kind is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    try:
        if kind is float and not isinstance(value, bool):
            return float(value)
        if kind is int and not isinstance(value, bool) and float(value) == int(float(value)):
            return int(float(value))
    except (TypeError, ValueError, OverflowError):
        pass
    if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    if kind is dict and isinstance(value, dict):
        return value
    raise ValueError(f"parameter {name}={value!r} is not of type {kind.__name__}.")


def _list(name: str, value: Any, kind: type) -> list:
    (item,) = get_args(kind)
    items = value
    if isinstance(value, str):
        items = yaml.safe_load(value) if value.startswith("[") else value.split()
    elif isinstance(value, (int, float)):
        items = [value]
    try:
        if isinstance(items, list):
            return [coerce(name, one, item) for one in items]
    except ValueError:
        pass
    raise ValueError(f"parameter {name}={value!r} is not of type {kind}.")


def _layered(notebook: str, own: dict[str, tuple[type, Any]], given: dict[str, Any]) -> tuple[dict, dict]:
    """The values of a notebook's parameters, and where each is from ("" for a default)."""
    kinds = {name: kind for name, kind in SHARED.items() if name not in UNUSED.get(notebook, ())}
    kinds |= {name: kind for name, (kind, _) in own.items()}
    for name in given:
        if name not in kinds and name not in SHARED:
            near = get_close_matches(name, kinds, n=1)
            there = f"did you mean {near[0]}?" if near else f"it has {', '.join(kinds)}."
            raise ValueError(f"parameter {name!r} is not declared in this notebook; {there}")
    if "profile" not in own:
        raise ValueError("run the parameters cell first; it declares profile, the folder of params/.")
    profile = coerce("profile", given.get("profile", own["profile"][1]), str)
    there = profiles()
    if profile not in there:
        raise ValueError(f"no profile {profile!r}; there are {', '.join(there)}.")
    if notebook not in there[profile]:
        raise ValueError(f"profile {profile} has no notebook {notebook!r}; it has {', '.join(there[profile])}.")
    folder = Path("params") / profile
    common = read(project_root() / folder / "common.yaml", {"profile": str, **SHARED})
    layers = [
        ("", DEFAULTS | {name: default for name, (_, default) in own.items()}),
        (f"{folder}/common.yaml", common),
        (f"{folder}/{notebook}.yaml", read(project_root() / folder / f"{notebook}.yaml", kinds)),
        ("given", given),
    ]
    values, sources = {}, {}
    for source, layer in layers:
        layer = {name: coerce(name, layer[name], kind) for name, kind in kinds.items() if name in layer}
        values |= layer
        sources |= dict.fromkeys(layer, source)
    for name, value in values.items():
        _check_size(name, value, sources[name])
    return {name: values[name] for name in kinds}, sources


def _check_size(name: str, value: Any, source: str) -> None:
    """Refuse a number of which there must be one at least, or more than none, or that is negative."""
    sizes = [n for n in (value if isinstance(value, list) else [value]) if type(n) is int]
    least = 1 if isinstance(value, list) or (name in SHARED and name not in CAN_BE_ZERO) else 0
    where = f"{source}: " if source.endswith(".yaml") else ""
    if any(n < least for n in sizes):
        raise ValueError(f"{where}parameter {name}={value!r}: give {least} or more.")
    if name in ABOVE_ZERO and not value > 0:
        raise ValueError(f"{where}parameter {name}={value!r}: give more than 0.")


def _constants(source: str) -> tuple[dict[str, tuple[type, Any]], dict[str, Any]]:
    """Name -> (type, value), and name -> value, of a cell that only assigns constants; else nothing."""
    declared, assigned = {}, {}
    try:
        for line in ast.parse(source).body:
            if isinstance(line, ast.AnnAssign):
                declared[line.target.id] = (KINDS[ast.unparse(line.annotation)], ast.literal_eval(line.value))
            else:
                (target,) = line.targets
                assigned[target.id] = ast.literal_eval(line.value)
    except (SyntaxError, AttributeError, KeyError, ValueError, TypeError) as error:
        if declared:
            line = ast.unparse(line).split("\n")[0]
            raise ValueError(f"{line!r}: write `name: type = constant`; types: {', '.join(KINDS)}.") from error
        return {}, {}
    return declared, assigned


def _frozen(notebook: str, own: dict[str, tuple[type, Any]], values: dict[str, Any]) -> Any:
    kinds = SHARED | {name: kind for name, (kind, _) in own.items()}
    columns = [("notebook", str), *((name, kinds[name]) for name in values)]
    return make_dataclass("Parameters", columns, frozen=True)(notebook, **values)
