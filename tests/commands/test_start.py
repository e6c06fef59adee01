"""A command says what it can before it imports what takes seconds."""

import dataclasses
import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest
from huggingface_hub.errors import HTTPError
from trl import SFTConfig

from tasft_lib import cli
from tasft_lib.commands.train_options import HELP
from tasft_lib.config import TASFTConfig

PROGRAM = """
import json, sys
from tasft_lib import cli
codes = []
for argv in json.loads(sys.argv[1]):
    try:
        codes.append(cli.main(argv))
    except SystemExit as exit:
        codes.append(exit.code)
print()
print(json.dumps([codes, sorted({name.split(".")[0] for name in sys.modules})]))
"""


def run(*commands):
    """Exit codes of commands in one new process, what it wrote to stderr, and the packages it has imported."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    return *json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_help_imports_nothing_that_takes_seconds():
    codes, packages, _ = run(*([name, "--help"] for name in cli.COMMANDS))
    assert codes == [0] * len(cli.COMMANDS)
    assert not {"torch", "transformers", "trl", "datasets", "pandas"} & set(packages)


def test_a_wrong_path_is_told_before_anything_slow_is_imported(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    (tmp_path / "broken.yaml").write_text("a: b\nc: [hf_canary77\n")
    (tmp_path / "train.yaml").write_text("dataset_name: gone.csv\nmodel_name_or_path: base\n")
    (tmp_path / "model.yaml").write_text(f"dataset_name: {rows}\nmodel_name_or_path: base\n")
    model, out = ["--model", "/nowhere"], ["--output_dir", str(tmp_path / "out")]
    commands = {
        "nowhere.yaml: no such file": ["train", "--config", "nowhere.yaml"],
        "line 3: no valid YAML": ["train", "--config", str(tmp_path / "broken.yaml")],
        "gone.csv: no such file": ["train", "--config", str(tmp_path / "train.yaml")],
        "missing.jsonl: no such file": ["train", "--dataset-name", "missing.jsonl", "--model_name_or_path", "base"],
        "base: no such folder": ["train", "--config", str(tmp_path / "model.yaml")],
        "prompts.json: no such file": [
            *("train", "--config", str(tmp_path / "model.yaml")),
            *("--evaluation_prompts", str(rows), "prompts.json", "--seed", "1"),
        ],
        "evaluate: /nowhere: no such folder": ["evaluate", *model, *out],
        "harvest: /nowhere: no such folder": ["harvest", *model, *out, "--prompts", "stl"],
        "capability: /nowhere: no such folder": ["capability", *model, *out],
        "filter: /nowhere: no such folder": ["filter", str(rows), *model, *out, "--contamination", "0.1"],
        "gone.parquet: no such file": ["filter", "gone.parquet", *model, *out, "--contamination", "0.1"],
        "doctor: gone/rows.json: no such file": ["doctor", "gone/rows.json"],
        "export: /nowhere: no such folder": ["export", *model, *out],
        "compare: gone: no such file or folder": ["compare", "gone", "--output_file", "page.html"],
    }
    codes, packages, errors = run(*commands.values())
    assert codes == [1] * len(commands)
    lines = errors.strip().splitlines()
    assert len(lines) == len(commands) and "canary77" not in errors
    for message, line in zip(commands, lines, strict=True):
        assert message in line
    assert not {"torch", "transformers", "trl", "datasets", "pandas"} & set(packages)


def test_a_flag_that_is_true_or_false_says_so(capsys):
    filter_rows = ["filter", "rows.jsonl", "--model", "m", "--output_dir", "o", "--contamination", "0.1"]
    with pytest.raises(SystemExit) as usage:
        cli.main([*filter_rows, "--drop_empty", "maybe"])
    assert usage.value.code == 2
    assert capsys.readouterr().err.endswith("argument --drop_empty: 'maybe': give true or false\n")


def test_training_and_the_method_load_no_plotting_and_no_statistics():
    codes, packages, _ = run(["train", "--help_all"])  # imports tasft_lib.trainer and all that it needs
    assert codes == [0] and "trl" in packages
    assert not {"matplotlib", "seaborn", "statsmodels", "sklearn", "papermill", "IPython"} & set(packages)


def own_options():
    inherited = {option.name for option in dataclasses.fields(SFTConfig)}
    return [option for option in dataclasses.fields(TASFTConfig) if option.name not in inherited]


@pytest.mark.parametrize("option", own_options(), ids=lambda option: option.name)
def test_help_names_every_option_of_the_penalty(option):
    """It is written by hand, because reading the options from `TASFTConfig` imports TRL."""
    (line,) = (line for line in HELP.splitlines() if line.split()[:1] == [f"--{option.name}"])
    choices = option.metadata.get("choices")
    assert line.split()[1:] == (["|".join(choices)] if choices else [])


def test_a_package_of_an_extra_is_named_with_the_extra(capsys, monkeypatch):
    def main(argv):
        raise ModuleNotFoundError("No module named 'seaborn'", name="seaborn")

    monkeypatch.setattr("tasft_lib.commands.report.main", main)
    assert cli.main(["report"]) == 1
    assert capsys.readouterr().err == "tasft report: seaborn is not installed: pip install 'tasft[notebooks]'\n"


def test_a_package_that_another_library_asks_for_is_one_line(capsys, monkeypatch):
    def main(argv):
        raise PackageNotFoundError("The 'deepspeed>=0.9.3' distribution was not found. \n Try: pip install")

    monkeypatch.setattr("tasft_lib.commands.report.main", main)
    assert cli.main(["report"]) == 1
    error = capsys.readouterr().err
    assert "deepspeed>=0.9.3" in error and "install it, or leave" in error and error.count("\n") == 1


def test_a_hub_that_is_not_reached_is_one_line_and_an_error_of_ours_is_not_swallowed(capsys, monkeypatch):
    class ConnectError(HTTPError):
        pass

    def fail(error):
        def main(argv):
            raise error

        monkeypatch.setattr("tasft_lib.commands.report.main", main)
        return cli.main(["report"])

    assert fail(ConnectError("[Errno 111] Connection refused")) == 1
    assert capsys.readouterr().err == "tasft report: the hub is not reached (ConnectError); check the network\n"
    with pytest.raises(RuntimeError, match="ours"):
        fail(RuntimeError("ours"))


def test_a_slow_command_says_on_a_terminal_that_it_is_loading(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert cli.main(["doctor", "nowhere.json"]) == 1
    assert capsys.readouterr().err.splitlines()[0] == "tasft doctor: loading"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert cli.main(["doctor", "nowhere.json"]) == 1 and "loading" not in capsys.readouterr().err


def test_warnings_of_other_libraries_do_not_open_a_run():
    import warnings

    with warnings.catch_warnings(record=True) as seen:
        warnings.resetwarnings()
        cli.main(["doctor", "nowhere.json"])
        warnings.warn("an option of theirs is old", FutureWarning, stacklevel=1)
        warnings.warn("a warning of ours", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["a warning of ours"]
