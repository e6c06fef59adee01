"""Notebook parameters and their files: typed, closed, and in step with each other."""

import re
from pathlib import Path

import nbformat
import pytest
import yaml

from tasft_lib.experiments import reproduce
from tasft_lib.experiments.settings import check_file, resolve
from tasft_lib.files import notebooks

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = notebooks()
FILES = sorted(path for path in (ROOT / "params").glob("*/*.yaml") if path.parent.name != "accelerate")
# They train nothing, or on rows of their own.
APART = ("method", *reproduce.TIMED, "degenerate_answers", "your_model", "harmful_data_filter")
ARMS = [path for path in FILES if path.stem not in APART]


def namespace(injected: str = "") -> dict:
    """What a kernel holds after the parameters cell and papermill's injected cell."""
    names = {"In": [], "Out": {}}
    exec("n: int = 3\nrate: float = 0.5\nname: str = 'a'\nflag: bool = False\n" + injected, names)
    return names


def test_values_are_brought_to_their_declared_types_and_frozen(capsys):
    resolved = resolve(namespace("n = 4.0\nrate = '2e-4'\nflag = 'true'\nname = 7"))
    assert vars(resolved) == {"n": 4, "rate": 2e-4, "flag": True, "name": "7"}
    assert re.search(r"rate\s+0\.0002", capsys.readouterr().out)
    with pytest.raises(AttributeError):
        resolved.n = 5


@pytest.mark.parametrize(
    "injected, message",
    [
        ("nn = 4", "'nn' is not declared"),
        ("n = 2.5", "n=2.5 is not of type int"),
        ("n = True", "n=True is not of type int"),
        ("rate = 'fast'", "rate='fast' is not of type float"),
        ("flag = 'no'", "flag='no' is not of type bool"),
        ("name = True", "name=True is not of type str"),
        ("n = None", "n=None is not of type int"),
    ],
)
def test_unknown_and_ill_typed_values_are_refused_in_one_line(injected, message):
    with pytest.raises(ValueError, match=message) as error:
        resolve(namespace(injected))
    assert "\n" not in str(error.value)


def test_the_cell_may_be_run_again_later_in_jupyterlab():
    names = namespace()
    resolve(names)
    names["a_result"] = 5
    resolve(names)


def test_the_projects_have_notebooks_and_parameter_files():
    assert {"build_unsafe_set", "safety"} <= set(NOTEBOOKS)
    for profile in ("smoke", "mini", "local", "small", "paper"):
        assert {path.stem for path in FILES if path.parent.name == profile} >= {"build_unsafe_set", "safety"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_parameter_file_fits_its_notebook_and_says_what_it_costs(path):
    values = check_file(path, NOTEBOOKS[path.stem])
    assert values.get("profile") == path.parent.name
    header = path.read_text().splitlines()[0]
    assert header.startswith("# ") and header.count("|") >= 2, "header: command | hardware, memory | time"


@pytest.mark.parametrize("path", ARMS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_notebooks_that_share_arms_share_their_settings(path):
    """`safety` finds what `build_unsafe_set` made only if both name the same arm."""
    # The search is the mini profile's: it chooses the weights of those very arms.
    profile = "mini" if path.parent.name == "search" else path.parent.name
    first = yaml.safe_load((ROOT / "params" / profile / "build_unsafe_set.yaml").read_text())
    other = yaml.safe_load(path.read_text()) | {"profile": profile}
    defaults = [declared_values(NOTEBOOKS[name]) for name in ("build_unsafe_set", path.stem)]
    settings = [defaults[0] | first, defaults[1] | other]
    assert settings[0] == {name: settings[1][name] for name in settings[0]}


@pytest.mark.parametrize("name, kind", [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("deepspeed_zero3", "DEEPSPEED")])
def test_accelerate_takes_the_launch_configurations(name, kind):
    from accelerate.commands.config.config_args import load_config_from_file

    path = ROOT / "params" / "accelerate" / f"{name}.yaml"
    assert load_config_from_file(str(path)).distributed_type.value == kind
    assert path.read_text().startswith("# ")


def declared_values(notebook: Path) -> dict:
    cells = nbformat.read(notebook, as_version=4).cells
    names: dict = {}
    exec(next(c.source for c in cells if "parameters" in c.metadata.get("tags", [])), names)
    return {name: names[name] for name in names["__annotations__"]}


@pytest.mark.parametrize(
    "text, message",
    [
        ("n_bening: 3", "n_bening is no parameter"),
        ("n_benign: many", "n_benign='many' is not of type int"),
        ("- 1\n- 2", "holds no"),
        ("a: [1", "not valid YAML"),
    ],
)
def test_a_faulty_parameter_file_is_named(text, message, tmp_path):
    path = tmp_path / "safety.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        check_file(path, NOTEBOOKS["safety"])
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_yaml_may_write_2e_4_though_yaml_reads_text(tmp_path):
    path = tmp_path / "safety.yaml"
    path.write_text("learning_rate: 2e-4")
    assert check_file(path, NOTEBOOKS["safety"]) == {"learning_rate": "2e-4"}


@pytest.mark.parametrize("path", NOTEBOOKS.values(), ids=NOTEBOOKS)
def test_notebook_contract(path):
    """Prose between short cells, logic in the library, no stored outputs, one kernel name."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    assert "What this shows, and what it doesn't" in notebook.cells[-1].source
    for cell in code:
        assert not cell.outputs and cell.execution_count is None
        assert "parameters" in cell.metadata.get("tags", []) or cell.source.count("\n") < 25
        assert not re.search(r"^(class|def) ", cell.source, re.MULTILINE)
    for first, second in zip(notebook.cells, notebook.cells[1:], strict=False):
        assert first.cell_type == "code" or second.cell_type == "code"
