"""Notebook parameters and their files: typed, closed, and in step with each other."""

import re
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest
import yaml

from tasft_lib.experiments import performance, settings
from tasft_lib.experiments.settings import SHARED, UNTRAINED, UNUSED, coerce, load, resolve
from tasft_lib.storage.files import notebooks

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = notebooks()
PROFILES = settings.profiles()
FILES = [(profile, name) for profile, names in PROFILES.items() for name in names]
# They train nothing, or on rows of their own.
APART = (*UNTRAINED, "your_model", "harmful_data_filter")
CELL = 'n_unsafe: int = 3  # rows\nsizes: list[int] = [3, 2]\nflag: bool = False\nprofile: str = "smoke"'


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project with one notebook, whose profile `smoke` sets two shared parameters and one of its own."""
    monkeypatch.chdir(tmp_path)
    for name in ("params/smoke", "params/paper", "notebooks"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "params/smoke/common.yaml").write_text("profile: smoke\nn_benign: 96\nlearning_rate: 2e-4\n")
    (tmp_path / "params/smoke/toy.yaml").write_text("sizes: [20, 10]\nn_benign: 48\n")
    (tmp_path / "params/paper/common.yaml").write_text("profile: paper\n")
    cell = nbformat.v4.new_code_cell(CELL, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "notebooks/01_toy.ipynb")
    return tmp_path


def kernel(*cells: str) -> dict:
    """What a kernel holds after the parameters cell and those that follow it."""
    return {"In": ["", CELL, *cells]}


def test_later_layers_win_and_each_value_says_where_it_is_from(project, capsys):
    config = resolve("toy", kernel("# Parameters\nlora_r = 4\nflag = 'true'"))
    assert (config.n_unsafe, config.sizes, config.flag, config.lora_r) == (3, [20, 10], True, 4)
    assert (config.n_benign, config.learning_rate, config.max_length) == (48, 2e-4, 128)
    assert (config.notebook, config.profile) == ("toy", "smoke")
    printed = capsys.readouterr().out
    for name, source in (("learning_rate", "smoke/common.yaml"), ("n_benign", "smoke/toy.yaml"), ("lora_r", "given")):
        assert re.search(rf"{name} .*{source}\n", printed)
    with pytest.raises(AttributeError):
        config.n_unsafe = 5
    assert vars(load("toy", given={"lora_r": 4, "flag": True})) == vars(config)


@pytest.mark.parametrize(
    "injected, message",
    [
        ("nn = 4", "'nn' is not declared"),
        ("n_unsafe = 2.5", "n_unsafe=2.5 is not of type int"),
        ("n_unsafe = True", "n_unsafe=True is not of type int"),
        ("n_unsafe = None", "n_unsafe=None is not of type int"),
        ("learning_rate = 'fast'", "learning_rate='fast' is not of type float"),
        ("flag = 'no'", "flag='no' is not of type bool"),
        ("dtype = True", "dtype=True is not of type str"),
        ("sizes = [1, 'b']", r"sizes=\[1, 'b'\] is not of type list\[int\]"),
        ("sizes = {'a': 1}", r"sizes=\{'a': 1\} is not of type list\[int\]"),
        ("profile = 'smoek'", "no profile 'smoek'; there are paper, smoke"),
        ("profile = 'paper'", "profile paper has no notebook 'toy'"),
        ("n: int = 2\nm: int = len('a')", "write `name: type = constant`"),
    ],
)
def test_unknown_and_ill_typed_values_are_refused_in_one_line(project, injected, message):
    with pytest.raises(ValueError, match=message) as error:
        resolve("toy", kernel(injected) if "profile: " not in injected else {"In": [injected]})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("toy", "n_bening: 3", "n_bening is no parameter"),
        ("toy", "n_benign: many", "n_benign='many' is not of type int"),
        ("toy", "sizes: [a]", "is not of type"),
        ("toy", "- 1\n- 2", "holds no"),
        ("toy", "a: [1", "not valid YAML"),
        ("common", "n_unsafe: 3", "n_unsafe is no parameter"),
    ],
)
def test_a_faulty_parameter_file_is_named(project, file, text, message):
    path = project / f"params/smoke/{file}.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load("toy", "smoke")
    assert f"params/smoke/{file}.yaml: " in str(error.value) and "\n" not in str(error.value)


def test_cells_may_be_run_again_later_in_jupyterlab(project):
    names = kernel()
    resolve("toy", names)
    names["In"] += ["a_result = 5", "sizes = study.sizes()", "n_unsafe = 7"]
    names |= {"sizes": "something else by now"}
    config = resolve("toy", names)
    assert (config.sizes, config.n_unsafe) == ([20, 10], 7)
    names["In"].append(CELL.replace("False", "True"))
    assert resolve("toy", names).flag


def test_a_kernel_without_history_is_read_by_its_names(project):
    names = {"In": [""], "n_unsafe": 3, "sizes": [3, 2], "flag": True, "profile": "smoke", "lora_r": 4}
    assert vars(resolve("toy", names)) == vars(load("toy", given={"flag": True, "lora_r": 4}))


def test_lists_may_be_words_as_on_a_command_line():
    assert coerce("sizes", "20 10", list[int]) == coerce("sizes", "[20, 10]", list[int]) == [20, 10]
    assert coerce("sizes", 20, list[int]) == [20] and coerce("sizes", "", list[int]) == []
    assert coerce("cases", '[{"vocab": 3}]', list[dict]) == [{"vocab": 3}]


@pytest.mark.parametrize("by", ["files", "profile"])
def test_papermill_from_a_shell_does_what_reproduce_does(by, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    given = {"profile": "paper"}
    if by == "files":
        given = {}
        for name in ("common", "safety"):
            given |= yaml.safe_load((ROOT / f"params/paper/{name}.yaml").read_text()) or {}
    out = tmp_path / "out.ipynb"
    papermill.execute_notebook(NOTEBOOKS["safety"], out, given, prepare_only=True, progress_bar=False)
    cells = nbformat.read(out, as_version=4).cells
    setup = next(i for i, cell in enumerate(cells) if "setup" in cell.metadata.get("tags", []))
    config = resolve("safety", {"In": ["", *(cell.source for cell in cells[:setup] if cell.cell_type == "code")]})
    assert config.model == "huggyllama/llama-7b" and config.n_unsafe == 1000
    assert vars(config) == vars(load("safety", "paper"))


def test_the_project_has_notebooks_and_parameter_files():
    assert {"build_unsafe_set", "safety"} <= set(NOTEBOOKS)
    for profile in ("smoke", "mini", "local", "small", "paper"):
        assert set(PROFILES[profile]) >= {"build_unsafe_set", "safety"}
    assert set(UNUSED) <= set(NOTEBOOKS) and {n for names in UNUSED.values() for n in names} <= set(SHARED)
    named = {path for path in (ROOT / "params").glob("*/*.yaml") if path.parent.name not in ("accelerate", "engines")}
    assert named == {ROOT / f"params/{p}/{name}.yaml" for p in PROFILES for name in ("common", *PROFILES[p])}


@pytest.mark.parametrize("profile", PROFILES)
def test_common_files_name_their_profile_and_say_what_it_costs(profile):
    path = ROOT / "params" / profile / "common.yaml"
    assert yaml.safe_load(path.read_text())["profile"] == profile
    assert path.read_text().startswith("# ") and path.read_text().splitlines()[0].count("|") >= 2


@pytest.mark.parametrize("profile, name", FILES, ids=map("/".join, FILES))
def test_every_parameter_file_fits_its_notebook_and_says_what_it_costs(profile, name):
    config = load(name, profile)
    assert config.profile == profile
    if name == "performance":
        performance.check_cases(config)
    path = ROOT / "params" / profile / f"{name}.yaml"
    header = path.read_text().splitlines()[0]
    assert header.startswith("# ") and header.count("|") >= 2, "header: command | hardware, memory | time"
    # Lists are lists; only what differs is repeated.
    values = yaml.safe_load(path.read_text()) or {}
    common = yaml.safe_load((path.parent / "common.yaml").read_text())
    for key, value in values.items():
        assert isinstance(value, list) == isinstance(vars(config)[key], list), key
        assert common.get(key) != value, f"{key} is in common.yaml already"


def test_a_case_of_performance_has_the_options_of_its_benchmark():
    config = load("performance", "bench", {"head_cases": [{"vocab": 10}, {"vocb": 10}]})
    with pytest.raises(ValueError, match="head_cases, case 2: vocb is no option"):
        performance.check_cases(config)


@pytest.mark.parametrize("profile, name", FILES, ids=map("/".join, FILES))
def test_notebooks_that_share_arms_share_their_settings(profile, name):
    """`safety` finds what `build_unsafe_set` made only if both name the same arm."""
    if name in APART:
        pytest.skip("trains nothing, or on rows of its own")
    # The search chooses the weights of the mini profile's arms, and `beyond` goes on from the same rows.
    first = vars(load("build_unsafe_set", "mini" if profile in ("search", "beyond") else profile))
    other = vars(load(name, profile))
    assert {key: first[key] for key in SHARED if key in first} == {key: other[key] for key in SHARED if key in first}


@pytest.mark.parametrize("name, kind", [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("deepspeed_zero3", "DEEPSPEED")])
def test_accelerate_takes_the_launch_configurations(name, kind):
    from accelerate.commands.config.config_args import load_config_from_file

    path = ROOT / "params" / "accelerate" / f"{name}.yaml"
    assert load_config_from_file(str(path)).distributed_type.value == kind
    assert path.read_text().startswith("# ")


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
        assert cell.source.count("\n") < 25
        assert not re.search(r"^(class|def) ", cell.source, re.MULTILINE)
    for first, second in zip(notebook.cells, notebook.cells[1:], strict=False):
        assert first.cell_type == "code" or second.cell_type == "code"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_ends_with_what_it_showed_when_it_was_published(name):
    """A picture; `performance_filter`, which draws nothing, its table."""
    last = nbformat.read(NOTEBOOKS[name], as_version=4).cells[-1].source
    manifest = re.search(rf"\(\.\./figures/(\w+)/{name}_manifest\.json\)", last)
    if not (ROOT / "figures" / manifest[1] / f"{name}_manifest.json").exists():
        pytest.skip("not published yet")
    if name == "performance_filter":
        table = pd.read_csv(ROOT / f"figures/{manifest[1]}/performance_filter_memory.csv")
        assert all(f"| {row.activations:,} | {row.peak_mb:.0f} MB |" in last for row in table.itertuples())
        return
    (profile, picture) = re.search(rf"!\[[^\]]+\]\(\.\./figures/(\w+)/({name}_\w+\.png)\)", last).groups()
    assert (ROOT / "figures" / profile / picture).exists()
    assert manifest[1] == profile
