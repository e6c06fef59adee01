"""The work folder of a harvest: what was answered and judged so far, so that a killed one goes on where it stopped.

settings.json     what was asked of whom; a harvest with other settings is refused there
answers.jsonl     a line per batch of prompts: the answers, in full
verdicts.jsonl    a line per batch: the judge's verdicts
judging.jsonl     judgements of the batch in hand, by hash
"""

import json
from collections.abc import Callable
from pathlib import Path

from ..generation import Response
from ..judges.base import Judge, judge_responses
from ..storage.files import append_record, checked, content_hash, read_object, read_records, write_json
from ..storage.integrity import set_aside

SETTINGS = "settings.json"


class Work:
    """What a harvest has done so far, a record per batch of prompts; kept nowhere without a folder."""

    def __init__(self, folder: Path | None, settings: dict):
        self.folder = folder
        self._answers: dict[int | str, dict] = {}
        self._verdicts: dict[str, list[str]] = {}  # by what was judged
        if folder is None:
            return
        settings = json.loads(json.dumps(settings))
        file = folder / SETTINGS
        try:
            other = read_object(file) if file.exists() else settings
        except ValueError:
            set_aside(folder, [SETTINGS])  # nobody knows whose answers they are
            other = settings
        if other != settings:
            names = ", ".join(name for name in settings if other.get(name) != settings[name])
            raise ValueError(f"{folder}: holds a harvest with other settings ({names}); remove it or choose another")
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            write_json(file, settings)
        self._answers = {record.get("call"): record for record in read_records(folder / "answers.jsonl")}
        verdicts = [record for record in read_records(folder / "verdicts.jsonl") if "verdicts" in record]
        self._verdicts = {record.get("answers"): record["verdicts"] for record in verdicts}

    def answers(self, call: int | str, chunk: list[str], ask: Callable[..., list[Response]]) -> list[Response]:
        """The answers to these prompts: those on record, else asked for and recorded."""
        record = self._answers.pop(call, None)
        # Another judge's word on what was unscored may have changed whom a later round asks.
        if record is not None and record.get("prompts") == content_hash(chunk) and "answers" in record:
            return [Response(*answer) for answer in record["answers"]]
        answers = ask(call, chunk)
        if self.folder is not None:
            record = {"call": call, "prompts": content_hash(chunk), "instructions": chunk}
            record["answers"] = [[a.text, a.n_tokens, a.finished] for a in answers]
            append_record(self.folder / "answers.jsonl", checked(record))
        return answers

    def verdicts(self, judge: Judge, answers: dict[str, str]) -> list[str]:
        """A verdict per answer: what is on record, and the judge's for those it has none for or left unscored."""
        judged = content_hash(list(answers.items()))
        verdicts = list(self._verdicts.get(judged) or ["unscored"] * len(answers))
        unscored = [i for i, verdict in enumerate(verdicts) if verdict == "unscored"]
        if not unscored:
            return verdicts
        prompts, texts = ([part[i] for i in unscored] for part in (list(answers), list(answers.values())))
        cache = None if self.folder is None else self.folder / "judging.jsonl"
        judgements = judge_responses(judge, prompts, texts, cache=cache, progress=False)
        for i, judgement in zip(unscored, judgements, strict=True):
            verdicts[i] = judgement.verdict
        if self.folder is not None:
            append_record(self.folder / "verdicts.jsonl", checked({"answers": judged, "verdicts": verdicts}))
            cache.unlink(missing_ok=True)
        return verdicts
