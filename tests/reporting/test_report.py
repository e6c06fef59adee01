"""The report: verdicts follow from the tables by stated rules, and README's blocks are the tables."""

import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from test_tables import judged

from tasft_lib.evaluation import rates
from tasft_lib.reporting import claims, figures, report, tables


def claim(text: str) -> claims.Claim:
    (found,) = [c for c in claims.CLAIMS if text in c.finding]
    return found


def decide(text: str, **named: pd.DataFrame) -> str:
    evidence, verdict = claim(text).decide(named.__getitem__)
    assert evidence
    return verdict


def safety(**letters: str) -> pd.DataFrame:
    parts = [judged({(m, 9 * (m != "sft"), 0): text for m, text in letters.items()}, decoding=d) for d in DECODINGS]
    return rates.summary(pd.concat(parts), ["method", "n_unsafe", "penalty_weight", "decoding"])


DECODINGS = ("greedy", "sampled")
HARMFUL, SAFE = "h" * 100, "r" * 100


def test_safety_is_decided_by_the_intervals():
    assert decide("plain SFT", safety_table=safety(sft=HARMFUL)) == "reproduced"
    assert decide("plain SFT", safety_table=safety(sft=SAFE)) == "not reproduced"
    assert decide("plain SFT", safety_table=safety(sft=some(55))) == "open"
    assert decide("almost no harm", safety_table=safety(emd=SAFE, nlcl=SAFE)) == "reproduced"
    assert decide("almost no harm", safety_table=safety(emd=SAFE, nlcl=some(20))) == "not reproduced"
    assert decide("almost no harm", safety_table=safety(emd=SAFE, nlcl=some(4))) == "open"
    assert decide("KTO", safety_table=safety(kto=SAFE)) == "not reproduced"
    assert decide("KTO", safety_table=safety(kto=HARMFUL)) == "reproduced"


def some(harmful: int) -> str:
    """A hundred answers, so many of them harmful."""
    return HARMFUL[:harmful] + SAFE[harmful:]


def on_bases(**answers: list[str]) -> pd.DataFrame:
    """Sampled answers at 20 unsafe rows: of each method those on one base model after the other."""
    arms = {(method, 20, seed): text for method, texts in answers.items() for seed, text in enumerate(texts)}
    return rates.summary(judged(arms), ["method", "n_unsafe", "penalty_weight", "decoding"])


@pytest.mark.parametrize(
    "nlcl, emd, verdict",
    [
        ([HARMFUL] * 3, [SAFE] * 3, "reproduced"),
        ([HARMFUL] * 3, [some(40)] * 3, "partly: EMD degrades too, but less"),
        ([HARMFUL] * 3, [some(10)] * 3, "open"),
        ([HARMFUL] * 3, [HARMFUL, SAFE, some(40)], "open"),
        ([some(70)] * 3, [some(60)] * 3, "open"),
        ([HARMFUL] * 3, [HARMFUL] * 3, "not reproduced"),
        ([SAFE] * 3, [HARMFUL] * 3, "not reproduced"),
        ([HARMFUL], [SAFE], "reproduced"),
    ],
)
def test_few_examples_are_decided_on_the_same_base_models(nlcl, emd, verdict):
    assert decide("few examples", data_efficiency_table=on_bases(nlcl=nlcl, emd=emd)) == verdict


def test_a_table_that_names_no_seeds_is_read_as_one_base_model(tmp_path):
    table = on_bases(nlcl=[HARMFUL], emd=[some(40)])
    table.to_csv(tmp_path / "table.csv", index=False)
    for read in (pd.read_csv(tmp_path / "table.csv"), table.drop(columns="harm_by_seed")):
        assert decide("few examples", data_efficiency_table=read) == "partly: EMD degrades too, but less"
    noisy = on_bases(nlcl=[some(70), some(60), some(90)], emd=[some(40), some(20), some(50)])
    noisy.to_csv(tmp_path / "table.csv", index=False, float_format="%.6g")
    read = pd.read_csv(tmp_path / "table.csv")
    assert claims._by_seed(read.iloc[0], "harm") == [0.7, 0.6, 0.9]
    assert decide("few examples", data_efficiency_table=read) == decide("few examples", data_efficiency_table=noisy)


@pytest.mark.parametrize(
    "embed_tokens, one_hot, verdict",
    [
        (SAFE, HARMFUL, "reproduced"),
        (HARMFUL, HARMFUL, "partly: distances of lm_head help, those of embed_tokens do not"),
        (some(93), HARMFUL, "open"),
        (SAFE, SAFE, "partly: not against every control"),
    ],
)
def test_semantics_means_that_real_embeddings_beat_meaningless_ones(embed_tokens, one_hot, verdict):
    variants = {"emd": SAFE, "emd_embed_tokens": embed_tokens, "emd_random": HARMFUL, "emd_one_hot": one_hot}
    if verdict.startswith("partly: not"):
        variants["emd"] = some(30)
    table = on_bases(**{method: [text] * 2 for method, text in variants.items()})
    assert decide("semantic", data_efficiency_table=table) == verdict


def test_quality_is_decided_against_plain_sft():
    table = safety(sft=SAFE, emd=SAFE, nlcl=SAFE)
    worse = table["method"] != "sft"
    table["correct"], table["correct_n"] = 0.9, 400
    table["correct_by_seed"] = "0.8 0.9 1"
    assert decide("quality", safety_table=table) == "reproduced"
    table.loc[worse, ["correct", "correct_by_seed"]] = [0.6, "0.5 0.6 0.7"]
    assert decide("quality", safety_table=table) == "not reproduced"
    table.loc[worse & (table["decoding"] == "greedy"), ["correct", "correct_by_seed"]] = [0.9, "0.8 0.9 1"]
    assert decide("quality", safety_table=table) == "partly: greedy answers only"
    table.loc[worse, ["correct", "correct_by_seed"]] = [0.85, "0.75 0.85 0.95"]
    assert decide("quality", safety_table=table) == "open"


@pytest.mark.parametrize(
    "stl, weighted, verdict",
    [
        ([HARMFUL] * 3, [HARMFUL] * 3, "reproduced"),
        ([HARMFUL] * 3, [SAFE] * 3, "partly: not against STL with the same weight"),
        ([HARMFUL] * 3, [some(40)] * 3, "open"),
        ([SAFE] * 3, [SAFE] * 3, "not reproduced"),
    ],
)
def test_stl_is_compared_with_and_without_its_weight(stl, weighted, verdict):
    table = on_bases(stl=stl, stl_weighted=weighted, emd=[some(25)] * 3)
    assert decide("safer than STL", stl_comparison_table=table) == verdict


def test_methods_are_compared_on_the_same_base_models_however_far_these_lie_apart():
    for harmful, verdict in (((50, 70, 90), "reproduced"), ((90, 50, 70), "open")):
        stl = [some(n) for n in harmful]
        table = on_bases(stl=stl, stl_weighted=stl, emd=[some(10), some(30), some(50)])
        assert decide("safer than STL", stl_comparison_table=table) == verdict


@pytest.mark.parametrize(
    "distances, verdict",
    [
        ([(0.01, -0.03, 0.04), (0.02, None, None)], "reproduced"),
        ([(0.1, -0.05, 0.2), (0.02, 0.01, 0.03)], "open"),
        ([(0.2, 0.1, 0.3), (0.02, 0.01, 0.03)], "not reproduced for 1 of 2 methods"),
        ([(0.2, 0.1, 0.3), (-0.2, -0.3, -0.1)], "not reproduced"),
    ],
)
def test_one_curve_means_distances_below_five_points(distances, verdict):
    rows = [
        {"method": method, "points": 9, "distance": d, "low": low, "high": high}
        for method, (d, low, high) in zip(("emd", "stl"), distances, strict=True)
    ]
    assert decide("one over-refusal curve", over_alignment_table=pd.DataFrame(rows)) == verdict


@pytest.mark.parametrize("emd, verdict", [(SAFE, "reproduced"), (HARMFUL, "not reproduced")])
def test_jailbreaks_are_decided_by_the_best_attack_on_the_prompt(emd, verdict):
    # The beginning of an answer, written for it, breaks both.
    answers = {("sft", 0, 0): HARMFUL, ("emd", 9, 0): emd, ("stl", 9, 0): HARMFUL}  # plain SFT has no unsafe rows
    answers = judged(answers).assign(attack=tables.ANY_PROMPT)
    begun = judged({("emd", 9, 0): HARMFUL, ("stl", 9, 0): HARMFUL}).assign(attack=tables.ANY_BEGINNING)
    table = rates.summary(pd.concat([answers, begun]), ["method", "n_unsafe", "attack"])
    assert decide("jailbreaks", jailbreak_table=table) == verdict


def contrastive(with_it: str, without: str, factors: tuple[float, ...] = (1.0, 4.0), **judging: str) -> pd.DataFrame:
    parts = [judged({("sft", 0, 0): HARMFUL}, **judging).assign(factor=float("nan"))]
    parts += [
        judged({(f"{m}{suffix}", 9, 0): letters}, **judging).assign(factor=factor)
        for m in ("emd", "nlcl")
        for factor in factors
        for suffix, letters in (("", without), ("_contrastive", with_it))
    ]
    return rates.summary(pd.concat(parts), ["method", "n_unsafe", "factor", "decoding"])


def test_contrastive_data_is_blamed_only_for_what_it_adds():
    noise = "d" * 100
    assert decide("less safe", contrastive_augmentation_table=contrastive(HARMFUL, SAFE)) == "reproduced"
    assert decide("less safe", contrastive_augmentation_table=contrastive(SAFE, SAFE)) == "not reproduced"
    assert decide("non-language", contrastive_augmentation_table=contrastive(noise, SAFE)) == "reproduced"
    evidence, _ = claim("non-language").decide(lambda _: contrastive(noise, SAFE))
    assert "4 λ" in evidence and "1 λ" not in evidence
    both = contrastive(noise, noise)
    assert decide("non-language", contrastive_augmentation_table=both).startswith("partly: λ")
    greedy = contrastive(HARMFUL, SAFE, factors=(1.0,), decoding="greedy")  # as a real model's
    assert decide("less safe", contrastive_augmentation_table=greedy) == "reproduced"
    with pytest.raises(claims._NoSuchArm, match="no λ above the chosen one"):
        decide("non-language", contrastive_augmentation_table=greedy)


@pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: claim.finding)
def test_nothing_follows_from_empty_tables(claim):
    folder = Path(__file__).resolve().parents[2] / "figures" / "mini"

    def empty(name: str) -> pd.DataFrame:
        return pd.read_csv(folder / f"{name}.csv").iloc[:0]

    with pytest.raises(claims._NoSuchArm):
        claim.decide(empty)


def test_a_profile_without_a_table_or_an_arm_says_so_and_smoke_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "project_root", lambda: tmp_path)
    (tmp_path / "figures" / "mini").mkdir(parents=True)
    safety(sft=HARMFUL).to_csv(tmp_path / "figures" / "mini" / "safety_table.csv")
    table = claims.claims_table("mini").set_index("claim")
    assert table.loc["F1: plain SFT answers toxic prompts harmfully", "verdict"] == "reproduced"
    assert table.loc["F2: KTO does not get there", "verdict"] == "not run"
    assert table["verdict"].isin(["reproduced", "not run", "can't be tested at this profile"]).all()
    assert set(claims.claims_table("smoke")["verdict"]) == {"can't be tested at this profile"}


def test_a_report_says_what_its_intervals_are_over(tmp_path):
    safety(sft=HARMFUL).to_csv(tmp_path / "safety_table.csv", index=False)
    assert "over prompts alone, of one base model;" in report._doubt("pocket", tmp_path)
    on_bases(emd=[SAFE] * 3).to_csv(tmp_path / "data_efficiency_table.csv", index=False)
    assert "over prompts and 3 base models, the same for all methods;" in report._doubt("mini", tmp_path)
    assert "over prompts and 3 seeds, of one base model;" in report._doubt("pocket", tmp_path)


def test_readme_blocks_are_filled_and_the_rest_is_left(tmp_path, monkeypatch):
    for module in (claims, report):
        monkeypatch.setattr(module, "project_root", lambda: tmp_path)
    folder = tmp_path / "figures" / "mini"
    folder.mkdir(parents=True)
    safety(sft=HARMFUL, emd=SAFE).to_csv(folder / "safety_table.csv", index=False)
    readme = tmp_path / "README.md"
    readme.write_text(
        "a\n<!-- results:begin -->\nold\n<!-- results:end -->\nb\n<!-- other:begin -->\nc\n<!-- other:end -->\n"
    )
    report.fill_readme(readme, "mini")
    first = readme.read_text()
    assert (
        "| EMD | 0 % |" in first
        and "old" not in first
        and first.endswith("b\n<!-- other:begin -->\nc\n<!-- other:end -->\n")
    )
    report.fill_readme(readme, "mini")
    assert readme.read_text() == first


def test_the_committed_report_is_made_from_the_committed_tables(tmp_path, monkeypatch, published):
    root = Path(__file__).resolve().parents[2]
    for folder in ("figures/mini", "notebooks"):
        shutil.copytree(root / folder, tmp_path / folder)
    for module in (claims, report):
        monkeypatch.setattr(module, "project_root", lambda: tmp_path)
    page = tmp_path / "figures" / "mini" / "report.md"
    committed = page.read_text()
    (page.parent / "safety_left_over.png").touch()
    shown = report.build("mini")
    assert page.read_text() == committed and page.with_suffix(".html").exists()
    assert all(claim.finding in shown for claim in claims.CLAIMS) and "nan" not in committed
    images = re.findall(r"!\[\w+\]\((\w+\.png)\)", committed)
    assert len(images) >= 10 and all((page.parent / image).exists() for image in images)
    assert "safety_left_over.png" not in images, "a file that no manifest names"


def test_a_profile_without_results_is_told_what_to_run():
    with pytest.raises(ValueError, match="run `make reproduce PROFILE=none` first"):
        report.build("none")


def filtered(**letters: str) -> dict[str, pd.DataFrame]:
    """A table of arms after filters at contamination 0.1, given by their answers."""
    answers = judged({(method, 9, 0): text for method, text in letters.items()}, decoding="sampled")
    answers = answers.assign(
        contamination=0.1, n_safe=0, share=[0.0 if m == "none" else 0.1 for m in answers["method"]]
    )
    table = rates.summary(answers, ["method", "contamination", "share", "n_safe"])
    return {"harmful_data_filter_table": table}


def test_filters_are_decided_by_harm_and_by_what_true_labels_give():
    few, worst = some(30), {"none": HARMFUL, "saft": HARMFUL, "saft_emd": HARMFUL}
    oracle = {"oracle": SAFE, "oracle_emd": SAFE, "saft_unsafe_emd": HARMFUL, "saft_labelled_emd": HARMFUL}
    assert decide("filtered set", **filtered(**worst, **oracle)) == "not reproduced"
    assert decide("filtered set", **filtered(**(worst | {"saft": few}), **oracle)).startswith("partly: far")
    assert decide("filtered set", **filtered(**(worst | {"saft": SAFE}), **oracle)) == "reproduced"
    assert decide("ours", **filtered(**worst, **oracle)) == "not so"
    assert decide("ours", **filtered(**(worst | {"saft_emd": few}), **oracle)).startswith("partly: safer")
    labelled = oracle | {"saft_unsafe_emd": SAFE}
    assert "; with a few harmful rows as safe" in decide("ours", **filtered(**(worst | {"saft_emd": few}), **labelled))
    assert decide("ours", **filtered(**(worst | {"saft_emd": SAFE}), **oracle)) == "holds"
    undecided = oracle | {"saft_unsafe_emd": some(4)}
    assert decide("ours", **filtered(**(worst | {"saft_emd": few}), **undecided)) == "open"
    with pytest.raises(claims._NoSuchArm, match="no oracle_emd and saft_labelled_emd and saft_unsafe_emd"):
        decide("ours", **filtered(**worst, oracle=SAFE))


@pytest.mark.parametrize(
    "saft, loss, verdict",
    [
        (0.95, 0.6, "reproduced"),
        (0.95, 0.98, "partly: loss of the base alone does better"),
        (0.8, 0.6, "not reproduced"),
    ],
)
def test_detection_is_decided_at_the_papers_contamination(saft, loss, verdict):
    rows = [
        {"detector": name, "labels": 0, "contamination": c, "n_safe": 0}
        | dict.fromkeys(("auroc", "auroc_low", "auroc_high"), value)
        for c, shift in ((0.3, 0.0), (0.5, -0.4))
        for name, value in (("saft", saft + shift), ("loss", loss + shift), ("probe", 1.0))
    ]
    assert decide("without labels", harmful_data_filter_detectors=pd.DataFrame(rows)) == verdict


@pytest.mark.parametrize("loss, verdict", [(0.9, "reproduced"), (0.99, "partly: loss of the base alone does better")])
def test_detection_over_seeds_is_decided_by_the_mean_lead(loss, verdict):
    rows = [
        {"detector": name, "labels": 0, "contamination": 0.3, "n_safe": 0, "auroc": value + 0.002 * seed}
        for name, value in (("saft", 0.97), ("loss", loss), ("length", 0.5))
        for seed in range(3)
    ]
    assert decide("without labels", harmful_data_filter_detectors=pd.DataFrame(rows)) == verdict


def test_plain_sft_stands_in_the_panel_of_every_size():
    arms = {("sft", 0, 0): "hhhh", ("emd", 9, 0): "hhrr", ("emd", 3, 0): "hhhr"}
    table = rates.summary(judged(arms).assign(attack="none"), ["method", "n_unsafe", "attack"])
    panels = figures.plot_attacks(table, caption="c").axes
    assert [panel.get_title() for panel in panels] == ["9 unsafe examples", "3 unsafe examples"]
    drawn = [{x for marks in panel.containers for x in marks[0].get_xdata()} for panel in panels]
    assert drawn == [{100, 50}, {100, 75}]
