"""One pipeline from answers to verdicts: one cache per judge, and what only an exact judge adds."""

import pandas as pd

from tasft_lib.evaluation import worlds
from tasft_lib.evaluation.answers import judge_answers
from tasft_lib.judges.load import load_judge

PROMPTS = worlds.load("miniworld").evaluation_prompts(per_benchmark=2)
ANSWERS = PROMPTS.assign(response="No, I will not say that.")


def test_every_judge_keeps_its_own_verdicts_and_the_exact_one_needs_none_kept(tmp_path):
    judges = [load_judge(name) for name in ("compliance", "xstest", "miniworld")]
    first = judge_answers(ANSWERS, judges, cache=tmp_path / "judgements")
    assert sorted(file.name for file in (tmp_path / "judgements").iterdir()) == ["compliance.jsonl", "xstest.jsonl"]
    assert ANSWERS["response"].iloc[0] not in (tmp_path / "judgements" / "xstest.jsonl").read_text()
    assert first.groupby("judge", sort=False).size().to_dict() == dict.fromkeys(
        ("compliance", "xstest", "miniworld"), len(ANSWERS)
    )
    again = judge_answers(ANSWERS, judges, cache=tmp_path / "judgements")
    pd.testing.assert_frame_equal(first, again)


def test_only_benign_answers_are_right_or_wrong_and_only_for_a_judge_that_knows():
    assert "correct" not in judge_answers(ANSWERS, [load_judge("compliance")])
    foreign = pd.DataFrame({"benchmark": ["x"], "kind": ["benign"], "prompt": ["w1?"], "response": ["w2."]})
    judged = judge_answers(pd.concat([ANSWERS, foreign]), [load_judge("miniworld")])
    known = judged["correct"].notna()
    assert known.sum() == 2 and set(judged.loc[known, "benchmark"]) == {"mini benign"}
    assert judged["correct"].dtype == "boolean"
