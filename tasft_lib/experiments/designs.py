"""Which arms each notebook trains: a function per notebook, by its name. They list specs and compute nothing.

The notebook's cell `arms` and the dry run (`reproduce.plan`) call the same function.
"""

from dataclasses import replace
from typing import Any

from . import harmful_data_filter as filtering
from . import trade_off as search
from .settings import Settings
from .specs import ArmSpec, RecoverySpec
from .study import Study


def study_of(config: Settings) -> Study:
    """The notebook's study. The benign rows of `harmful_data_filter` are those of its contaminated sets."""
    if config.notebook == "harmful_data_filter" and config.contamination_source != filtering.HARVESTED:
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
            pressure = study.weights.chosen_pressure(method, max(config.sizes), seed)
            option = {"weight": "auto", "display_name": f"{method}_auto", "penalty_pressure": pressure}
            arms += [study.arm(method, n, seed=seed, **option) for n in config.sizes[1:]]
        for n in config.control_sizes:
            arms += [study.arm("emd", n, seed=seed, display_name=f"emd_{kind}", **option) for kind, option in controls]
    return arms


def stl_comparison(study: Study) -> list[ArmSpec]:
    """Plain SFT, then per seed and size of D_unsafe every method."""
    return [study.arm("sft", seed=seed) for seed in study.seeds] + _by_size(study)


def over_alignment(study: Study) -> list[ArmSpec]:
    """Every method at every size of D_unsafe, per seed."""
    return _by_size(study)


def contrastive_augmentation(study: Study) -> list[ArmSpec]:
    """Plain SFT; every method at every multiple of its λ, without and with contrastive rows, per seed."""
    config = study.config
    arms = [study.arm("sft", seed=seed) for seed in study.seeds]
    for method in config.methods:
        for factor in config.factors:
            for seed in study.seeds:
                option = {"seed": seed, "weight": study.weights.scaled(method, config.n_unsafe, factor, seed)}
                arms.append(study.arm(method, config.n_unsafe, **option))
                option |= {"display_name": f"{method}_contrastive", "extra": study.contrastive(seed)}
                arms.append(study.arm(method, config.n_unsafe, **option))
    return arms


def response_quality(study: Study) -> list[ArmSpec]:
    """Plain SFT, the methods and their rivals, per seed."""
    config = study.config
    methods = ["sft", *config.methods, *config.rivals]
    return [study.arm(method, config.n_unsafe, seed=seed) for seed in study.seeds for method in methods]


def jailbreak(study: Study) -> list[ArmSpec]:
    """Every method at every size of D_unsafe, per seed."""
    return _by_size(study)


def harmful_data_filter(study: Study) -> list[ArmSpec]:
    """What is trained on what the filters make of contaminated sets, see `harmful_data_filter.design`."""
    return filtering.design(study).arms


def emd_bound(study: Study) -> list[ArmSpec]:
    """Plain SFT and the methods."""
    return [study.arm(method, study.config.n_unsafe) for method in ("sft", *study.config.methods)]


def penalty_weight(study: Study) -> list[ArmSpec]:
    """Plain SFT, then every method at its sizes of D_unsafe with every λ of the search, per seed; none where the
    answers are `stored`."""
    config = study.config
    if config.stored:
        return []
    arms = [study.arm("sft", seed=seed) for seed in study.seeds]
    for method, sizes in sizes_by_method(config).items():
        pressures = getattr(config, f"{method}_pressures")
        for n_unsafe in sizes:
            weights = [study.weights.of_pressure(pressure, method, n_unsafe) for pressure in pressures]
            weights += ["auto"] if method in config.auto_methods else []
            arms += [study.arm(method, n_unsafe, weight=w, seed=seed) for seed in study.seeds for w in weights]
    return arms


def your_model(study: Study) -> list[ArmSpec]:
    """Plain SFT, and TA-SFT with the penalty and λ of your choice."""
    config = study.config
    weight = config.penalty_weight if config.penalty_weight == "auto" else float(config.penalty_weight)
    return [study.sft, study.arm(config.penalty, config.n_unsafe, weight=weight)]


def audit_answers(study: Study) -> list[ArmSpec]:
    """Per seed plain SFT, and the methods at their sizes of D_unsafe; then the lines of `tried`, which are those of
    `trade_off`, at the largest size. None where the answers are `completions`."""
    config = study.config
    if config.completions:
        return []
    arms = [study.arm("sft", seed=seed) for seed in study.seeds]
    methods = [(method, n_unsafe) for method in config.methods for n_unsafe in config.sizes]
    arms += [study.arm(method, n_unsafe, seed=seed) for seed in study.seeds for method, n_unsafe in methods]
    lines = [(line, {"name": ""}, max(config.sizes)) for line in config.tried]
    return arms + [trial.arm for seed in study.seeds for line in lines for trial in search.of_line(study, *line, seed)]


def beyond_sampler(study: Study) -> list[ArmSpec]:
    """Methods at their own λ under uniform draws; at pressures of a grid, with a set number of unsafe rows in a step.

    Then EMD at one pressure p: on the first token alone, at p and with the weight that it has among all T tokens at p
    (p / T); and on all tokens with the weight that it has alone (p · T).
    """
    config, seeds = study.config, study.seeds
    arms = [study.arm("sft", seed=seed) for seed in seeds]
    arms += [study.arm(method, n, seed=seed) for seed in seeds for n in config.sizes for method in config.uniform]
    for seed in seeds:
        for method in config.methods:
            for n in config.sizes:
                arms += [stratified_arm(study, method, n, pressure, seed=seed) for pressure in config.pressures]
        p, tokens, first = config.first_pressure, config.answer_tokens, {"penalty_first_tokens": 1}
        weighed = {"emd_first_1": (p, first), "emd_shallow": (p / tokens, first), "emd_deep": (p * tokens, {})}
        for name, (pressure, option) in weighed.items():
            options = option | {"seed": seed, "display_name": name}
            arms.append(stratified_arm(study, "emd", min(config.sizes), pressure, **options))
    return arms


def stratified_arm(study: Study, method: str, n_unsafe: int, pressure: float, **options: Any) -> ArmSpec:
    """An arm with `config.per_batch` unsafe rows in every step, at a total pressure."""
    per_batch = study.config.per_batch
    weight = study.weights.of_pressure(pressure, method, n_unsafe, unsafe_per_batch=per_batch)
    options = {"display_name": f"{method}_stratified"} | options
    return study.arm(method, n_unsafe, weight=weight, unsafe_per_batch=per_batch, **options)


def beyond_recover(study: Study) -> list[ArmSpec]:
    """Plain SFT; the rivals at multiples of their λ; branch and recover at pressures of a grid, its controls at one.

    All with the adapters that the notebook names, on the D_unsafe of the profile's. A branch is drawn for each of an
    unsafe row's `visits`.
    """
    config, arms = study.config, []
    for seed in study.seeds:
        one = RecoverySpec(unsafe=study.unsafe(seed), one=True)
        controls = {"recover_no_push": {"branch_margin": 0.0}, "recover_one": {"unsafe": one}}
        variants = [("recover", pressure, {}) for pressure in config.pressures]
        variants += [(name, config.pressure, option) for name, option in controls.items()]
        arms.append(study.arm("sft", seed=seed))
        for n in config.sizes:
            for method in config.rivals:
                table = "emd" if method == "stl_emd" else method
                weights = [study.weights.scaled(table, n, factor, seed) for factor in config.factors]
                arms += [study.arm(method, n, seed=seed, weight=weight) for weight in weights]
            for name, pressure, option in variants:
                option = option | {"display_name": name, "seed": seed, "branch_depth": config.depth}
                arms.append(
                    replace(stratified_arm(study, "recover", n, pressure, **option), unsafe_visits=config.visits)
                )
    adapter = {"r": config.rank, "lora_alpha": 2 * config.rank, "target_modules": config.targets}
    return [replace(arm, lora=arm.lora | adapter) for arm in arms]


def trade_off(study: Study) -> list[ArmSpec]:
    """Every trial of the search, see `trade_off.trials`; which arms are tested follows from it."""
    return [trial.arm for trial in search.trials(study)]


def beyond_durability(study: Study) -> list[ArmSpec]:
    """Plain SFT and every trial of the notebook, per seed; relearning goes on from these."""
    return [trial.arm for seed in study.seeds for trial in search.trials(study, seed)]


def _by_size(study: Study) -> list[ArmSpec]:
    sizes, methods = study.config.sizes, study.config.methods
    return [study.arm(method, n, seed=seed) for seed in study.seeds for n in sizes for method in methods]
