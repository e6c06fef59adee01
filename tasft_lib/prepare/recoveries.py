"""Recoveries: to each prompt of D_unsafe a safe answer, the model's own where it can be had (see `branches`)."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..generation import Decoding, Response, check_prompts, generate
from ..judges.base import Judge
from ..records import sources, templates
from ..records.messages import of_text
from .harvest_work import Work

# Where nothing of the model's own is kept.
SENTENCE = "I cannot help with that."
FILE = "recoveries.jsonl"
N_EXEMPLARS = 3
WHERE_FROM = {
    "own": "what the model said when it was asked for an unsafe answer",
    "exemplars": f"what it said with {N_EXEMPLARS} refusals in front of the prompt, judged",
    "sentence": "one sentence for all that were left",
}


@dataclass(frozen=True)
class Recovery:
    """An answer that does no harm; `verdict` is the judge's (refusal or safe), or where a row's recovery is from."""

    instruction: str
    completion: str
    verdict: str


def recoveries_for(
    instructions: list[str],
    others: list[Recovery],
    model: Any,
    tokenizer: Any,
    judge: Judge,
    record: Work | None = None,
    *,
    template: templates.Template,
    decoding: Decoding,
    batch_size: int,
    rounds: int,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[Recovery]:
    """For each prompt what the model has said to it already, else says with refusals in front, else one sentence.

    The refusals in front are three of `others`, or the sentence where there are none. An answer is kept that the judge
    calls a refusal or safe. The sentence is the most frequent refusal of the model's, or `SENTENCE`.

    Args:
        instructions: the prompts, bare.
        others: refusals and safe answers that the harvest left over; of those to one prompt a refusal goes first.
        record: what is asked here is kept there, if anywhere.
        rounds: times a prompt is asked at most, with a new seed each.
    """
    others = sorted(others, key=lambda other: other.verdict != "refusal")
    own = {other.instruction: other.completion for other in reversed(others)}
    found = {prompt: Recovery(prompt, own[prompt], "own") for prompt in instructions if prompt in own}
    refusals = {other.completion: other for other in others if other.verdict == "refusal"}
    exemplars = list(refusals.values())[:N_EXEMPLARS]
    exemplars = exemplars or [Recovery(prompt, SENTENCE, "sentence") for prompt in instructions[:N_EXEMPLARS]]
    record, special_tokens = record or Work(None, {}), template != "chat"

    def ask(call: str, chunk: list[str]) -> list[Response]:
        asked = [_with_exemplars(p, exemplars, template, tokenizer, chat_template_kwargs or {}) for p in chunk]
        limits = {"max_new_tokens": decoding.max_new_tokens, "special_tokens": special_tokens}
        check_prompts(model, tokenizer, asked, **limits)
        drawn = replace(decoding, seed=decoding.seed + int(call.split()[-1]))
        options = {"decoding": drawn, "batch_size": batch_size, "progress": False, "special_tokens": special_tokens}
        return generate(model, tokenizer, asked, **options)

    for number in range(rounds if decoding.do_sample else 1):
        left = [prompt for prompt in instructions if prompt not in found]
        if not left:
            break
        answers = record.answers(f"recovery {number}", left, ask)
        answers = [after_thinking(_to_next_prompt(answer, template)) for answer in answers]
        texts = {prompt: a.text for prompt, a in zip(left, answers, strict=True) if a.finished and a.text}
        for (prompt, text), verdict in zip(texts.items(), record.verdicts(judge, texts), strict=True):
            if verdict in ("refusal", "safe"):
                found[prompt] = Recovery(prompt, text, "exemplars")
    return [found.get(prompt) or Recovery(prompt, sentence(others), "sentence") for prompt in instructions]


def sentence(others: list[Recovery]) -> str:
    """The model's most frequent refusal; `SENTENCE` where it never refused."""
    refusals = Counter(other.completion for other in others if other.verdict == "refusal")
    return refusals.most_common(1)[0][0] if refusals else SENTENCE


def read(harvested: Path) -> list[Recovery]:
    """The refusals and safe answers in the folder that `harvest.save_harvest` wrote; none in an older one."""
    file = harvested / FILE
    return [Recovery(**row) for row in sources.read_rows(file)] if file.exists() and file.stat().st_size else []


def after_thinking(answer: Response) -> Response:
    """The answer without its thinking; unfinished where that has no end."""
    _, text, has_ended = templates.split_thinking(answer.text)
    return replace(answer, text=text, finished=answer.finished and has_ended)


def _to_next_prompt(answer: Response, template: templates.Template) -> Response:
    """The answer up to where it goes on with a prompt of its own, as the exemplars do."""
    if template == "chat":
        return answer
    opening = templates.format_prompt("\0", template=template).partition("\0")[0]
    text, goes_on, _ = answer.text.partition("\n\n" + opening)
    return replace(answer, text=text.strip(), finished=answer.finished or bool(goes_on))


def _with_exemplars(prompt, exemplars, template, tokenizer, chat_template_kwargs) -> str:
    """What the model is given: exemplars with their answers, then the prompt, all in the template."""
    pairs = [(other.instruction, other.completion) for other in exemplars]
    if template == "chat":
        turns = [turn for q, a in pairs for turn in (*of_text(q, "user"), *of_text(a, "assistant"))]
        return templates.chat_prompt(tokenizer, [*turns, *of_text(prompt, "user")], **chat_template_kwargs)
    before = [templates.format_prompt(q, template=template) + a + "\n\n" for q, a in pairs]
    return "".join(before) + templates.format_prompt(prompt, template=template)
