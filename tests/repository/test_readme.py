"""The READMEs tell the truth: tables are the committed ones, commands and options exist, links lead somewhere."""

import functools
import json
import re
from dataclasses import fields
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from trl import ModelConfig, ScriptArguments

from tasft_lib import TASFTConfig, cli
from tasft_lib.commands.train_options import DataArguments
from tasft_lib.reporting import report
from tasft_lib.storage import files

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("tasft_lib", "params", "figures")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(p for name in FOLDERS for p in (ROOT / name).rglob("*.md"))]
PAGES = [page for page in PAGES if page.name in ("README.md", "CONTRIBUTING.md", "which_method.md")]
README = PAGES[0].read_text()
BLOCKS = [(page, name) for page in PAGES for name in re.findall(r"<!-- (\w+):begin -->", page.read_text())]
MANIFESTS = [
    path
    for name in (
        "mini",
        "search",
        "bench",
        "pocket",
        "pocket_cpu",
        "pocket_methods",
        "pocket_gemma",
        "pocket_contrastive",
    )
    for path in (ROOT / "figures" / name).glob("*_manifest.json")
]
MANIFESTS.append(ROOT / "figures" / "local" / "degenerate_answers_manifest.json")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def test_the_first_page_is_one_page():
    words = [word for word in README.split() if word.strip("|-:")]  # a table's bars are none
    assert len(words) < 1100
    first_screen = README[: README.index("<!-- pocket:begin -->")]
    assert len(first_screen.splitlines()) < 30 and "make reproduce" in first_screen and "make test" in first_screen


@pytest.mark.parametrize("page, name", BLOCKS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_table_is_made_from_the_committed_csvs(page, name, published):
    shown = re.search(rf"<!-- {name}:begin -->\n(.*?)<!-- {name}:end -->", page.read_text(), re.DOTALL)[1]
    assert report.readme_block(name) == shown.strip()


def test_every_table_has_its_page():
    assert {name for _, name in BLOCKS} == set(report.BLOCKS)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_published_numbers_trace_to_a_manifest_of_a_clean_commit(path, published):
    manifest = json.loads(path.read_text())
    assert re.fullmatch(r"[0-9a-f]{40}", manifest["commit"])
    assert manifest["versions"]["trl"] and manifest["hardware"]["cores"]
    if path.parent.name == "mini":
        seeds = manifest["parameters"].get("n_seeds", 3)  # a notebook that trains nothing has none
        assert seeds == 3, "the published figures come from three seeds"


def test_the_published_arms_were_trained_with_the_weights_that_the_search_chose_on_their_base_model(published):
    manifest = json.loads((ROOT / "figures" / "mini" / "data_efficiency_manifest.json").read_text())
    chosen = pd.read_csv(ROOT / "figures" / "search" / "penalty_weight_chosen.csv")
    weights = {(row.model, row.method, row.n_unsafe): row.penalty_weight for row in chosen.itertuples()}
    base = manifest["base"]["spec"]
    specs = [base | arm["spec"] for arm in manifest["arms"].values()]
    specs = [spec for spec in specs if spec["method"] != "sft"]
    tuned = [spec for spec in specs if spec["penalty_weight"] != "auto"]
    assert len(tuned) >= len(weights)
    assert all(weights[spec["model"], spec["method"], spec["n_unsafe"]] == spec["penalty_weight"] for spec in tuned)


@every_page
def test_every_local_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", page.read_text()):
        path, _, heading = "".join(target).partition("#")
        if path.startswith("http"):
            continue
        there = (page.parent / path) if path else page
        assert there.exists(), f"{path} of {page}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], heading


@functools.cache
def options(verb: str) -> set[str]:
    """The options of a verb, from its help."""
    import contextlib
    import io

    if verb == "train":
        classes = (TASFTConfig, ModelConfig, ScriptArguments, DataArguments)
        known = {f.name for cls in classes for f in fields(cls)}
        return {f"--{name}" for name in known} | {"--config", "--help", "--help_all"}
    texts = []
    for kind in (["head"], ["step"], ["saft"]) if verb == "bench" else ([],):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            cli.main([verb, *kind, "--help"])
        texts.append(out.getvalue())
    return set(re.findall(r"--[a-z][\w-]*", " ".join(texts)))


@every_page
def test_commands_and_their_options_exist(page):
    text = re.sub(r"\n#.*", "", page.read_text())
    calls = re.findall(r"^tasft (\w+)(.*)$", text, re.MULTILINE) + re.findall(r"`tasft (\w+)([^`]*)`", text)
    for verb, rest in calls:
        if verb != "VERB":
            assert verb in cli.COMMANDS, verb
            assert set(re.findall(r"--[a-z][\w-]*", rest.split("#")[0])) <= options(verb), f"{verb} {rest}"
    # An option that stands alone is one of some verb.
    for option in re.findall(r"`(--[a-z][\w-]*)[^`]*`", text):
        assert any(option in options(verb) for verb in cli.COMMANDS), option
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^ *|`)make (\w+)", text, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@every_page
def test_profiles_and_notebooks_that_a_page_names_exist(page):
    text = page.read_text()
    for profile in re.findall(r"PROFILE=(\w+)|--profile (\w+)", text):
        assert (ROOT / "params" / "".join(profile)).is_dir(), profile
    assert set(re.findall(r"NB=(\w+)", text)) <= set(files.notebooks())


def test_every_verb_and_every_profile_has_its_row():
    verbs = (ROOT / "tasft_lib" / "commands" / "README.md").read_text()
    assert all(re.search(rf"^\|.*`{verb}`.*\|", verbs, re.MULTILINE) for verb in cli.COMMANDS)
    profiles = (ROOT / "params" / "README.md").read_text()
    for folder in (ROOT / "params").iterdir():
        assert folder.is_file() or f"`{folder.name}`" in profiles or f"`{folder.name}/`" in profiles


def test_every_room_and_file_of_the_package_has_its_line():
    page = (ROOT / "tasft_lib" / "README.md").read_text()
    for path in (ROOT / "tasft_lib").iterdir():
        if path.suffix == ".py" or (path / "__init__.py").exists():
            assert f"`{path.name}{'/' if path.is_dir() else ''}`" in page, path.name


@every_page
def test_the_configuration_shown_has_only_known_options(page):
    known = {option.removeprefix("--") for option in options("train")}
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
        assert set(yaml.safe_load(block)) <= known


def test_every_notebook_is_listed():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"(notebooks/{path.name})" in README
        assert nbformat.read(path, as_version=4).cells[0].source.startswith("# ")


def test_the_python_shown_trains(model, tokenizer, rows, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    name = re.search(r"TASFTTrainer\(\"(.+?)\"", code)[1]
    exec(code.replace(name, "base"), {"rows": rows})
    assert {"adapter_config.json", "config.json"} & {path.name for path in Path("safer").glob("checkpoint-*/*")}
