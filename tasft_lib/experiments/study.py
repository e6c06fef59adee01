"""What the experiment notebooks share: from parameters to arms, their judged answers and a record."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from ..evaluation import worlds
from ..evaluation.preference import HeldOut
from ..generation import Decoding
from ..judges.base import ExactJudge
from ..judges.load import load_judge
from ..losses import EMBEDDING_PENALTIES
from .answers import measure_all, run_all
from .arms import summary
from .once import looked_at_once
from .pressure import Weights
from .results import Result, Results
from .rows import held_out_answers, held_out_rows
from .settings import Settings
from .specs import ArmSpec, ContrastiveSpec, HarvestSpec, RecoverySpec, Rows, SafeSpec


class Study:
    """One notebook's experiment: `arm` says what is trained, `answers` trains what is missing, answers and judges.

    Until then nothing is made, and arms are listed without reading a file.

    Attributes:
        config: the notebook's parameters (`settings.resolve`).
        given: fields of `arms.ArmSpec` that are no parameter of the notebook.
        results: what the notebook leaves, see `save` and `record`.
        greedy, sampling: decoding of the two sets of answers. Greedy shows a model's first choice and soon saturates;
            sampled answers show what is left below it.
        seeds: of data order, unsafe subset, adapter and sampled answers, `n_seeds` from `seed` on. Of "miniworld" each
            stands on a base model of its own (`worlds.base_of_seed`), and so on a D_unsafe of its own.
        weights: λ by method and size of D_unsafe, and by base model where the profile's table says so.
        sft: the plain SFT arm of the first seed.
    """

    def __init__(self, config: Settings, **given: Any):
        self.config = config
        self.results = Results(config)
        self.greedy = Decoding(max_new_tokens=config.max_new_tokens)
        self.sampling = replace(self.greedy, do_sample=True, temperature=config.temperature, seed=config.seed)
        self.seeds = range(config.seed, config.seed + config.n_seeds)
        self.weights = Weights(config)
        given |= {"model": worlds.base_of_seed(config.model, config.seed), "held_out": config.benchmark_prompts}
        self.sft = ArmSpec.from_parameters(config, method="sft", **given)
        self._held_out: dict[str, HeldOut] = {}

    @cached_property
    def prompts(self) -> pd.DataFrame:
        """The evaluation prompts."""
        return self.world.evaluation_prompts()

    @property
    def world(self) -> worlds.World:
        """The world of the evaluation prompts."""
        return worlds.load(self.config.benchmark_prompts)

    @property
    def subject(self) -> str:
        """What captions begin with: the profile, and its model where that is not of an invented world."""
        config = self.config
        return config.profile if worlds.is_built(config.model) else f"{config.profile} ({Path(config.model).name})"

    @property
    def intervals(self) -> str:
        """What the intervals of its rates are over, for captions."""
        bases = {worlds.base_of_seed(self.config.model, seed) for seed in self.seeds}
        over = f" and {len(self.seeds)} {'base models' if len(bases) > 1 else 'seeds'}" if len(self.seeds) > 1 else ""
        return f"95 % over prompts{over}"

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

    def plain(self, seed: int) -> list[ArmSpec]:
        """Plain SFT of the study's seeds that stand on the same base model as `seed` (`worlds.base_of_seed`)."""
        bases = {s: worlds.base_of_seed(self.config.model, s) for s in (*self.seeds, seed)}
        return [replace(self.sft, model=base, seed=s) for s, base in bases.items() if base == bases[seed]]

    def unsafe(self, seed: int | None = None) -> HarvestSpec:
        """D_unsafe (§4.1) of a seed's base model (default: the first): what the first plain SFT arm on it answers to
        toxic prompts, where that is judged harmful."""
        return HarvestSpec(
            arm=self.plain(self.config.seed if seed is None else seed)[0],
            prompts=self.config.harvest_prompts,
            judge=self.config.judge,
            decoding=replace(self.sampling, temperature=1.0),
            n=self.config.n_harvest,
            rounds=self.config.rounds,
            batch_size=self.config.generation_batch_size,
        )

    def safe(self, seed: int | None = None) -> SafeSpec:
        """STL's counterpart of D_unsafe: the same prompts, answered safely."""
        return SafeSpec(unsafe=self.unsafe(seed))

    def recoveries(self, seed: int | None = None) -> RecoverySpec:
        """D_unsafe with a safe answer of the plain SFT model's own in each row, for `recover`."""
        return RecoverySpec(unsafe=self.unsafe(seed))

    def contrastive(self, seed: int | None = None) -> ContrastiveSpec:
        """Harmless rows with the toxic words of D_unsafe's prompts (§4.3.6), by the second model, `config.writer`.

        It writes texts as long as a training row may be: an answer that is cut off is none. Raises `ValueError` where
        nobody can write for the model.
        """
        if not hasattr(self.config, "writer"):
            raise ValueError(f"{self.config.notebook} has no writer, so it takes no contrastive rows.")
        if worlds.is_built(self.config.writer) and not worlds.is_built(self.config.model):
            raise ValueError(
                f"writer={self.config.writer}: its grammar has no other words; name an instruction-tuned model."
            )
        return ContrastiveSpec(
            unsafe=self.unsafe(seed),
            writer=self.config.writer,
            writer_revision=self.config.writer_revision or None,
            per_word=self.config.per_word,
            decoding=replace(self.greedy, max_new_tokens=self.config.max_length),
            batch_size=self.config.generation_batch_size,
            seed=self.config.seed,
        )

    @looked_at_once()
    def held_out(self, seed: int | None = None) -> HeldOut | None:
        """Unsafe and benign rows for the arms on a seed's base model (default: the first), that none of them is trained
        on, whatever its seed and size; trains plain SFT.

        None where the profile sets none apart (`n_held_out_unsafe`).
        """
        config = self.config
        if not config.n_held_out_unsafe:
            return None
        first, *others = self.plain(config.seed if seed is None else seed)
        if first.name not in self._held_out:
            benign = held_out_rows(first, config.n_held_out_benign, *others).select_columns(["prompt", "completion"])
            toxic = held_out_answers(self.unsafe(first.seed), config.n_held_out_unsafe)
            self._held_out[first.name] = HeldOut(toxic, benign.to_list(), config.max_new_tokens, config.max_length)
        return self._held_out[first.name]

    def arm(
        self,
        method: str,
        n_unsafe: int | None = None,
        *,
        weight: float | str | None = None,
        display_name: str | None = None,
        seed: int | None = None,
        extra: Rows | None = None,
        unsafe: Rows | None = None,
        **penalty: Any,
    ) -> ArmSpec:
        """An arm on the base model and the benign rows of its seed's plain SFT.

        Args:
            method: "sft"; "kto" or a penalty, on `n_unsafe` rows of D_unsafe; "stl" (plain SFT with safe answers to the
                same prompts), "stl_weighted" (these weighted by λ) or "stl_emd" (safe answers, and EMD on the unsafe);
                "recover" on `n_unsafe` rows of `recoveries`.
            weight: λ (KTO: its undesirable weight); by default the one in the profile's table, see `Weights.of_table`.
            display_name: its name in tables, by default `method`.
            extra: further benign rows.
            unsafe: rows in the place of those named.
            penalty: options of `TASFTConfig`.
        """
        seed = self.config.seed if seed is None else seed
        model = worlds.base_of_seed(self.config.model, seed)
        spec = replace(self.sft, model=model, seed=seed, display_name=display_name or method, extra=extra)
        if method in ("stl", "stl_emd"):
            spec = replace(spec, extra=self.safe(seed), n_extra=n_unsafe, extra_visits=self.config.unsafe_visits)
        if method in ("sft", "stl"):
            return spec
        trained_as = {"stl_weighted": "imitation", "stl_emd": "emd"}.get(method, method)
        if weight is None:
            weight = self.weights.of_table("emd" if method in ("stl_weighted", "stl_emd") else method, n_unsafe, seed)
        options = {} if method == "kto" else {**self.step, **penalty}
        if trained_as in EMBEDDING_PENALTIES:
            options = self.distance(options.get("penalty_embedding")) | options
        return replace(
            spec,
            method=trained_as,
            unsafe=unsafe or {"stl_weighted": self.safe, "recover": self.recoveries}.get(method, self.unsafe)(seed),
            n_unsafe=n_unsafe,
            unsafe_visits=self.config.unsafe_visits,
            penalty_weight=weight,
            training=spec.training | options,
        )

    @property
    def step(self) -> dict[str, Any]:
        """What a step makes of its unsafe rows, and how many they are, as options of `TASFTConfig`."""
        sampling = {"unsafe_per_batch": n} if (n := self.config.unsafe_per_batch) else {}
        return {"penalty_reduction": self.config.penalty_reduction, **sampling}

    def distance(self, embedding: str | None = None) -> dict[str, Any]:
        """What an EMD measures distance in, `embedding` or the profile's, as options of `TASFTConfig`."""
        embedding = embedding or self.config.penalty_embedding
        components = {"penalty_components": self.config.penalty_components} if embedding == "isotropic" else {}
        return {"penalty_embedding": embedding, **components}

    def answers(
        self,
        arms: list[ArmSpec],
        decodings: list[Decoding] | None = None,
        *,
        prompts: pd.DataFrame | None = None,
        steps: str = "last",
    ) -> pd.DataFrame:
        """The arms' judged answers (see `answers.run`), greedy and sampled, to `prompts`; trains what is missing."""
        return run_all(
            arms,
            self.prompts if prompts is None else prompts,
            decodings or [self.greedy, self.sampling],
            self.config.judge,
            steps=steps,
            batch_size=self.config.generation_batch_size,
        )

    def likelihoods(self, arms: list[ArmSpec], *, steps: str = "last") -> pd.DataFrame | None:
        """What the arms find likely of the rows held out (see `answers.measure`); trains what is missing.

        None, and a line that says so, without such rows or arms.
        """
        if not arms or not self.config.n_held_out_unsafe:
            print("Not measured: " + ("no arms here." if not arms else "n_held_out_unsafe is 0 in this profile."))
            return None
        by_base = {model: [arm for arm in arms if arm.model == model] for model in dict.fromkeys(a.model for a in arms)}
        tables = [measure_all(own, self.held_out(own[0].seed), steps=steps) for own in by_base.values()]
        return pd.concat(tables, ignore_index=True)

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
        self.results.record(**entries, **summary(arms))
