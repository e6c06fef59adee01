"""The `tasft` command. The work is done by the same functions that the notebooks call."""

import sys
import warnings
from importlib import import_module
from importlib.metadata import PackageNotFoundError

COMMANDS = {
    "data": "the published data sets: what is here, what is missing and how to get it",
    "model": "the base models that tasft brings: what is here; `fetch NAME` downloads one",
    "doctor": "a check of training rows before they are used: repeats, leaks, wrong labels, cut answers",
    "harvest": "unsafe answers of a model itself, judged: D_unsafe",
    "filter": "SAFT: a fine-tuning set without the rows that look harmful, and those rows",
    "train": "TRL's SFT with a penalty on the rows labelled unsafe",
    "evaluate": "answers to the harm benchmarks, judged: a results table",
    "compare": "the answers of several evaluations side by side, on one page: verdicts, search, filters",
    "capability": "lm-evaluation-harness on a model or adapter: what safety cost",
    "alpaca_eval": "AlpacaEval's win rate of a model, by a judge of your choice; its cost is told first",
    "attack": "PAIR: an attacker model tries to get harmful answers out of a target",
    "card": "a model card with what was measured; --push_to_hub uploads the model with it",
    "export": "an adapter merged into its base: a folder for vLLM, llama.cpp or transformers",
    "reproduce": "the notebooks of a profile, by papermill: figures, tables and a report (--dry-run: the arms)",
    "arm": "one arm of `tasft reproduce --write_arms`, in this process: for schedulers and for debugging",
    "status": "how far the arms in runs/ are: state, step, host, time left",
    "report": "the report of a profile again, from its tables: a verdict per claim of the paper",
    "bench": "time, memory and gradient error beside TRL's plain SFT and dense TA-SFT",
    "env": "versions and hardware, for a bug report; --runs: whether a disk is fit for runs/",
}

# What loads for seconds before it can say anything of its own.
SLOW = ("doctor", "harvest", "filter", "train", "evaluate", "capability", "alpaca_eval", "attack", "export")

# Package -> the extra that brings it.
EXTRAS = {
    "matplotlib": "notebooks",
    "seaborn": "notebooks",
    "papermill": "notebooks",
    "nbformat": "notebooks",
    "markdown_it": "notebooks",
    "openai": "serve",
    "lm_eval": "harness",
    "alpaca_eval": "alpaca_eval",
    "bitsandbytes": "quant",
    "submitit": "slurm",
}

DESCRIPTION = """\
Toxicity-avoiding supervised fine-tuning (TA-SFT, arXiv:2412.06843).

{commands}

`tasft COMMAND --help` explains each."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 when it did its work, 1 with one line on stderr when the input is at fault, 2 for usage."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(DESCRIPTION.format(commands="\n".join(f"  tasft {name:<11} {what}" for name, what in COMMANDS.items())))
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(f"tasft: no command {argv[0]!r}; there are {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    if argv[0] in SLOW and sys.stderr.isatty() and not {"-h", "--help", "--help_all"} & set(argv):
        print(f"tasft {argv[0]}: loading", file=sys.stderr, flush=True)
    if not sys.warnoptions:  # of other libraries, about what no user can do anything
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message="'pin_memory' argument is set")
    try:
        # imported when asked for: `tasft --help` must not wait for torch
        code = import_module(f"tasft_lib.commands.{argv[0]}").main(argv[1:])
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"tasft {argv[0]}: {message}", file=sys.stderr)
        return 1
    except PackageNotFoundError as error:  # transformers asks for the versions of what it may need
        print(
            f"tasft {argv[0]}: {' '.join(str(error.name).split())}; install it, or leave its option out",
            file=sys.stderr,
        )
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRAS:
            raise
        remedy = f"pip install 'tasft[{EXTRAS[package]}]'"
        print(f"tasft {argv[0]}: {package} is not installed: {remedy}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"tasft {argv[0]}: interrupted; finished work is kept, run the same command to go on.", file=sys.stderr)
        return 130
    except Exception as error:
        hub = sys.modules.get("huggingface_hub.errors")  # whoever talks to the hub has imported it
        if hub is None or not isinstance(error, hub.HTTPError):
            raise
        print(f"tasft {argv[0]}: the hub is not reached ({type(error).__name__}); check the network", file=sys.stderr)
        return 1
    return code or 0


if __name__ == "__main__":
    sys.exit(main())
