"""What the experiment notebooks share: from parameters to arms, their judged answers and a record."""

import math
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from .. import files, text
from ..config import TABLE_4_PRESSURE, share_of_loss
from ..data import read_rows
from ..evaluation import worlds
from ..files import project_root, runs_folder
from ..generation import Decoding
from ..judges.base import ExactJudge
from ..judges.load import load_judge
from ..losses import EMBEDDING_PENALTIES
from ..prepare.contrastive import contrastive_rows
from .answers import harvest_unsafe, judge_by_name, run_all
from .arms import ArmSpec, load_model, summary, train, training_rows
from .results import Result, Results


class Study:
    """One notebook's experiment: `arm` says what is trained, `answers` trains what is missing, answers and judges.

    Nothing is computed before it is needed, so arms can be listed without a model.

    Attributes:
        config: the notebook's parameters (`settings.resolve`).
        given: fields of `runs.ArmSpec` that are no parameter of the notebook.
        results: what the notebook leaves, see `save` and `record`.
        greedy, sampling: decoding of the two sets of answers. Greedy shows a model's first choice and soon saturates;
            sampled answers show what is left below it.
        seeds: of data order, unsafe subset, adapter and sampled answers, `n_seeds` from `seed` on.
        sft: the plain SFT arm of the first seed, whose answers make D_unsafe.
    """

    def __init__(self, config: Any, **given: Any):
        self.config = config
        self.results = Results(config)
        self.greedy = Decoding(max_new_tokens=config.max_new_tokens)
        self.sampling = replace(self.greedy, do_sample=True, temperature=config.temperature, seed=config.seed)
        self.seeds = range(config.seed, config.seed + config.n_seeds)
        self.sft = ArmSpec.from_parameters(config, method="sft", held_out=config.benchmark_prompts, **given)

    @cached_property
    def prompts(self) -> pd.DataFrame:
        """The evaluation prompts."""
        return self.world.evaluation_prompts()

    @property
    def world(self) -> worlds.World:
        """The world of the evaluation prompts."""
        return worlds.load(self.config.benchmark_prompts)

    @property
    def in_full(self) -> bool:
        """Whether texts may be shown as they are: prompts and model are of an invented world."""
        sources = (self.config.benchmark_prompts, self.config.harvest_prompts)
        return worlds.is_built(self.config.model) and all(worlds.load(source).is_invented for source in sources)

    @cached_property
    def exact_judge(self) -> ExactJudge | None:
        """The judge, where it knows its world."""
        judge = load_judge(self.config.judge)
        return judge if isinstance(judge, ExactJudge) else None

    @cached_property
    def unsafe(self) -> Path:
        """D_unsafe (§4.1): the plain SFT model's own answers to toxic prompts, judged harmful."""
        train(self.sft)
        source = worlds.load(self.config.harvest_prompts)
        return harvest_unsafe(
            self.sft,
            source.harvest_prompts(),
            self.config.judge,
            replace(self.sampling, temperature=1.0),
            n=self.config.n_harvest,
            evaluation_prompts=self.prompts["prompt"].tolist(),
            rounds=self.config.rounds,
            batch_size=self.config.generation_batch_size,
            prompts_source=source.harvest_source(),
        )

    @cached_property
    def safe(self) -> Path:
        """STL's counterpart of D_unsafe: the same prompts in the same order, answered safely; a JSONL file."""
        rows = read_rows(self.unsafe)
        answers = worlds.load(self.config.harvest_prompts).safe_answers()
        missing = [prompt for prompt in rows["instruction"][:] if prompt not in answers]
        if missing:
            raise ValueError(f"{self.config.harvest_prompts}: no safe answer to {len(missing)} prompts of D_unsafe.")
        safe = [
            {"prompt": row["prompt"], "completion": answers[row["instruction"]], "instruction": row["instruction"]}
            for row in rows
        ]
        path = runs_folder() / "safe" / f"{files.content_hash(safe)}.jsonl"
        return files.write_rows(path, safe)

    @cached_property
    def contrastive(self) -> Path:
        """Harmless rows with the toxic words of D_unsafe's prompts (§4.3.6), by the second model, `config.writer`."""
        toxic, benign = read_rows(self.unsafe)["prompt"][:], training_rows(self.sft)[0]["prompt"][:]
        words = text.toxic_words(toxic, benign)
        made_from = [words, self.config.writer, self.config.writer_revision, self.config.per_word, self.config.seed]
        path = runs_folder() / "contrastive" / f"{files.content_hash(made_from)}.jsonl"
        if not path.exists():
            writer = worlds.load(self.config.writer)
            rows = writer.contrastive_rows(words, self.config.per_word, seed=self.config.seed)
            files.write_rows(path, self._written(words) if rows is None else rows)
        return path

    def _written(self, words: list[str]) -> list[dict[str, str]]:
        """Contrastive rows by the second model."""
        named = {"model": self.config.writer, "model_revision": self.config.writer_revision or None}
        return contrastive_rows(
            words,
            load_model(replace(self.sft, **named)),
            per_word=self.config.per_word,
            decoding=self.greedy,
            batch_size=self.config.generation_batch_size,
        )

    def arm(
        self,
        method: str,
        n_unsafe: int | None = None,
        *,
        weight: float | str | None = None,
        label: str | None = None,
        seed: int | None = None,
        extra: Path | None = None,
        **penalty: Any,
    ) -> ArmSpec:
        """An arm on the same benign rows as plain SFT.

        Args:
            method: "sft"; "kto" or a penalty, on `n_unsafe` rows of D_unsafe; "stl" (plain SFT with safe answers to the
                same prompts), "stl_weighted" (these weighted by λ) or "stl_emd" (safe answers, and EMD on the unsafe).
            weight: λ (KTO: its undesirable weight); by default the one in the profile's table, see `weight`.
            label: its name in tables, by default `method`.
            extra: further benign rows (a file).
            penalty: options of `TASFTConfig`.
        """
        spec = replace(self.sft, seed=self.config.seed if seed is None else seed, label=label or method)
        if extra is not None:
            spec = replace(spec, extra=str(extra))
        if method in ("stl", "stl_emd"):
            spec = replace(spec, extra=str(self.safe), n_extra=n_unsafe)
        if method in ("sft", "stl"):
            return spec
        trained_as = {"stl_weighted": "imitation", "stl_emd": "emd"}.get(method, method)
        if weight is None:
            weight = self.weight("emd" if method in ("stl_weighted", "stl_emd") else method, n_unsafe)
        options = {} if method == "kto" else {"penalty_reduction": self.config.penalty_reduction, **penalty}
        if trained_as in EMBEDDING_PENALTIES:
            options.setdefault("penalty_embedding", self.config.penalty_embedding)
        return replace(
            spec,
            method=trained_as,
            unsafe=str(self.safe if method == "stl_weighted" else self.unsafe),
            n_unsafe=n_unsafe,
            penalty_weight=weight,
            training=spec.training | options,
        )

    def weight(self, method: str, n_unsafe: int) -> float | str:
        """λ of a method at a size of D_unsafe, from the CSV `penalty_weights` (method, n_unsafe, penalty_weight, and
        model where it matters).

        Raises `ValueError` naming the file where it has no such row.
        """
        path = project_root() / self.config.penalty_weights
        if not path.exists():
            raise ValueError(f"penalty_weights={self.config.penalty_weights!r}: no such file in the project.")
        table = pd.read_csv(path)
        rows = table[(table["method"] == method) & (table["n_unsafe"] == n_unsafe)]
        if "model" in table:
            rows = rows[rows["model"] == self.config.model]
        if len(rows) != 1:
            raise ValueError(
                f"{self.config.penalty_weights}: {len(rows)} rows for method {method}, n_unsafe {n_unsafe}"
                + (f", model {self.config.model}" if "model" in table else "")
                + "; it needs one."
            )
        weight = rows["penalty_weight"].iloc[0]
        return "auto" if weight == "auto" else float(weight)

    def scaled_weight(self, method: str, n_unsafe: int, factor: float) -> float:
        """The method's λ (see `weight`) times `factor`; of an automatic one, times its λ here."""
        weight = self.weight(method, n_unsafe)
        if weight == "auto":
            weight = self.weight_of(TABLE_4_PRESSURE[method], method, n_unsafe)
        return float(f"{factor * weight:.4g}")

    def tuned_pressure(self, method: str, n_unsafe: int) -> float:
        """The total pressure of the method's λ (see `weight`) at a size of D_unsafe, to be carried to other sizes."""
        pressure = self.scaled_weight(method, n_unsafe, 1.0) / self.weight_of(1.0, method, n_unsafe)
        return float(f"{pressure:.4g}")

    def weight_of(self, pressure: float, method: str, n_unsafe: int) -> float:
        """λ, to four digits, that exerts a total pressure (see `config.share_of_loss`); KTO's is weight · unsafe rows /
        benign rows.
        """
        if method == "kto":
            share = n_unsafe / self.config.n_benign
        else:
            share = share_of_loss(
                n_unsafe / (self.config.n_benign + n_unsafe),
                self.config.penalty_reduction,
                micro_batch=self.config.per_device_train_batch_size,
                micro_batches=self.config.gradient_accumulation_steps,
            )
        return float(f"{pressure / share:.4g}")

    def pressure_of(self, arm: Any) -> float:
        """The total pressure of an arm, given with `method`, `n_unsafe` and `penalty_weight`; nan for plain SFT."""
        if arm.method == "sft":
            return math.nan
        if arm.penalty_weight == "auto":
            return TABLE_4_PRESSURE[arm.method]
        return float(arm.penalty_weight) / self.weight_of(1.0, arm.method, arm.n_unsafe)

    def answers(
        self,
        arms: list[ArmSpec],
        decodings: list[Decoding] | None = None,
        *,
        prompts: pd.DataFrame | None = None,
        steps: str = "last",
    ) -> pd.DataFrame:
        """The arms' judged answers (see `answers.respond` and `judge_by_name`), greedy and sampled, to `prompts`."""
        answers = run_all(
            arms,
            self.prompts if prompts is None else prompts,
            decodings or [self.greedy, self.sampling],
            steps=steps,
            batch_size=self.config.generation_batch_size,
        )
        return judge_by_name(answers, self.config.judge)

    def decodings(self, names: list[str]) -> list[Decoding]:
        """Those named, "greedy", "sampled" or both."""
        named = {decoding.name: decoding for decoding in (self.greedy, self.sampling)}
        if unknown := set(names) - set(named):
            raise ValueError(f"decodings={names!r}: {', '.join(sorted(unknown))} is none of greedy, sampled.")
        return [named[name] for name in names]

    def save(self, result: Result, name: str) -> Result:
        """Write a table or a figure to `figures/<profile>/<notebook>_<name>`, see `Results.save`; returns it."""
        return self.results.save(result, name)

    def record(self, arms: list[ArmSpec], **entries: Any) -> None:
        """`figures/<profile>/<notebook>_manifest.json`: what every number of the notebook traces to."""
        self.results.record(**entries, arms={arm.name: summary(arm) for arm in arms})
