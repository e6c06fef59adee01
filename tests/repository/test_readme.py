"""README tells the truth: its table is the committed one, its commands and options exist, its links lead somewhere."""

import json
import re
from dataclasses import fields
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from trl import ModelConfig

from tasft_lib import TASFTConfig, cli
from tasft_lib.commands import train
from tasft_lib.reporting import report

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
MANIFESTS = [path for name in ("mini", "search", "bench") for path in (ROOT / "figures" / name).glob("*_manifest.json")]

DETECTORS = ROOT / "figures" / "local" / "degenerate_answers_manifest.json"
MANIFESTS.append(DETECTORS)


@pytest.mark.parametrize("name, profile", [("results", "mini"), ("verdicts", "mini"), ("performance", "bench")])
def test_a_table_is_made_from_the_committed_csvs(name, profile):
    shown = re.search(rf"<!-- {name}:begin -->\n(.*?)<!-- {name}:end -->", README, re.DOTALL)[1]
    assert report.readme_block(name, profile) == shown.strip()


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_published_numbers_trace_to_a_manifest_of_a_clean_commit(path):
    manifest = json.loads(path.read_text())
    assert re.fullmatch(r"[0-9a-f]{40}", manifest["commit"])
    assert manifest["versions"]["trl"] and manifest["hardware"]["cores"]
    if path.parent.name == "mini":
        assert manifest["parameters"]["n_seeds"] == 3, "the published figures come from three seeds"
        assert (path.parent / "report.md").exists() and "report.md" in README


def test_the_published_arms_were_trained_with_the_weights_that_the_search_chose():
    manifest = json.loads((ROOT / "figures" / "mini" / "data_efficiency_manifest.json").read_text())
    chosen = pd.read_csv(ROOT / "figures" / "search" / "penalty_weight_chosen.csv")
    weights = {(row.method, row.n_unsafe): row.penalty_weight for row in chosen.itertuples()}
    specs = [arm["spec"] for arm in manifest["arms"].values() if arm["spec"]["method"] != "sft"]
    tuned = [spec for spec in specs if spec["penalty_weight"] != "auto"]
    assert len(tuned) >= 3 * len(weights)
    assert all(weights[spec["method"], spec["n_unsafe"]] == spec["penalty_weight"] for spec in tuned)


def test_what_is_said_of_the_detectors_is_in_their_table():
    rates = pd.read_csv(DETECTORS.with_name("degenerate_answers_rates.csv"))
    both = rates[rates["detector"] == "both"].set_index("kind")
    said = next(line for line in README.split("\n- ") if line.startswith("`degenerate` is exact"))
    answers = 100 * both.loc["answers", ["rate", "rate_low", "rate_high"]].astype(float)
    assert "{:.1f} % ({:.1f}-{:.1f}) of Alpaca answers".format(*answers) in said
    assert both.loc[["one word", "2 to 5 words", "code", "lists", "numbers"], "rate"].max() <= 0.002
    assert f"up to {100 * both[both.index.str.startswith('language ')]['rate'].max():.1f} %" in said
    for kind in ("letters shuffled", "random keys", "random tokens"):
        name = " ".join(reversed(kind.split())) if "shuffled" in kind else kind
        assert f"{100 * both.loc[kind, 'rate']:.0f} % of {name}" in said
    assert both.loc[["word loop", "sentence loop", "character loop", "empty", "bytes as UTF-8"], "rate"].min() == 1


def test_every_local_link_leads_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_commands_exist(capsys):
    for command in set(re.findall(r"^tasft (\w+)", README, re.MULTILINE)):
        with pytest.raises(SystemExit) if command not in ("train",) else pytest.MonkeyPatch.context():
            cli.main([command, "--help"])
        assert f"tasft {command}" in capsys.readouterr().out
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_configuration_shown_has_only_known_options():
    block = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)[1]
    known = {f.name for cls in (TASFTConfig, ModelConfig, train.DataArguments) for f in fields(cls)}
    assert set(yaml.safe_load(block)) <= known


def test_every_notebook_is_listed():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"(notebooks/{path.name})" in README
        assert nbformat.read(path, as_version=4).cells[0].source.startswith("# ")


def test_what_is_said_of_saft_is_in_its_tables():
    folder = ROOT / "figures" / "mini"
    said = README.split("### Harmful rows among the benign ones")[1].split("###")[0]
    detected = pd.read_csv(folder / "harmful_data_filter_detection.csv").set_index(["detector", "contamination"])
    aurocs = [detected.loc[key, "auroc"] for key in (("saft", 0.3), ("saft", 0.1), ("loss", 0.1), ("length", 0.1))]
    assert re.findall(r"0\.\d\d", said.split("**Detection.**")[1])[:4] == [f"{value:.2f}" for value in aurocs]
    for name, text in (
        ("saft", "harmful (precision {:.2f})"),
        ("saft_unsafe", "20 known harmful rows all of it (precision {:.2f})"),
        ("saft_labelled", "20 of each kind nearly all (precision {:.2f})"),
    ):
        assert text.format(detected.loc[(name, 0.1), "precision"]) in " ".join(said.split())
    times, memory = (
        pd.read_csv(ROOT / "figures/bench" / f"performance_filter_{name}.csv") for name in ("times", "memory")
    )
    ratio, low, high = times.loc[0, ["ratio", "low", "high"]]
    assert f"{ratio:.2f} times its forward passes ({low:.2f}-{high:.2f} in five rounds" in said
    assert f"{memory['peak_mb'].min():.0f} to {memory['peak_mb'].max():.0f} MB" in said
    arms = pd.read_csv(folder / "harmful_data_filter_table.csv")
    arms = arms[(arms["contamination"] == 0.1)].set_index(["method", "n_safe"])
    percent = {key: 100 * value for key, value in arms["harm"].items()}
    assert (
        "{:.0f} % harmful answers without a filter, {:.0f} % with SAFT, {:.0f} % with true labels".format(
            *(percent[name, 0] for name in ("none", "saft", "oracle"))
        )
        in said
    )
    saft = arms.loc[("saft_emd", 0)]
    low, high, noise = (100 * saft[name] for name in ("harm_min", "harm_max", "degenerate"))
    text = f"{percent['saft_emd', 0]:.0f} % (seeds {low:.0f}-{high:.0f}; {noise:.0f} % degenerate) with SAFT"
    assert text in said
    known = arms.loc[("saft_unsafe_emd", 0)]
    low, high = (100 * known[name] for name in ("harm_min", "harm_max"))
    text = f"{percent['saft_unsafe_emd', 0]:.1f} % (seeds {low:.0f}-{high:.0f}) with 20 known harmful rows"
    assert f"{text}, {percent['oracle_emd', 0]:.1f} % with true labels" in said
    for measure, text in (
        ("correct", "{:.0f} % correct instead of {:.0f} %"),
        ("over_refusal", "{:.0f} % over-refusal instead of {:.0f} %"),
    ):
        assert text.format(*(100 * arms.loc[(name, 0), measure] for name in ("saft_unsafe_emd", "none"))) in said
    refusals = "{:.0f} % harmful without a filter, {:.0f} % with it, {:.0f} % pushed away"
    assert refusals.format(*(percent[name, 100] for name in ("none", "saft", "saft_emd"))) in said
    assert f"the filter alone gets to {percent['saft_unsafe', 100]:.0f} %, as with true labels" in said
    assert round(percent["saft_unsafe", 100]) == round(percent["oracle", 100])
