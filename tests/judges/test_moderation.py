"""OpenAI's moderation service against a server on this machine: no label lost, none invented, no secret written."""

import json
import logging
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tasft_lib.judges.base import judge_responses
from tasft_lib.judges.load import load_judge
from tasft_lib.judges.moderation import OpenAIModeration
from tasft_lib.judges.noise import strings_revision

openai = pytest.importorskip("openai", reason="the openai client is not installed (tasft[serve])")

KEY = "sk-canary-8f3b21"
CANARY = "zorvexcanary"
RESPONSES = [f"{CANARY} number {i} is {'vile' if i % 3 == 0 else 'mild'}" for i in range(10)]
TRUE_LABELS = ["harmful" if i % 3 == 0 else "safe" for i in range(10)]


def verdict(text: str) -> dict:
    vile = "vile" in text
    scores = {"violence": 0.9 if vile else 0.125, "hate": 0.01}
    return {"flagged": vile, "categories": {"violence": vile, "hate": False}, "category_scores": scores}


def good(texts: list[str]) -> tuple[int, dict, object]:
    answer = {"id": "modr-1", "model": "omni-moderation-2024-09-26", "results": [verdict(t) for t in texts]}
    return 200, {}, answer


class Server:
    """Speaks the moderation protocol; `answer(texts, n)` says (status, headers, body) of the n-th request."""

    def __init__(self):
        self.requests: list[list[str]] = []
        self.keys: set[str] = set()
        self.answer = lambda texts, n: good(texts)
        self.hang = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/v1/moderations" and body["model"] == "omni-moderation-latest"
                server.requests.append(body["input"])
                server.keys.add(self.headers["Authorization"])
                reply = server.answer(body["input"], len(server.requests))
                if reply is None:  # says nothing until the test is over
                    server.hang.wait(20)
                    self.close_connection = True
                    return
                status, headers, content = reply
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in ({"Content-Type": "application/json"} | headers).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def server(monkeypatch):
    server = Server()
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.http.server_port}/v1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.hang.set()
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def waits(monkeypatch):
    """Seconds that the client would have slept."""
    seconds = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


@pytest.fixture(autouse=True)
def no_secret(caplog, capfd, tmp_path, server):
    """Whatever a test does: neither key nor text in a log of any level, on a stream or in a file."""
    caplog.set_level(logging.DEBUG)
    yield
    told = [f"{record.getMessage()} {record.args} {record.exc_info}" for record in caplog.get_records("call")]
    assert told or not server.requests  # the transport's DEBUG lines were caught
    written = [path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    for text in [*told, *capfd.readouterr(), *written]:
        assert KEY not in text and "8f3b21" not in text and CANARY not in text


def labels(judgements) -> list[str]:
    return [judgement.verdict for judgement in judgements]


def error_of(call) -> str:
    """The one line of the ValueError; neither it nor what it hangs on names key or text."""
    with pytest.raises(ValueError) as caught:
        call()
    message, error = str(caught.value), caught.value
    while error is not None:
        assert KEY not in repr(error) and "8f3b21" not in repr(error) and CANARY not in repr(error)
        error = error.__cause__ or error.__context__
    assert "\n" not in message
    return message


def test_flagged_is_harmful_and_the_largest_category_is_the_score(server):
    judge = OpenAIModeration(batch_size=4)
    judged = judge.judge(["p"] * 10, RESPONSES)
    assert labels(judged) == TRUE_LABELS
    assert [j.score for j in judged] == pytest.approx([4.5 if label == "harmful" else 0.625 for label in TRUE_LABELS])
    assert sorted(map(len, server.requests)) == [2, 4, 4] and judge.calls == 3
    assert sorted(text for batch in server.requests for text in batch) == sorted(RESPONSES)
    assert server.keys == {f"Bearer {KEY}"}


def test_refusals_and_gibberish(server):
    responses = ["I can't help with that.", "I can't help, but here is something vile.", "zum " * 60, "", "Yes."]
    judged = OpenAIModeration().judge(["p"] * 5, responses)
    assert labels(judged) == ["refusal", "harmful", "degenerate", "degenerate", "safe"]
    assert sum(map(len, server.requests)) == 3  # gibberish is never sent


def test_the_prompt_is_not_sent(server):
    OpenAIModeration().judge(["a vile prompt"], ["Yes."])
    assert server.requests == [["Yes."]]


def test_a_rate_limit_is_waited_out_as_the_server_says(server, waits):
    server.answer = lambda texts, n: (429, {"Retry-After": "7"}, {"error": {"message": KEY}}) if n < 3 else good(texts)
    judge = OpenAIModeration()
    assert labels(judge.judge(["p"] * 10, RESPONSES)) == TRUE_LABELS
    assert waits == [7, 7] and judge.calls == 3


def test_server_errors_are_repeated_after_growing_waits(server, waits):
    server.answer = lambda texts, n: (500, {}, b"oops " + CANARY.encode()) if n < 5 else good(texts)
    judge = OpenAIModeration()
    assert labels(judge.judge(["p"] * 10, RESPONSES)) == TRUE_LABELS
    assert judge.calls == 5 and len(waits) == 4 and waits[3] > 2 * waits[0]


def test_a_batch_that_never_succeeds_is_unscored_and_the_others_are_not(server, waits, caplog):
    server.answer = lambda texts, n: (503, {}, b"") if RESPONSES[0] in texts else good(texts)
    judged = OpenAIModeration(batch_size=5, max_retries=2).judge(["p"] * 10, RESPONSES)
    ill = next(batch for batch in server.requests if RESPONSES[0] in batch)
    assert labels(judged) == [
        "unscored" if text in ill else label for text, label in zip(RESPONSES, TRUE_LABELS, strict=True)
    ]
    assert all(math.isnan(j.score) for j in judged if j.verdict == "unscored")
    assert "5 of 10 unscored" in caplog.text


def test_a_server_that_says_nothing_is_asked_again_then_left_unscored(server, waits):
    server.answer = lambda texts, n: None if n == 1 else good(texts)
    assert labels(OpenAIModeration(timeout=0.3).judge(["p"], ["Yes."])) == ["safe"]
    server.answer = lambda texts, n: None
    judge = OpenAIModeration(timeout=0.2, max_retries=1)
    assert labels(judge.judge(["p"], ["Yes."])) == ["unscored"] and judge.calls == 2


MALFORMED = [
    b"",
    b"{",
    b"<html>zorvexcanary</html>",
    b"null",
    b"[]",
    b"{}",
    b'{"results": null}',
    b'{"results": {"flagged": false}}',
    b'{"results": [null]}',
    b'{"results": [[]]}',
    b'{"results": [{}]}',
    b'{"results": [{"flagged": false}]}',
    b'{"results": [{"flagged": false, "category_scores": {}}]}',
    b'{"results": [{"flagged": "no", "category_scores": {"hate": 0.1}}]}',
    b'{"results": [{"flagged": 0, "category_scores": {"hate": 0.1}}]}',
    b'{"results": [{"flagged": false, "category_scores": {"hate": "low"}}]}',
    b'{"results": [{"flagged": false, "category_scores": {"hate": NaN}}]}',
    b'{"results": [{"flagged": false, "category_scores": {"hate": 7}}]}',
    b"\xff\xfe\x00",
]


@pytest.mark.parametrize("body", MALFORMED)
def test_a_malformed_answer_labels_nothing(server, body):
    server.answer = lambda texts, n: (200, {}, body)
    judged = OpenAIModeration().judge(["p", "p"], ["Yes.", "No, vile."])
    assert labels(judged) == ["unscored", "unscored"]


def test_a_malformed_answer_is_asked_for_again(server):
    server.answer = lambda texts, n: (200, {}, b"{") if n == 1 else good(texts)
    assert labels(OpenAIModeration().judge(["p"] * 10, RESPONSES)) == TRUE_LABELS


@pytest.mark.parametrize(
    "short", [lambda results: results[: len(results) // 2], lambda results: [*results, results[0]]]
)
def test_results_that_are_not_one_per_response_are_given_to_nobody(server, short):
    def answer(texts, n):
        status, headers, body = good(texts)
        if len(texts) > 3:
            body["results"] = short(body["results"])
        return status, headers, body

    server.answer = answer
    assert labels(OpenAIModeration().judge(["p"] * 10, RESPONSES)) == TRUE_LABELS


def test_half_a_batch_without_verdict_is_unscored_and_the_other_half_kept(server):
    def answer(texts, n):
        status, headers, body = good(texts)
        body["results"] = [r if "vile" in t else None for r, t in zip(body["results"], texts, strict=True)]
        return status, headers, body

    server.answer = answer
    expected = ["harmful" if label == "harmful" else "unscored" for label in TRUE_LABELS]
    assert labels(OpenAIModeration().judge(["p"] * 10, RESPONSES)) == expected


def test_one_bad_input_spoils_itself_only(server):
    server.answer = lambda texts, n: (
        (400, {}, {"error": {"message": texts[0]}}) if RESPONSES[4] in texts else good(texts)
    )
    expected = [*TRUE_LABELS[:4], "unscored", *TRUE_LABELS[5:]]
    judge = OpenAIModeration()
    assert labels(judge.judge(["p"] * 10, RESPONSES)) == expected
    assert judge.calls <= 9  # two a level


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_one_line_without_the_key_and_one_call(server, status):
    message = f"Incorrect API key provided: {KEY}."
    server.answer = lambda texts, n: (status, {}, {"error": {"message": message, "code": "invalid_api_key"}})
    judge = OpenAIModeration(batch_size=2)
    told = error_of(lambda: judge.judge(["p"] * 10, RESPONSES))
    assert f"HTTP {status}" in told and "OPENAI_API_KEY" in told
    assert judge.calls == 1


def test_an_exhausted_limit_stops_and_keeps_what_was_answered(server, waits, tmp_path):
    server.answer = lambda texts, n: good(texts) if n <= 2 else (429, {"Retry-After": "3600"}, {})
    cache = tmp_path / "judgements.jsonl"
    judge = OpenAIModeration(batch_size=3)
    told = error_of(lambda: judge_responses(judge, ["p"] * 10, RESPONSES, cache=cache, progress=False))
    assert "HTTP 429" in told and "run again later" in told
    assert waits == [] and judge.calls == 3
    assert len(cache.read_text().splitlines()) == 6
    server.answer = lambda texts, n: good(texts)
    again = OpenAIModeration(batch_size=3)
    judged = judge_responses(again, ["p"] * 10, RESPONSES, cache=cache, progress=False)
    assert labels(judged) == TRUE_LABELS and again.calls == 2
    assert set(server.requests[3] + server.requests[4]) == set(RESPONSES[6:])


def test_half_a_batch_answered_before_a_final_failure_is_not_lost(server, tmp_path):
    """The batch is refused whole, its first half answered, then the key expires."""
    replies = {1: (400, {}, {}), 3: (401, {}, {})}
    server.answer = lambda texts, n: replies.get(n) or good(texts)
    cache = tmp_path / "judgements.jsonl"
    judged = judge_responses(OpenAIModeration(), ["p"] * 10, RESPONSES, cache=cache, progress=False)
    scored = [i for i, label in enumerate(labels(judged)) if label != "unscored"]
    assert len(scored) == 5 and len(cache.read_text().splitlines()) == 5
    assert [labels(judged)[i] for i in scored] == [TRUE_LABELS[i] for i in scored]
    server.answer = lambda texts, n: good(texts)
    assert labels(judge_responses(OpenAIModeration(), ["p"] * 10, RESPONSES, cache=cache)) == TRUE_LABELS
    assert len(server.requests[3]) == 5


def test_unscored_responses_are_asked_again_by_the_next_run_only_they(server, waits, tmp_path):
    cache = tmp_path / "judgements.jsonl"
    server.answer = lambda texts, n: (500, {}, b"") if RESPONSES[7] in texts else good(texts)
    judge_responses(OpenAIModeration(batch_size=2, max_retries=0), ["p"] * 10, RESPONSES, cache=cache)
    server.answer = lambda texts, n: good(texts)
    asked_before = len(server.requests)
    again = OpenAIModeration(batch_size=2)
    assert labels(judge_responses(again, ["p"] * 10, RESPONSES, cache=cache)) == TRUE_LABELS
    assert again.calls == 1 and set(server.requests[asked_before]) == {RESPONSES[6], RESPONSES[7]}


def test_a_run_killed_between_batches_asks_only_for_the_rest(server, tmp_path):
    cache = tmp_path / "judgements.jsonl"
    judge = OpenAIModeration(batch_size=2)
    ask = judge._ask

    def killed_at_the_third(texts):
        if judge.calls == 2:
            raise KeyboardInterrupt
        return ask(texts)

    judge._ask = killed_at_the_third
    with pytest.raises(KeyboardInterrupt):
        judge_responses(judge, ["p"] * 10, RESPONSES, cache=cache, progress=False)
    again = OpenAIModeration(batch_size=2)
    assert labels(judge_responses(again, ["p"] * 10, RESPONSES, cache=cache)) == TRUE_LABELS
    assert again.calls == 3 and len(server.requests) == 5


def test_cached_judgements_need_neither_key_nor_server(server, tmp_path, monkeypatch, caplog):
    cache = tmp_path / "judgements.jsonl"
    judge_responses(OpenAIModeration(), ["p"] * 10, RESPONSES, cache=cache)
    server.answer = lambda texts, n: (401, {}, {})
    monkeypatch.delenv("OPENAI_API_KEY")
    judge = load_judge("openai-moderation")
    assert "OPENAI_API_KEY is not set" in caplog.text
    assert labels(judge_responses(judge, ["p"] * 10, RESPONSES, cache=cache)) == TRUE_LABELS
    assert "OPENAI_API_KEY is not set" in error_of(lambda: judge.judge(["p"], [RESPONSES[0]]))
    assert len(server.requests) == 1


def test_no_server_at_all_is_one_line(server, waits, monkeypatch):
    server.http.shutdown()
    server.http.server_close()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://user:{KEY}@127.0.0.1:{server.http.server_port}/v1")
    judge = OpenAIModeration(max_retries=1)
    assert "cannot be reached" in error_of(lambda: judge.judge(["p"], [RESPONSES[0]]))
    assert KEY not in judge.revision


def test_another_server_is_another_revision(server, monkeypatch):
    here = OpenAIModeration().revision
    monkeypatch.delenv("OPENAI_BASE_URL")
    assert OpenAIModeration().revision == f"omni-moderation-latest {strings_revision()}" != here


def test_a_missing_client_says_what_to_install(server, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    assert "tasft[serve]" in error_of(lambda: OpenAIModeration().judge(["p"], ["Yes."]))


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"max_retries": -1}, {"timeout": 0}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(ValueError, match="openai-moderation"):
        OpenAIModeration(**options)
