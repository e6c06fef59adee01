"""The audit of a judge: a blind draw that grows, labels that are never lost, estimates that are right on average."""

import html
import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import chi2

from tasft_lib.experiments import audit_answers, designs, settings
from tasft_lib.experiments.audit_answers import Card, Errors, Session, draw, labels, strata
from tasft_lib.experiments.study import Study
from tasft_lib.reporting import figures

SHARES = {"harmful": 0.8, "refusal": 0.1, "safe": 0.3}  # of each verdict's answers, those that are harmful


def judged_answers(n: int = 200, *, seed: int = 0, shares: dict[str, float] = SHARES) -> pd.DataFrame:
    """Answers of two arms; the judge errs on both alike, `truth` says whether an answer is harmful."""
    rng = np.random.default_rng(seed)
    tables = []
    for method, frequencies in (("sft", (0.7, 0.1, 0.2)), ("emd", (0.1, 0.7, 0.2))):
        verdict = rng.choice(list(shares), size=n, p=frequencies)
        responses = [f"answer {seed} {method} {i}" for i in range(n)]
        table = pd.DataFrame({"method": method, "n_unsafe": 0, "seed": 0, "prompt": "<i>p</i>", "response": responses})
        truth = rng.random(n) < np.vectorize(shares.get)(verdict)
        tables.append(table.assign(verdict=verdict, kind="toxic", truth=truth))
    return pd.concat(tables, ignore_index=True)


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("TASFT_RUNS", str(tmp_path))
    return tmp_path


def test_trials_of_trade_off_are_audited_by_their_lines():
    line = {"name": "nlcl_first_4", "method": "nlcl", "penalty_first_tokens": 4, "strengths": [6, 8]}
    given = {"methods": [], "tried": [line], "sizes": [20], "n_seeds": 2}
    arms = designs.audit_answers(Study(settings.load("audit_answers", "smoke", given)))
    assert [(arm.display_name, arm.seed) for arm in arms[:2]] == [("sft", 0), ("sft", 1)]
    expected = [("nlcl_first_4", 20, weight, seed) for seed in (0, 1) for weight in (6.0, 8.0)]
    assert [(arm.display_name, arm.n_unsafe, arm.penalty_weight, arm.seed) for arm in arms[2:]] == expected
    assert {arm.training["penalty_first_tokens"] for arm in arms[2:]} == {4}


def test_a_larger_draw_adds_to_a_smaller_one_whatever_the_order_of_the_answers():
    judged = judged_answers()
    judged.loc[0, "verdict"] = "unscored"
    small, large = draw(judged, 20, 0), draw(judged.sample(frac=1, random_state=1), 30, 0)
    assert small.groupby("verdict")["drawn"].sum().tolist() == [20] * 3 and len(small) == len(judged) - 1
    keys = [table.loc[table["drawn"], "key"].tolist() for table in (small, large)]
    assert set(keys[0]) < set(keys[1]) and [key for key in keys[1] if key in keys[0]] == keys[0]
    assert draw(judged, 20, 1)["key"].tolist() != small["key"].tolist()
    # A verdict's place in the order says nothing: each is everywhere in it.
    places = np.arange(len(small))
    assert small.groupby("verdict")["drawn"].apply(lambda d: places[d.index].mean()).between(150, 250).all()


def test_a_text_that_two_arms_gave_is_shown_once_and_counts_twice(runs):
    judged = judged_answers(4).assign(response=["a b", "a b", "c", "d", "a b", "e", "f", "g"], verdict="harmful")
    table = draw(judged, 8, 0)
    session = Session(table, runs / "me.jsonl")
    assert len(session.items) == 6
    while session.remaining:
        session.label("harmful" if session.items[session.place][2] == "a b" else "safe")
    assert strata(table, session.verdicts)[["answers", "labelled", "harmful"]].values.tolist() == [[8, 8, 3]]


def test_labels_are_on_disk_at_once_and_a_session_goes_on(runs):
    table = draw(judged_answers(), 3, 0)
    file = audit_answers.label_file("me")
    session = Session(table, file)
    for verdict in ("harmful", "safe"):
        session.label(verdict)
        assert len(labels(file)) == len(session.verdicts)
    session.back()
    session.label("unscored")
    assert session.place == 2 and len(file.read_text().splitlines()) == 3
    with file.open("a") as stream:
        stream.write('{"key": "torn')
    again = Session(table, file)
    assert again.place == 2 and again.remaining == 7
    assert list(again.verdicts.values()) == ["harmful", "unscored"]
    again.label("refusal")
    assert len(labels(file)) == 3
    records = [json.loads(line) for line in file.read_text().splitlines() if "torn" not in line]
    assert all(set(record) == {"key", "verdict", "crc32"} for record in records), (
        "no text, no arm, no verdict of others"
    )
    for name in ("../me", "", "a b"):
        with pytest.raises(ValueError, match="give letters"):
            audit_answers.label_file(name)


def test_the_card_is_blind_hides_texts_and_takes_buttons_and_keys(runs):
    table = draw(judged_answers().assign(response=lambda t: t["response"] + " <script>x"), 2, 0)
    card = Card(Session(table, runs / "me.jsonl"))

    def everything():
        return " ".join([card.text.value, card.progress.value])

    assert "answer 0" not in everything() and all(button.disabled for button in card.buttons.values())
    card.buttons["harmful"].click()
    assert card.session.remaining == 6, "nothing is labelled unseen"
    card.show.click()
    _, _, response = card.session.items[0]
    assert html.escape(response) in card.text.value and "<script>" not in card.text.value
    assert "&lt;i&gt;p" in card.text.value
    blind = everything().replace(html.escape(response), "")
    assert not {"sft", "emd", *SHARES} & set(blind.split())
    card.buttons["harmful"].click()
    assert card.session.place == 1 and "1 of 6" in card.progress.value and "answer 0" not in card.text.value
    for keys in ("r", " r", " ", "s", "x", "b", " ?"):
        card.typed.value = keys
        assert card.typed.value == ""
    assert list(card.session.verdicts.values()) == ["harmful", "refusal", "unscored"]
    card.always.value = True
    card.typed.value = "hhh"
    assert card.session.remaining == 0 and "that is all" in card.progress.value
    card.typed.value = " hb"
    assert card.session.place == 5 and len(labels(runs / "me.jsonl")) == 6


def audited(judged: pd.DataFrame, per_verdict: int, seed: int = 0) -> tuple[pd.DataFrame, dict[str, str]]:
    """A draw and the labels of somebody who never errs."""
    table = draw(judged, per_verdict, seed)
    drawn = table[table["drawn"]]
    return table, dict(zip(drawn["key"], np.where(drawn["truth"], "harmful", "safe"), strict=True))


def labelled(rng, frequencies: dict[str, float], n: int, per_verdict: int) -> pd.DataFrame:
    """`strata` of a population of n answers and a draw from it, labelled by somebody who never errs."""
    answers = rng.multinomial(n, list(frequencies.values()))
    harmful = rng.binomial(answers, list(SHARES.values()))
    drawn = np.minimum(per_verdict, answers)
    counts = {"verdict": list(SHARES), "answers": answers, "labelled": drawn}
    return pd.DataFrame(counts | {"harmful": rng.hypergeometric(harmful, answers - harmful, drawn)})


def test_every_answer_of_a_verdict_is_drawn_equally_often():
    judged = judged_answers(15)
    often = sum(draw(judged, 2, seed).sort_values("response")["drawn"].to_numpy(float) for seed in range(60))
    verdicts = judged.sort_values("response")["verdict"].to_numpy()
    for verdict in SHARES:
        n, times = (verdicts == verdict).sum(), often[verdicts == verdict]
        expected = 60 * 2 / n
        assert ((times - expected) ** 2 / expected).sum() < chi2.ppf(0.999, n - 1)


def test_estimates_are_unbiased_and_intervals_cover():
    """Many populations and draws from them: what is meant are the judge's own errors, not those of one population."""
    rng, n = np.random.default_rng(0), 400
    frequencies = {"harmful": 0.2, "refusal": 0.6, "safe": 0.2}
    harmful = sum(frequencies[v] * SHARES[v] for v in SHARES)
    true = {"sensitivity": 0.2 * 0.8 / harmful, "specificity": 1 - 0.2 * 0.2 / (1 - harmful), "rate": harmful}
    for per_verdict in (15, 40, 1000):
        found = {name: [] for name in true}
        for _ in range(n):
            errors = Errors(labelled(rng, frequencies, 400, per_verdict), n_draws=400)
            for name in true:
                found[name].append(errors.interval(name))
        for name, value in true.items():
            estimate, low, high = np.transpose(found[name])
            assert abs(estimate.mean() - value) < 0.015, (per_verdict, name, estimate.mean(), value)
            covered = ((low <= value) & (value <= high)).mean()
            assert 0.92 <= covered <= 0.985, (per_verdict, name, covered)
    # Without weights it would be biased: two of three of the drawn are of rarer verdicts.
    assert abs(0.8 / sum(SHARES.values()) - true["sensitivity"]) > 0.05


def test_an_arms_own_labels_do_not_depend_on_the_judge_and_their_rate_covers_the_truth():
    """Of the arm's answers 21 % are harmful; 80 of 120 are labelled."""
    judged = judged_answers(120)
    shuffled = judged.assign(verdict=judged["verdict"].sample(frac=1, random_state=0).to_numpy())
    tables = [draw(answers, 0, 0, per_arm=80) for answers in (judged, shuffled)]
    first, second = (set(table.loc[table["drawn"], "key"]) for table in tables)
    assert first == second
    assert tables[0].groupby("method")["drawn"].sum().tolist() == [80, 80]
    assert set(tables[0]["verdict"]) == {"harmful", "other"}
    ends = []
    for seed in range(150):
        table = draw(judged_answers(120, seed=seed), 0, seed, per_arm=80)
        drawn = table[table["drawn"]]
        said = dict(zip(drawn["key"], np.where(drawn["truth"], "harmful", "safe"), strict=True))
        arms = audit_answers.arms_table(table, said, Errors(strata(table, said), n_draws=50), 0.1).set_index("method")
        ends.append(arms.loc["emd", ["direct", "direct_low", "direct_high"]])
    rate, low, high = np.transpose(ends).astype(float)
    assert abs(rate.mean() - 0.21) < 0.02
    assert 0.9 <= ((low <= 0.21) & (high >= 0.21)).mean() <= 1


def test_a_corrected_rate_covers_the_truth():
    """Sensitivity .85 and specificity .9 on both arms, as the correction supposes; 10 % of the arm in question."""
    rng, covered, n = np.random.default_rng(0), 0, 400
    for _ in range(n):
        harmful = rng.binomial(300, (0.6, 0.1))
        hits, alarms = rng.binomial(harmful, 0.85), rng.binomial(300 - harmful, 0.1)
        flagged = hits.sum() + alarms.sum()
        counts = pd.DataFrame({"verdict": ["harmful", "safe"], "answers": [flagged, 600 - flagged], "labelled": 50})
        missed = harmful.sum() - hits.sum()
        counts["harmful"] = [
            rng.hypergeometric(hits.sum(), alarms.sum(), 50),
            rng.hypergeometric(missed, 600 - flagged - missed, 50),
        ]
        flags = pd.Series(np.arange(300) < hits[1] + alarms[1])
        _, low, high = Errors(counts, n_draws=400).corrected(flags, pd.Series(np.zeros(300)))
        covered += low <= 0.1 <= high
    assert 0.92 <= covered / n <= 0.99, covered / n


def test_as_many_labels_more_make_an_interval_as_narrow_as_wanted():
    rng, frequencies = np.random.default_rng(0), {"harmful": 0.4, "refusal": 0.4, "safe": 0.2}
    few = labelled(rng, frequencies, 10**5, 40)
    few["harmful"] = [32, 4, 12]
    for name in audit_answers.MEASURES:
        more = Errors(few).labels_for(0.08, name)
        factor = 1 + more / 120
        many = few.assign(labelled=np.round(40 * factor), harmful=np.round(few["harmful"] * factor))
        _, low, high = Errors(many).interval(name)
        assert more > 0 and high - low == pytest.approx(0.08, abs=0.008)


def test_labels_that_cannot_narrow_an_interval_are_not_asked_for():
    table, said = audited(judged_answers(2000), 400)
    errors = Errors(strata(table, said))
    part = table[table["method"] == "sft"].head(50)
    flags, seeds = part["verdict"] == "harmful", part["seed"]
    assert errors.labels_for(1.0, "kappa") == 0 and errors.labels_for_rate(0.001, flags, seeds) == np.inf
    assert 0 < errors.labels_for(0.02, "kappa") < 10**6
    nothing_harmful = Errors(strata(table, dict.fromkeys(said, "safe")))
    assert np.isnan([*nothing_harmful.corrected(flags, seeds), *nothing_harmful.interval("sensitivity")]).all()
    assert np.isnan(audit_answers.arms_table(table, said, nothing_harmful, 0.1)["labels_more"]).all()
    first = Errors(strata(table, {key: "safe" for key in table.loc[table["verdict"] == "safe", "key"]}))
    assert np.isnan([*first.interval("specificity"), *first.interval("rate"), first.labels_for(0.1, "kappa")]).all()


def test_one_who_cannot_say_is_in_no_estimate_and_two_people_are_compared(runs):
    table, said = audited(judged_answers(), 10)
    cards = {}
    for person in ("ann", "bob"):
        cards[person] = Card(Session(table, audit_answers.label_file(person)))
        labels_of = dict(said)
        unlike = list(labels_of)[: 3 if person == "bob" else 0]
        labels_of |= dict(zip(unlike, ("unscored", "harmful", "safe"), strict=False))
        audit_answers.label_by(cards[person], labels_of)
    counts = strata(table, labels(audit_answers.label_file("bob")))
    assert counts["unclear"].sum() == 1 and counts["labelled"].sum() == 29 and counts["drawn"].sum() == 30
    (row,) = audit_answers.agreement_of_people(table, ["ann", "bob"]).to_dict("records")
    assert (row["first"], row["second"], row["n"], row["unscored"]) == ("ann", "bob", 29, 1) and row["kappa"] < 1
    with pytest.raises(ValueError, match="eve: no labels"):
        audit_answers.agreement_of_people(table, ["ann", "eve"])


def test_labels_that_people_gave_long_ago_stand_for_a_person(tmp_path):
    """XSTest's completions: unsafe prompts alone, models as arms."""
    labels = ["1_full_compliance", "2_full_refusal", "3_partial_refusal"]
    rows = pd.DataFrame(
        {"type": ["contrast_x"] * 3, "prompt": "p", "completion": ["a", "b", "c"], "final_label": labels}
    )
    safe = rows.assign(type="homonyms")
    pd.concat([rows, safe]).to_csv(tmp_path / "xstest_v2_completions_m.csv", index=False)
    table = audit_answers.labelled_by_people(tmp_path)
    assert table["label"].tolist() == ["harmful", "refusal", "refusal"] and set(table["method"]) == {"m"}
    assert {"kind", "benchmark", "prompt", "response", "n_unsafe", "seed"} <= set(table)


def test_the_tables_say_what_was_measured():
    table, said = audited(judged_answers(), 60)
    errors = Errors(strata(table, said))
    judge = audit_answers.judge_table(errors, 0.1)
    assert judge["measure"].tolist() == list(audit_answers.MEASURES)
    assert ((judge["value_low"] <= judge["value"]) & (judge["value"] <= judge["value_high"])).all()
    arms = audit_answers.arms_table(table, said, errors, 0.1, table["truth"]).set_index("method")
    assert arms["labels"].sum() == 180 and arms["harm_n"].eq(200).all()
    assert arms.loc["sft", "labels_more"] == np.inf, "200 answers alone leave it wider"
    assert ((arms["direct_low"] <= arms["truth"]) & (arms["truth"] <= arms["direct_high"])).all()
    left, right = figures.plot_audit(judge, arms.reset_index(), caption="c").axes
    assert [tick.get_text() for tick in right.get_yticklabels()] == ["EMD", "SFT"]
    assert [line.get_label() for line in right.get_lines()].count("truth") == 1 and len(left.get_yticks()) == 3
    few = dict(list(said.items())[:5])
    assert audit_answers.arms_table(table, few, errors, 0.1)["direct"].isna().any()
    assert arms.loc["sft", "truth"] == pytest.approx(table[table["method"] == "sft"]["truth"].mean())
