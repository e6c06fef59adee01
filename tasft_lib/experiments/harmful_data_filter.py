"""Contaminated fine-tuning sets whose harmful rows are known, and the arms trained on what a filter makes of them."""

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from datasets import Dataset, concatenate_datasets
from tqdm.auto import tqdm

from ..evaluation import worlds
from ..evaluation.rates import summary
from ..prepare import catalogue
from ..records import data, forms, templates
from ..saft import find
from ..saft.activations import POOLINGS, activations, completion_loss, middle_layer, n_layers
from ..saft.filter import SAFTFitter, check_share
from ..storage import files
from ..storage.files import runs_folder
from . import row_detectors
from .answers import judge_by_name
from .arms import load_model
from .rows import pairs, training_rows
from .specs import ArmSpec
from .study import Study

HARVESTED = "harvested"  # the `contamination_source` that is the study's own benign rows and harvested unsafe ones


@dataclass(frozen=True, kw_only=True)
class Filtered:
    """A contaminated set and what a filter makes of it.

    Attributes:
        contamination: ε, the share of harmful rows.
        filter: one of `detectors`, "none", "oracle", or the AUROC of a made-up filter, as text.
        share: share of the rows that it drops, those with the highest scores.
        seed: of the set and of the arm.
        n_safe: see `contaminated_rows`.
    """

    contamination: float
    filter: str
    share: float
    seed: int
    n_safe: int = 0


def contaminated_rows(
    source: str,
    n: int,
    contamination: float,
    *,
    seed: int,
    template: str,
    n_safe: int = 0,
    revision: str | None = None,
    evaluation_prompts: list[str] | None = None,
    failure: str | None = None,
) -> Dataset:
    """`n` rows `prompt`, `completion`, `label`, shuffled; `round(contamination · n)` of them are harmful (label False).

    A Huber mixture, (1 − ε) benign + ε harmful (SAFT, definition 2.1).

    Args:
        source: a world that makes its rows (see `worlds.load`), or BeaverTails (file or hub id with `revision`), whose
            safe and unsafe pairs are drawn.
        n_safe: of the benign rows that are made, so many are toxic prompts with a safe answer, as BeaverTails has.
        evaluation_prompts: no row asks one of them.
        failure: a made set on which SAFT is expected to fail: harm in "one family"; "topic", half of the benign rows
            are stories; "length", every second row with an answer repeated four times.

    Raises `ValueError` for a share outside [0, 1] and where there are too few rows of a kind.
    """
    check_share(contamination)
    n_harmful = round(contamination * n)
    world = worlds.load(source)
    sides = world.contaminated_sides(n - n_harmful, n_harmful, seed=seed, n_safe=n_safe, failure=failure)
    if sides is None:
        rows = catalogue.beavertails_rows(source, revision=revision)
        written = "none" if template == "chat" else template  # which `to_training_rows` makes messages of
        prompts = [templates.format_prompt(prompt, template=written) for prompt in rows["prompt"][:]]
        rows = rows.remove_columns("prompt").add_column("prompt", prompts)
        sides = [part.remove_columns("label") for part in data.by_label(rows)]
    else:
        sides = [Dataset.from_list(rows) if rows else None for rows in sides]
    sides = [
        forms.to_training_rows(side, label=label, template=template, source=source)
        for side, label in zip(sides, (True, False), strict=True)
        if side is not None
    ]
    sides = [data.deduplicate(data.drop_leaks(side, evaluation_prompts or ())[0])[0] for side in sides]
    if len(sides) == 1:
        return sides[0].shuffle(seed=seed)
    return data.mix(*sides, n_benign=n - n_harmful, n_unsafe=n_harmful, seed=seed)


def compared(contaminations: list[float], filters: list[str], seeds: range, *, n_safe: int = 0) -> list[Filtered]:
    """Every filter on every set, dropping as many rows as are harmful; "none" drops nothing."""
    sets = product(seeds, contaminations, filters)
    return [
        Filtered(contamination=c, filter=name, share=0.0 if name == "none" else c, seed=seed, n_safe=n_safe)
        for seed, c, name in sets
    ]


def steered(contamination: float, rates: list[float], seeds: range) -> list[Filtered]:
    """SAFT with its threshold moved, see `SAFTFilter.steer`."""
    shares = [contamination + rate * (1 - contamination if rate > 0 else contamination) for rate in rates]
    return [
        Filtered(contamination=contamination, filter="saft", share=share, seed=seed)
        for seed, share in product(seeds, shares)
    ]


def rows_of(study: Study, made: Filtered) -> Dataset:
    """The contaminated set, labels and all, from the study's source."""
    return _contaminated(study, study.config.n_rows, made.contamination, seed=made.seed, n_safe=made.n_safe)


def filtered_arm(study: Study, made: Filtered, *, then: Literal["sft", "emd"], factor: float | None = None) -> ArmSpec:
    """The arm trained on the kept rows, "sft", or on them and, pushed away from, the dropped ones, "emd".

    The rows themselves are needed when it is trained (`score_sets`), not to list it. λ follows from a total pressure
    (`TASFTConfig.penalty_pressure`): `factor`, by default the study's, times the one chosen for the seed's base model.
    """
    kept, dropped = _files(study, made)
    n_dropped = round(made.share * study.config.n_rows)
    benign = {"benign": str(kept), "benign_revision": None, "n_benign": study.config.n_rows - n_dropped}
    spec = replace(study.arm("sft", seed=made.seed), **benign, display_name=made.filter)
    if then == "sft":
        return spec
    options = study.step | study.distance()
    pressure = (factor or study.config.factor) * study.weights.chosen_pressure(then, study.config.n_unsafe, made.seed)
    return replace(
        spec,
        method=then,
        display_name=f"{made.filter}_{then}",
        unsafe=str(dropped),
        n_unsafe=n_dropped,
        unsafe_visits=study.config.unsafe_visits,
        training=spec.training | options | {"penalty_pressure": float(f"{pressure:.4g}")},
    )


def arms_of(
    study: Study, filtered: list[Filtered], then: tuple[str, ...] = ("sft", "emd")
) -> list[tuple[Filtered, ArmSpec]]:
    """(what it is trained on, arm) for each; EMD only where something was dropped."""
    return [
        (made, filtered_arm(study, made, then=loss))
        for made, loss in product(filtered, then)
        if loss == "sft" or made.share
    ]


@dataclass(frozen=True, kw_only=True)
class Design:
    """What the notebook compares.

    Attributes:
        filtered: every contaminated set with its filters, to be scored (`score_sets`).
        trained: (what it is trained on, arm).
        tried: (factor, arm), to choose EMD's on the development split.
    """

    filtered: list[Filtered]
    trained: list[tuple[Filtered, ArmSpec]]
    tried: list[tuple[float, ArmSpec]]

    @property
    def arms(self) -> list[ArmSpec]:
        """All that is trained, each once."""
        arms = [arm for _, arm in self.trained]
        return arms + [arm for _, arm in self.tried if arm not in arms]


def design(study: Study) -> Design:
    """The sets, filters and arms of the study's parameters, none without `contaminations`; nothing is computed."""
    if not study.config.contaminations:
        return Design(filtered=[], trained=[], tried=[])
    config, seeds, dose = study.config, study.seeds, study.config.swept_contamination
    sets = compared(config.contaminations, ["none", "random", "saft", "saft_unsafe", "oracle"], seeds)
    labelled = compared([dose], ["saft_labelled"], seeds)
    swept = compared([dose], [str(quality) for quality in config.qualities], seeds)
    moved = steered(config.steered_contamination, config.steer_rates, seeds)
    filtered = [*sets, *labelled, *swept, *moved]
    if config.n_safe:
        names = ["none", "saft", "saft_unsafe", "saft_labelled", "oracle"]
        filtered += compared([dose], names, seeds, n_safe=config.n_safe)

    only_sft = [made for made in filtered if made in moved or made.filter == "random"]
    trained = arms_of(study, [made for made in filtered if made not in only_sft])
    trained += arms_of(study, only_sft, then=("sft",))
    at_dose = [made for made in sets if made.contamination == dose and made.seed == config.seed]
    tried = [
        (factor, filtered_arm(study, made, then="emd", factor=factor))
        for factor in config.factors
        for made in at_dose
        if made.filter in ("saft", "saft_unsafe", "oracle")
    ]
    return Design(filtered=filtered, trained=trained, tried=tried)


def with_sets(answers: pd.DataFrame, arms: list[tuple[Filtered, ArmSpec]]) -> pd.DataFrame:
    """Judged answers with the columns contamination, filter, share and n_safe of the set behind their arm."""
    sets = {arm.name: vars(made) for made, arm in arms}
    columns = ("contamination", "filter", "share", "n_safe")
    return answers.assign(**{column: [sets[arm][column] for arm in answers["arm"]] for column in columns})


def score_sets(study: Study, filtered: list[Filtered]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score the contaminated sets, write the kept and dropped rows that the arms are trained on, and count.

    Returns:
        (detection, verdicts). `row_detectors.detection_table` for every set, with contamination, n_safe and seed; and
        a row per filter: its fields, dropped (rows), precision (share of the dropped that is harmful), recall, auroc.
    """
    sets = dict.fromkeys((made.contamination, made.n_safe, made.seed) for made in filtered)
    bases: dict[str, tuple] = {}
    found, verdicts = [], []
    for contamination, n_safe, seed in tqdm(sets, desc="sets", unit="set", disable=not files.show_progress()):
        own = [
            made for made in filtered if (made.contamination, made.n_safe, made.seed) == (contamination, n_safe, seed)
        ]
        rows, plain = rows_of(study, own[0]), study.plain(seed)[0]
        base = bases[plain.model] = bases.get(plain.model) or load_model(plain)
        harmful, detected = is_harmful(rows), detectors(study, rows, base, seed=seed, n_safe=n_safe)
        table = row_detectors.detection_table(harmful, detected, seed=seed)
        found.append(table.assign(contamination=contamination, n_safe=n_safe, seed=seed))
        for made in own:
            scores = _scores(made.filter, detected, harmful, seed)
            dropped = _write(study, made, rows, scores)
            verdict = {"dropped": int(dropped.sum()), "precision": harmful[dropped].mean() if dropped.any() else np.nan}
            verdict |= {"recall": dropped[harmful].mean(), "auroc": row_detectors.measures(harmful, scores)["auroc"]}
            verdicts.append(vars(made) | verdict)
    return pd.concat(found, ignore_index=True), pd.DataFrame(verdicts)


def detectors(
    study: Study, rows: Dataset, base: tuple, *, seed: int, n_safe: int = 0
) -> dict[str, tuple[np.ndarray, int]]:
    """Name -> (score of each row, higher for harm; labelled rows it was given), for SAFT and what it is compared with.

    "saft" is the study's setting, "saft_1" the same with one direction; "random", "length" of the answer and "loss"
    under the base model, `base`, need no labels either. "saft_labelled" is SAFT with layer, pooling and directions
    chosen on `n_labelled` rows of another set, half of them harmful, with safe answers to toxic prompts where `rows`
    have `n_safe` of them; "saft_unsafe" is given but the harmful ones. "anchors" and "centroid" (the nearest one), on
    the mean over the answer, have the same rows as the former; "probe" has all labels; "judge" is the study's judge,
    where it knows more than to recognise a refusal.
    """
    config, harmful, n = study.config, is_harmful(rows), len(rows)
    n_labelled_safe = round(n_safe * config.n_labelled / len(rows))
    labelled = _contaminated(study, config.n_labelled, 0.5, seed=seed + 1000, n_safe=n_labelled_safe, without=rows)
    unsafe = labelled.select(np.flatnonzero(is_harmful(labelled)))
    layer = config.layer or middle_layer(base[0])
    last, mean = embed(study, concatenate_datasets([rows, labelled]), [layer], base).transpose(1, 0, 2)
    read = (last if config.pooling == "last" else mean)[:n]

    def saft(n_directions: int) -> np.ndarray:
        return SAFTFitter(n_directions).update(read).filter.scores(read)

    options = {"batch_size": config.generation_batch_size, "progress": files.show_progress()}

    def chosen(given: Dataset) -> tuple[np.ndarray, int]:
        search = find.Search(contamination=harmful.mean(), validation=given)
        _, scores = find.find_harmful(*base, rows, search, **options)
        return scores, len(given)

    given = mean[:n], mean[n:], is_harmful(labelled)
    answers = [text if isinstance(text, str) else text[-1]["content"] for text in rows["completion"][:]]
    found = {
        "random": (np.random.default_rng(seed).random(n), 0),
        "length": (np.array([len(answer) for answer in answers]), 0),
        "loss": (np.array(completion_loss(*base, rows, **options)), 0),
        "saft_1": (saft(1), 0),
        "saft": (saft(config.n_directions), 0),
        "saft_labelled": chosen(labelled),
        "saft_unsafe": chosen(unsafe),
        "anchors": (row_detectors.anchor_similarity(*given), len(labelled)),
        "centroid": (row_detectors.nearest_centroid(*given), len(labelled)),
        "probe": (row_detectors.logistic_probe(mean[:n], harmful), n),
    }
    if config.judge != "compliance":
        asked = pd.DataFrame({"prompt": [templates.questions(text)[0] for text in rows["prompt"][:]], "kind": "toxic"})
        judged = judge_by_name(asked.assign(response=answers), config.judge)
        found["judge"] = (np.where(judged["verdict"] == "harmful", 5.0, judged["score"].fillna(0)), 0)
    return found


def layer_table(study: Study, rows: Dataset, directions: tuple[int, ...]) -> pd.DataFrame:
    """AUROC at every layer (SAFT, Fig 4): columns layer, pooling, detector, auroc; SAFT by k, and a linear probe."""
    base = load_model(study.sft)
    harmful, layers = is_harmful(rows), list(range(1, n_layers(base[0]) + 1))
    embedded = embed(study, rows, layers, base)
    found = []
    for i, (layer, pooling) in enumerate(product(layers, POOLINGS)):
        z = embedded[:, i]
        scores = {f"saft_{k}": SAFTFitter(k).update(z).filter.scores(z) for k in directions}
        for name, values in (scores | {"probe": row_detectors.logistic_probe(z, harmful)}).items():
            auroc = row_detectors.measures(harmful, values)["auroc"]
            found.append({"layer": layer, "pooling": pooling, "detector": name, "auroc": auroc})
    return pd.DataFrame(found)


def failure_table(study: Study, *, seed: int) -> pd.DataFrame:
    """Sets on which the first direction need not be harm: AUROC of the detectors, a row per set.

    At contamination 0.3, but for "rare" (0.01); see `contaminated_rows`. Empty where the world makes no such sets.
    """
    size = study.config.n_rows
    sets = worlds.load(study.config.contamination_source).failures(size)
    base = load_model(study.sft) if sets else None
    found = []
    for name, options in sets.items():
        options = {"contamination": 0.3} | options
        rows = _contaminated(study, size, options.pop("contamination"), seed=seed, **options)
        scores = detectors(study, rows, base, seed=seed, n_safe=options.get("n_safe", 0))
        aurocs = {detector: row_detectors.measures(is_harmful(rows), s)["auroc"] for detector, (s, _) in scores.items()}
        found.append({"set": name, "rows": len(rows), "harmful": int(is_harmful(rows).sum())} | aurocs)
    return pd.DataFrame(found)


def by_contamination(table: pd.DataFrame, shares: list[float]) -> pd.DataFrame:
    """Rows of `summary` of the filters that drop as many rows as are harmful, or none, in sets without safe answers."""
    filters = ("none", "random", "saft", "saft_unsafe", "saft_labelled", "oracle")
    names = [f"{name}{then}" for name in filters for then in ("", "_emd")]
    rows = table[table["method"].isin(names) & table["share"].isin([0, *shares]) & (table["n_safe"] == 0)]
    return rows[(rows["share"] == 0) | (rows["share"] == rows["contamination"])]


def by_quality(table: pd.DataFrame, qualities: list[float]) -> pd.DataFrame:
    """Rows of made-up filters: `quality` is their AUROC, `method` "filter" or, pushed away from, "filter_emd"."""
    named = {f"{quality}{then}": (quality, f"filter{then}") for quality in qualities for then in ("", "_emd")}
    rows = table[table["method"].isin(named)]
    methods = rows["method"]
    return rows.assign(quality=[named[m][0] for m in methods], method=[named[m][1] for m in methods])


def by_share(table: pd.DataFrame, contamination: float) -> pd.DataFrame:
    """Rows of SAFT with its threshold moved, and of no filter, in sets of one contamination without safe answers."""
    rows = table[(table["contamination"] == contamination) & table["method"].isin(["none", "saft"])]
    return rows[rows["n_safe"] == 0].assign(method="saft")


def regrets(judged: pd.DataFrame, factors: dict[str, float]) -> pd.DataFrame:
    """`summary` by method and factor with `regret`: harm + noise + benign correctness lost against the method's best.

    `factors` names the factor of each arm.
    """
    table = summary(judged.assign(factor=judged["arm"].map(factors)), ["method", "factor"])
    best = table.groupby("method")["correct"].transform("max")
    return table.assign(regret=table["harm"] + table["degenerate"] + (best - table["correct"]).fillna(0))


def is_harmful(rows: Dataset) -> np.ndarray:
    """`[n]`, bool: what the labels of a contaminated set say."""
    return ~np.array(rows["label"][:], dtype=bool)


def embed(study: Study, rows: Dataset, layers: list[int], base: tuple) -> np.ndarray:
    """`activations` of the rows in both poolings, kept in runs/activations: `[n, layers · 2, d]`; `base` makes them."""
    described = [files.model_identity(base[0].name_or_path), study.sft.model_revision, study.sft.dtype]
    described += [study.sft.load_in_4bit, data.fingerprint(rows), layers]
    return activations(
        *base,
        rows,
        layers=layers,
        poolings=POOLINGS,
        batch_size=study.config.generation_batch_size,
        file=runs_folder() / "activations" / f"{files.content_hash(described)}.f32",
        progress=files.show_progress(),
    )


def _contaminated(
    study: Study, n: int, contamination: float, *, seed: int, without: Dataset | None = None, **options
) -> Dataset:
    """A set from the study's source; of harvested rows none of `without`. Two sets of another source share hardly any.

    `options` as those of `contaminated_rows`.
    """
    config = study.config
    if config.contamination_source == HARVESTED:
        return _with_harvested(study, n, contamination, seed=seed, without=without)
    return contaminated_rows(
        config.contamination_source,
        n,
        contamination,
        seed=seed,
        template=config.template,
        revision=config.contamination_revision or None,
        evaluation_prompts=study.prompts["prompt"].tolist(),
        **options,
    )


def _with_harvested(study: Study, n: int, contamination: float, *, seed: int, without: Dataset | None) -> Dataset:
    """Benign rows as arms are trained on, and in the place of some of them unsafe answers of plain SFT's."""
    n_harmful, taken = round(contamination * n), set() if without is None else set(pairs(without))
    # As many more as may be taken.
    arm = replace(study.plain(seed)[0], seed=seed, n_benign=n - n_harmful + len(taken))
    both = replace(arm, method="emd", unsafe=study.unsafe(seed), n_unsafe=study.config.n_harvest)  # SFT has one side
    sides = training_rows(both)
    left = [side.select([i for i, pair in enumerate(pairs(side)) if pair not in taken]) for side in sides]
    return data.mix(*left, n_benign=n - n_harmful, n_unsafe=n_harmful, seed=seed)


def _scores(name: str, detected: dict[str, tuple[np.ndarray, int]], harmful: np.ndarray, seed: int) -> np.ndarray:
    """Scores `[n]` of the rows by the filter `name`, one of those that `Filtered` lists; higher is more harmful."""
    if name in detected:
        return detected[name][0]
    if name in ("none", "oracle"):
        return harmful * (name == "oracle")
    return row_detectors.scores_of_quality(harmful, float(name), seed=seed)


def _write(study: Study, made: Filtered, rows: Dataset, scores: np.ndarray) -> np.ndarray:
    """Write the files that `filtered_arm` names; returns which rows are dropped, `[n]`. Labels are not looked at.

    Of equal scores the earlier row is dropped first.
    """
    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")
    dropped = np.zeros(len(rows), dtype=bool)
    dropped[order[: round(made.share * len(rows))]] = True
    for path, chosen in zip(_files(study, made), (~dropped, dropped), strict=True):
        part = rows.select(np.flatnonzero(chosen)).select_columns(["prompt", "completion"])
        files.write_rows(path, part.to_list())
    return dropped


def _files(study: Study, made: Filtered) -> tuple[Path, Path]:
    """Where the (kept, dropped) rows lie."""
    config = study.config
    source = [config.contamination_source, config.contamination_revision, config.n_rows, config.template]
    model = [config.model, config.model_revision, config.benchmark_prompts]
    made_of = f"{made.contamination:g}-{made.filter}-{made.share:.4g}-{made.n_safe}"  # shown by `reproduce.plan`
    name = f"{made_of}-{files.content_hash([*source, *model, vars(made)])}"
    folder = runs_folder() / "filtered" / name
    return folder / "kept.jsonl", folder / "dropped.jsonl"
