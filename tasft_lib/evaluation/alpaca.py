"""AlpacaEval's win rate: what it costs, told first, and the score."""

import json
import logging
import math
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

from ..storage.files import content_hash

logger = logging.getLogger(__name__)
# Characters per token of English text, roughly.
CHARACTERS_PER_TOKEN = 4
ANNOTATIONS = "alpaca_eval_annotations.json"
ANNOTATIONS_AT_ONCE = 16
# Of AlpacaEval's 805 instructions in their order: by it the length-controlled rate knows how difficult each one is.
INSTRUCTIONS = "c5770d532bf3"
MIN_CONTROLLED = 20  # judged answers, for a regression that says anything


def alpaca_eval_cost(reference_outputs: list[dict], outputs: list[str]) -> dict[str, int]:
    """{"annotations", "tokens"} that judging `outputs` against the references takes; tokens are rough.

    Tokens are those of instructions and answers, at four characters each; what the annotator's own prompt takes comes
    on top for every annotation.
    """
    _check_outputs(reference_outputs, outputs)
    characters = sum(
        len(row["instruction"]) + len(row["output"]) + len(output)
        for row, output in zip(reference_outputs, outputs, strict=True)
    )
    return {"annotations": len(outputs), "tokens": characters // CHARACTERS_PER_TOKEN}


@dataclass(frozen=True)
class Annotator:
    """An AlpacaEval annotator as its configuration describes it; read, not run.

    Attributes:
        name: as given: a name that `alpaca_eval` knows, or the name of the file or folder.
        config: the configuration file.
        members: name -> (judge model, prompt template, tokens that an answer may have at most) of each annotator in
            it; AlpacaEval gives every instruction to one of them.
        asks_openai: whether one of them needs OPENAI_API_KEY.
        identity: twelve hex digits of all that, settings included: what another judge would differ in.
    """

    name: str
    config: Path
    members: dict[str, tuple[str, str, int]]
    asks_openai: bool
    identity: str

    @property
    def models(self) -> str:
        """The judge models, in alphabetical order."""
        return " ".join(sorted({model for model, _, _ in self.members.values()}))


def read_annotator(annotator: str | Path) -> Annotator:
    """The annotator of that name in `alpaca_eval`, or of a configuration file, or of a folder with `configs.yaml`.

    Raises ValueError where there is none, it holds a key, or a prompt template is missing or shows no answers.
    """
    try:
        with _quiet():
            from alpaca_eval import constants, utils
    except ImportError as error:
        raise ValueError(f"alpaca_eval is missing ({error.name}): pip install 'tasft[alpaca_eval]'") from error
    path = Path(annotator).expanduser()
    path = path.resolve() if path.exists() else Path(constants.EVALUATORS_CONFIG_DIR) / annotator
    path = path / "configs.yaml" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"annotator {annotator}: no such configuration, here or in alpaca_eval; give a YAML file")
    try:
        members = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(members, dict) or not all(isinstance(member, dict) for member in members.values()) or not members:
        raise ValueError(f"{path}: no annotator here; give name: {{prompt_template: ..., fn_completions: ...}}")
    if "api_key" in json.dumps(members, default=str):
        raise ValueError(f"{path}: holds an api_key; remove it and export OPENAI_API_KEY")
    read = {}
    for name, member in members.items():
        try:  # as AlpacaEval finds it
            template = utils.read_or_return(member.get("prompt_template", ""), relative_to=path.parents[1])
        except OSError as error:
            raise ValueError(f"{path}: prompt_template of {name} is not there; give an absolute path") from error
        if "output_1" not in template or "output_2" not in template:
            raise ValueError(f"{path}: prompt_template of {name} lacks {{output_1}} or {{output_2}}; give its file")
        settings = member.get("completions_kwargs") or {}
        # 2048 is AlpacaEval's own limit.
        read[name] = (str(settings.get("model_name", name)), template, int(settings.get("max_tokens", 2048)))
    clients = [member.get("fn_completions", "openai_completions") for member in members.values()]
    return Annotator(Path(annotator).stem, path, read, "openai_completions" in clients, content_hash([members, read]))


def alpaca_eval_plan(
    outputs: list[str], reference_outputs: list[dict], *, annotator: Annotator, folder: Path
) -> dict[str, int]:
    """What `alpaca_eval_score` is going to ask: {"calls", "known", "tokens_in", "tokens_out"}.

    `known` annotations are in `folder` already; an answer that equals its reference is a draw and costs nothing.
    Tokens in are the filled prompts at four characters each. Tokens out are the most that the annotator allows. Of a
    configuration with several annotators the dearest counts.
    """
    _check_outputs(reference_outputs, outputs)
    known = _known_annotations(folder, annotator)
    pairs = [
        (row["instruction"], row["output"], output)
        for row, output in zip(reference_outputs, outputs, strict=True)
        if row["output"] != output
    ]
    asked = [pair for pair in pairs if pair not in known]
    # The template once, its three gaps filled.
    tokens_in = [
        sum(math.ceil((len(template) + sum(map(len, pair))) / CHARACTERS_PER_TOKEN) for pair in asked)
        for _, template, _ in annotator.members.values()
    ]
    longest = max(tokens for _, _, tokens in annotator.members.values())
    counts = {"calls": len(asked), "known": len(pairs) - len(asked)}
    return counts | {"tokens_in": max(tokens_in), "tokens_out": longest * len(asked)}


def alpaca_eval_score(
    outputs: list[str],
    reference_outputs: list[dict],
    *,
    annotators_config: str | Path | list[dict],
    name: str,
    folder: Path,
    max_tokens: int | None = None,
    length_controlled: bool = False,
) -> pd.DataFrame:
    """AlpacaEval's win rate of `outputs` against the references, by an annotator of your choice.

    What it will cost is logged first (`alpaca_eval_cost`; `alpaca_eval_plan` knows more). Annotations are cached in
    `folder`, in full text, so that a run that was killed pays for the missing ones only. Win rates of different
    annotators cannot be compared.

    Args:
        outputs: one answer per reference, in its order.
        reference_outputs: rows of `instruction` and `output` (AlpacaEval's davinci-003 answers, say).
        annotators_config: a name that `alpaca_eval` knows, or the path of a configuration (prompt templates in it by
            absolute path). An API annotator reads its key from the environment.
        name: of the model, for the table.
        max_tokens: refuse before anything is paid for, if the estimate is above this.
        length_controlled: also the win rate that answers of the references' length would have (Dubois et al., 2024),
            by alpaca_eval's own code. The references must be AlpacaEval's, the first of them in their order; what the
            code compares with comes from the hub (tatsu-lab/alpaca_eval), before anything is paid for.

    Returns:
        One row: `model`, `win_rate` and `stderr` in percent, a draw being half a win, `n` annotations with a preference
        and `unscored` without; with `length_controlled` also `length_controlled_win_rate` and its `_stderr`.

    Raises ValueError where `alpaca_eval` is missing, answers and references do not match, or it would cost too much;
    with `length_controlled` where its data cannot be had or there are too few answers, and, after they are paid for,
    where too few of them were judged.
    """
    cost = alpaca_eval_cost(reference_outputs, outputs)
    if max_tokens is not None and cost["tokens"] > max_tokens:
        raise ValueError(
            f"about {cost['tokens']} tokens for the annotator, more than max_tokens={max_tokens}: raise it"
        )
    if length_controlled and len(outputs) < MIN_CONTROLLED:
        raise ValueError(
            f"{len(outputs)} answers are too few for the length-controlled rate, which takes {MIN_CONTROLLED}: raise "
            "--limit, or leave --length_controlled out"
        )
    evaluate, annotator = _evaluate_and_annotator()
    if length_controlled:
        _check_length_control()
    logger.warning(
        "AlpacaEval: %d annotations, about %d tokens and the annotator's prompts", cost["annotations"], cost["tokens"]
    )

    folder.mkdir(parents=True, exist_ok=True)
    instructions = [row["instruction"] for row in reference_outputs]
    try:
        with _quiet():
            board, annotations = evaluate(
                model_outputs=[
                    {"instruction": i, "output": o, "generator": name}
                    for i, o in zip(instructions, outputs, strict=True)
                ],
                reference_outputs=reference_outputs,
                annotators_config=annotators_config if isinstance(annotators_config, list) else str(annotators_config),
                name=name,
                fn_metric="get_winrate",
                sort_by="win_rate",
                precomputed_leaderboard=None,
                output_path=None,
                caching_path=str(folder / ANNOTATIONS),
                is_return_instead_of_print=True,
                # saved so often; a failure loses one chunk
                annotation_kwargs={"chunksize": ANNOTATIONS_AT_ONCE},
                Annotator=annotator,
            )
    except ImportError as error:
        needed = f"alpaca_eval or its annotator needs {error.name}, which is not installed"
        raise ValueError(f"{needed}: pip install it, then run again; finished annotations are kept") from None
    except Exception as error:
        # Of any client and parser; their words may hold texts too.
        status = f" {error.status_code}" if hasattr(error, "status_code") else ""
        raise ValueError(
            f"the annotator stopped ({type(error).__name__}{status}): check key, address and annotator, then run "
            "again; finished annotations are kept"
        ) from None
    preferences = pd.to_numeric(pd.Series([row["preference"] for row in annotations]), errors="coerce")
    row = {
        "model": name,
        "win_rate": board.loc[name, "win_rate"],
        "stderr": board.loc[name, "standard_error"],
        "n": int(preferences.notna().sum()),
        # Those the annotator said nothing readable about, and those that AlpacaEval dropped.
        "unscored": len(outputs) - int(preferences.notna().sum()),
    }
    return pd.DataFrame([row | (_length_controlled(annotations, instructions) if length_controlled else {})])


def is_alpaca_eval(instructions: list[str]) -> bool:
    """Whether these are AlpacaEval's 805 instructions in their order, which the length-controlled rate needs."""
    return content_hash(instructions) == INSTRUCTIONS


def _evaluate_and_annotator() -> tuple:
    """alpaca_eval's `evaluate`, and its annotator with a cache that can be read back.

    Raises ValueError where alpaca_eval, or what it imports, is missing.
    """
    try:
        with _quiet():
            from alpaca_eval import evaluate
            from alpaca_eval.annotators import PairwiseAnnotator
    except ImportError as error:
        # Among others pkg_resources, which setuptools 81 has dropped.
        raise ValueError(f"alpaca_eval is missing ({error.name}): pip install 'tasft[alpaca_eval]'") from error

    class CachingAnnotator(PairwiseAnnotator):
        def load_(self, path=None):
            # The cache's JSON makes integers of 1.0 and 2.0, and pandas 3 lets no draw, 1.5, in among them.
            super().load_(path)
            if self.df_annotations is not None:
                annotations = self.df_annotations.astype({self.annotation_key: float})
                # -1 stands for a judge that failed or said nothing readable: asked again by the next run.
                self.df_annotations = annotations[annotations[self.annotation_key] != self.TMP_MISSING_ANNOTATION]

    return evaluate, CachingAnnotator


def _check_length_control() -> None:
    """Fetch what it compares with; raises ValueError where that or the code cannot be had."""
    try:
        with _quiet():
            from alpaca_eval import constants
            from alpaca_eval.metrics import glm_winrate

            place = {"token": constants.DATASETS_TOKEN, "cache_dir": constants.DEFAULT_CACHE_DIR}
            glm_winrate.hf_hub_download("tatsu-lab/alpaca_eval", "df_gamed.csv", repo_type="dataset", **place)
    except ImportError as error:
        raise ValueError(f"the length-controlled rate needs {error.name}: pip install 'tasft[alpaca_eval]'") from error
    except Exception as error:  # of the hub's client, the network, the disk
        raise ValueError(
            f"tatsu-lab/alpaca_eval on the hub cannot be read ({type(error).__name__}), which the length-controlled "
            "rate needs; check the network, or leave --length_controlled out"
        ) from None


def _length_controlled(annotations: list[dict], instructions: list[str]) -> dict[str, float]:
    """Rate and standard error in percent."""
    from alpaca_eval.metrics import glm_winrate

    # It takes the position in the table for the number of the instruction.
    table = pd.DataFrame(annotations)
    table.index = pd.Index([instructions.index(instruction) for instruction in table["instruction"]])
    table = table[pd.to_numeric(table["preference"], errors="coerce").notna()].sort_index()
    few = ValueError(
        f"{len(table)} judged answers are too few or too alike for the length-controlled rate; leave "
        "--length_controlled out, or raise --limit"
    )
    if len(table) < MIN_CONTROLLED:
        raise few
    try:
        with _quiet():
            metrics = glm_winrate.get_length_controlled_winrate(
                table, save_weights_dir=None, is_add_glm_preference_inplace=False
            )
    except (ValueError, KeyError):
        raise few from None
    names = {"length_controlled_win_rate": "length_controlled_winrate"}
    names["length_controlled_stderr"] = "lc_standard_error"
    return {ours: float(metrics[theirs]) for ours, theirs in names.items()}


@contextmanager
def _quiet():
    """alpaca_eval talks to the root logger, sets its level, and logs what servers say, which may hold texts.

    What its imports warn of, nobody who runs it can mend.
    """
    root = logging.getLogger()
    level = root.level
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        root.setLevel(level)


def _known_annotations(folder: Path, annotator: Annotator) -> set[tuple[str, str, str]]:
    """(instruction, reference, answer) of those that need not be asked again."""
    try:
        rows = json.loads((folder / ANNOTATIONS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return set()
    except ValueError as error:
        raise ValueError(f"{folder / ANNOTATIONS}: not valid JSON; move it away to ask everything again") from error
    return {
        (row["instruction"], row["output_1"], row["output_2"])
        for row in rows
        if row["annotator"] in annotator.members and row["preference"] not in (None, -1)
    }


def _check_outputs(reference_outputs: list[dict], outputs: list[str]) -> None:
    if len(reference_outputs) != len(outputs):
        raise ValueError(f"{len(outputs)} answers to {len(reference_outputs)} references: give one for each, in order")
    first: dict[str, int] = {}
    for number, row in enumerate(reference_outputs, start=1):
        if not isinstance(row.get("instruction"), str) or not isinstance(row.get("output"), str):
            raise ValueError(f"reference {number} lacks instruction or output: add it")
        # AlpacaEval joins the two sides by instruction.
        if first.setdefault(row["instruction"], number) != number:
            raise ValueError(
                f"reference {number} has the instruction of reference {first[row['instruction']]}: remove one"
            )
