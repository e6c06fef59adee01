"""Which arms each notebook trains: a function per notebook, by its name. They list specs and compute nothing.

The notebook's cell `arms` and the dry run (`reproduce.plan`) call the same function.
"""

from typing import Any

from . import harmful_data_filter as filtering
from .settings import Settings
from .specs import ArmSpec
from .study import Study


def study_of(config: Settings) -> Study:
    """The notebook's study. The benign rows of `harmful_data_filter` are those of its contaminated sets."""
    if config.notebook == "harmful_data_filter":
        return Study(config, benign=config.contamination_source, n_benign=config.n_rows)
    return Study(config)


def build_unsafe_set(study: Study) -> list[ArmSpec]:
    """Plain SFT, whose answers become D_unsafe: an arm per base model."""
    return [study.arm("sft", seed=seed) for seed in study.seeds if study.unsafe(seed).arm.seed == seed]


def safety(study: Study) -> list[ArmSpec]:
    """Every method on the same rows, per seed: those followed along training, then their rivals."""
    config = study.config
    followed = ["sft", *config.methods]
    arms = [study.arm(method, config.n_unsafe, seed=seed) for seed in study.seeds for method in followed]
    rivals = config.rivals
    return arms + [study.arm(method, config.n_unsafe, seed=seed) for seed in study.seeds for method in rivals]


def sizes_by_method(config: Any) -> dict[str, list[int]]:
    """Method -> sizes of D_unsafe: `sizes` for the methods, `rival_sizes` for their rivals."""
    return dict.fromkeys(config.methods, config.sizes) | dict.fromkeys(config.rivals, config.rival_sizes)


def data_efficiency(study: Study) -> list[ArmSpec]:
    """Per seed: every method at its sizes of D_unsafe, the automatic λ carried to smaller ones, and EMD's controls."""
    config, by_size = study.config, sizes_by_method(study.config)
    controls = [(kind, {"penalty_embedding": kind}) for kind in config.controls]
    controls += [(f"first_{k}", {"penalty_first_tokens": k}) for k in config.first_tokens]
    arms = [study.arm("sft", seed=seed) for seed in study.seeds]
    for seed in study.seeds:
        arms += [study.arm(method, n, seed=seed) for method in by_size for n in by_size[method]]
        for method in config.auto_methods:
            pressure = study.weights.chosen_pressure(method, max(config.sizes))
            option = {"weight": "auto", "display_name": f"{method}_auto", "penalty_pressure": pressure}
            arms += [study.arm(method, n, seed=seed, **option) for n in config.sizes[1:]]
        for n in config.control_sizes:
            arms += [study.arm("emd", n, seed=seed, display_name=f"emd_{kind}", **option) for kind, option in controls]
    return arms


def stl_comparison(study: Study) -> list[ArmSpec]:
    """Plain SFT, then per seed and size of D_unsafe every method."""
    sizes, methods = study.config.sizes, study.config.methods
    arms = [study.arm("sft", seed=seed) for seed in study.seeds]
    return arms + [study.arm(method, n, seed=seed) for seed in study.seeds for n in sizes for method in methods]


def over_alignment(study: Study) -> list[ArmSpec]:
    """Every method at two sizes of D_unsafe, per seed."""
    config = study.config
    sizes, methods = (config.n_unsafe, config.few), config.methods
    return [study.arm(method, n, seed=seed) for seed in study.seeds for n in sizes for method in methods]


def contrastive_augmentation(study: Study) -> list[ArmSpec]:
    """Plain SFT; every method at every multiple of its λ, without and with contrastive rows, per seed."""
    config = study.config
    arms = [study.arm("sft", seed=seed) for seed in study.seeds]
    for method in config.methods:
        for factor in config.factors:
            weight = study.weights.scaled(method, config.n_unsafe, factor)
            option = {"weight": weight}
            arms += [study.arm(method, config.n_unsafe, seed=seed, **option) for seed in study.seeds]
            option["display_name"] = f"{method}_contrastive"
            for seed in study.seeds:
                arms.append(study.arm(method, config.n_unsafe, seed=seed, extra=study.contrastive(seed), **option))
    return arms


def response_quality(study: Study) -> list[ArmSpec]:
    """Plain SFT, the methods and their rivals, per seed."""
    config = study.config
    methods = ["sft", *config.methods, *config.rivals]
    return [study.arm(method, config.n_unsafe, seed=seed) for seed in study.seeds for method in methods]


def jailbreak(study: Study) -> list[ArmSpec]:
    """Every method at every size of D_unsafe, per seed."""
    sizes, methods = study.config.sizes, study.config.methods
    return [study.arm(method, n, seed=seed) for seed in study.seeds for n in sizes for method in methods]


def harmful_data_filter(study: Study) -> list[ArmSpec]:
    """What is trained on what the filters make of contaminated sets, see `harmful_data_filter.design`."""
    return filtering.design(study).arms


def emd_bound(study: Study) -> list[ArmSpec]:
    """Plain SFT and the methods."""
    return [study.arm(method, study.config.n_unsafe) for method in ("sft", *study.config.methods)]


def penalty_weight(study: Study) -> list[ArmSpec]:
    """Every method at its sizes of D_unsafe with every λ of the search; none where the answers are `stored`."""
    config = study.config
    if config.stored:
        return []
    arms = [study.sft]
    for method, sizes in sizes_by_method(config).items():
        pressures = getattr(config, f"{method}_pressures")
        for n_unsafe in sizes:
            weights = [study.weights.of_pressure(pressure, method, n_unsafe) for pressure in pressures]
            weights += ["auto"] if method in config.auto_methods else []
            arms += [study.arm(method, n_unsafe, weight=weight) for weight in weights]
    return arms


def your_model(study: Study) -> list[ArmSpec]:
    """Plain SFT, and TA-SFT with the penalty and λ of your choice."""
    config = study.config
    weight = config.penalty_weight if config.penalty_weight == "auto" else float(config.penalty_weight)
    return [study.sft, study.arm(config.penalty, config.n_unsafe, weight=weight)]


def audit_answers(study: Study) -> list[ArmSpec]:
    """Plain SFT and the methods, per seed; none where the answers are `completions`."""
    config = study.config
    methods = [] if config.completions else ["sft", *config.methods]
    return [study.arm(method, config.n_unsafe, seed=seed) for seed in study.seeds for method in methods]
