"""Answers over the network: whatever the server does, none is lost, none is invented, none is paid for twice."""

import json
import logging
import sys
import threading
from collections import Counter
from itertools import pairwise

import pytest
from chat_server import ChatServer, Reply, error, last

from tasft_lib.evaluation import served
from tasft_lib.evaluation.served import Endpoint, generate_served, missing_calls
from tasft_lib.generation import Decoding, Response
from tasft_lib.records.templates import split_thinking
from tasft_lib.storage import files
from tasft_lib.storage.files import append_record, read_records

pytest.importorskip("openai")
KEY = "sk-zorvex-9f31c0de"
SECRET = "glimjack of the quorb"
PROMPTS = [f"prompt {i}" for i in range(12)]


@pytest.fixture(autouse=True)
def no_key_and_short_waits(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(served, "_FIRST_WAIT", 0.002)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.002)


def echo(request):
    return f"answer to {last(request)}"


def ask(server, folder, prompts=PROMPTS, **options):
    options = {"model": "m", "answers": folder / "answers.jsonl", "timeout": 10, "progress": False} | options
    return generate_served(prompts, base_url=server.url, **options)


def texts(responses):
    return [response.text for response in responses]


EXPECTED = [f"answer to {prompt}" for prompt in PROMPTS]


def test_answers_come_in_the_order_of_the_prompts(tmp_path):
    with ChatServer(lambda r: Reply(echo(r), wait=0.05 if last(r) == "prompt 0" else 0)) as server:
        assert ask(server, tmp_path) == [Response(text, 4, True) for text in EXPECTED]
        assert len(server.asked) == len(PROMPTS)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_at_a_time_than_allowed(concurrency, tmp_path):
    with ChatServer(lambda r: Reply(echo(r), wait=0.03)) as server:
        ask(server, tmp_path, concurrency=concurrency)
        assert server.most_open == concurrency


def test_decoding_is_passed_on(tmp_path):
    sampled = Decoding(max_new_tokens=7, do_sample=True, temperature=0.6, top_p=0.8, seed=5)
    with ChatServer(echo) as server:
        ask(server, tmp_path, ["a"], decoding=Decoding(max_new_tokens=9, temperature=0.6, seed=3))
        ask(
            server,
            tmp_path,
            ["a", [{"role": "system", "content": "s"}, {"role": "user", "content": "b"}]],
            decoding=sampled,
        )
        greedy, *others = server.requests
    assert greedy == {
        "model": "m",
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 9,
        "temperature": 0,
    }
    assert [(r["max_tokens"], r["temperature"], r["top_p"], r["seed"]) for r in others] == [(7, 0.6, 0.8, 5)] * 2
    assert sorted(len(r["messages"]) for r in others) == [1, 2]


def test_a_prompt_that_comes_again_is_another_draw(tmp_path):
    with ChatServer(lambda r: f"draw {r['seed']}") as server:
        sampled = Decoding(do_sample=True, seed=4)
        first = texts(ask(server, tmp_path, ["a", "b", "a", "a"], decoding=sampled))
        assert first == ["draw 4", "draw 4", "draw 5", "draw 6"]
        assert texts(ask(server, tmp_path, ["a", "a"], decoding=sampled)) == ["draw 4", "draw 5"]
        assert len(server.asked) == 4


def fails_first(broken):
    """Every prompt's first request goes wrong."""
    seen = Counter()

    def script(request):
        seen[last(request)] += 1
        return broken if seen[last(request)] == 1 else echo(request)

    return script


@pytest.mark.parametrize(
    "broken",
    [
        error(429, Retry_After="0.01"),
        error(500),
        error(503),
        error(408),
        Reply(body="{"),
        Reply(body="<html>busy</html>"),
        Reply(body="<html>busy</html>", headers=(("Content-Type", "text/html"),)),
        Reply(body="null"),
        Reply(body='{"choices": []}'),
        Reply(body='{"choices": [{"message": {"role": "assistant"}, "finish_reason": "stop"}]}'),
        Reply(text=None),
        Reply(body='{"choices": [{"message": {"content": 7}, "finish_reason": "stop"}]}'),
        Reply(hang_up=True),
        Reply(wait=1.0),
    ],
    ids=lambda reply: f"{reply.status} {reply.body or ''}{reply.hang_up or ''}{reply.wait or ''}"[:40],
)
def test_what_passes_is_tried_again(broken, tmp_path):
    with ChatServer(fails_first(broken)) as server:
        responses = ask(server, tmp_path, PROMPTS[:4], timeout=0.4, concurrency=4)
        assert texts(responses) == EXPECTED[:4]
        assert Counter(map(last, server.requests)) == dict.fromkeys(PROMPTS[:4], 2)
    assert len(list(read_records(tmp_path / "answers.jsonl"))) == 4


def test_retry_after_is_waited_for(tmp_path):
    with ChatServer(fails_first(error(429, Retry_After="0.5"))) as server:
        ask(server, tmp_path, ["a"])
        (before, *_), (after, *_) = server.asked
    assert 0.5 <= after - before < 5


def test_a_wait_of_hours_is_said_not_waited(tmp_path):
    with ChatServer(lambda r: error(429, Retry_After="7200")) as server:
        with pytest.raises(ConnectionError, match="status 429, to be tried again in 7200 s"):
            ask(server, tmp_path, ["a"])
        assert len(server.asked) == 1


def test_waits_grow_and_end(tmp_path, monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.05)
    with ChatServer(lambda r: error(500)) as server:
        with pytest.raises(ConnectionError, match=r"1 of 1 requests to m have no answer \(1 × status 500\)"):
            ask(server, tmp_path, ["a"], retries=3)
        moments = [moment for moment, _, _ in server.asked]
    assert len(moments) == 4
    gaps = [b - a for a, b in pairwise(moments)]
    assert all(gap >= 0.75 * 0.05 * 2**i for i, gap in enumerate(gaps))


def test_half_of_the_requests_failing_costs_only_that_half(tmp_path):
    def is_bad(request):
        return int(last(request).split()[1]) % 2

    with ChatServer(lambda r: error(500) if is_bad(r) else echo(r)) as server:
        with pytest.raises(ConnectionError, match="6 of 12 requests") as caught:
            ask(server, tmp_path, retries=1)
        assert str(tmp_path / "answers.jsonl") in str(caught.value) and "\n" not in str(caught.value)
        kept = [record["text"] for record in read_records(tmp_path / "answers.jsonl")]
        assert sorted(kept) == sorted(EXPECTED[::2])
        options = {"base_url": server.url, "model": "m", "answers": tmp_path / "answers.jsonl", "decoding": Decoding()}
        assert missing_calls(PROMPTS, **options) == 6
        server.script, server.asked[:] = echo, []
        assert texts(ask(server, tmp_path)) == EXPECTED
        assert sorted(map(last, server.requests)) == sorted(PROMPTS[1::2])
        assert missing_calls(PROMPTS, **options) == 0
        server.asked.clear()
        assert texts(ask(server, tmp_path)) == EXPECTED and not server.asked


def test_another_model_server_or_decoding_is_asked_anew(tmp_path):
    with ChatServer(echo) as server, ChatServer(lambda r: "other") as other:
        ask(server, tmp_path, ["a"])
        ask(server, tmp_path, ["a"], model="n")
        ask(server, tmp_path, ["a"], decoding=Decoding(max_new_tokens=3))
        assert len(server.asked) == 3
        assert texts(ask(other, tmp_path, ["a"])) == ["other"]


@pytest.mark.parametrize("bytes_lost", [1, 2, 30])
def test_a_torn_last_line_is_asked_again_and_nothing_else(bytes_lost, tmp_path):
    file = tmp_path / "answers.jsonl"
    with ChatServer(echo) as server:
        ask(server, tmp_path, PROMPTS[:3])
        file.write_bytes(file.read_bytes()[:-bytes_lost])
        server.asked.clear()
        for _ in range(2):
            assert texts(ask(server, tmp_path, PROMPTS[:4])) == EXPECTED[:4]
        # Without its last byte, the newline, the line is still whole.
        assert len(server.asked) == (1 if bytes_lost == 1 else 2)


def test_records_that_are_no_answers_are_passed_over(tmp_path):
    with ChatServer(echo) as server:
        ask(server, tmp_path, ["a"])
        (whole,) = read_records(tmp_path / "answers.jsonl")
        (tmp_path / "answers.jsonl").write_text("[]\n7\nnull\n\n")
        for broken in ({"text": 7}, {"finished": "yes"}, {"n_tokens": None}):
            append_record(tmp_path / "answers.jsonl", whole | broken)
        assert texts(ask(server, tmp_path, ["a"])) == ["answer to a"]
        assert len(server.asked) == 2


def test_half_a_character_is_replaced_in_new_answers_and_in_those_that_are_there(tmp_path):
    with ChatServer(lambda r: "cut \ud83d") as server:
        assert texts(ask(server, tmp_path, ["a"])) == ["cut ?"]
        (whole,) = read_records(tmp_path / "answers.jsonl")
        (tmp_path / "answers.jsonl").write_text("")
        append_record(tmp_path / "answers.jsonl", whole | {"text": "\ud83d cut, \U0001f600 whole"})
        assert texts(ask(server, tmp_path, ["a"])) == ["? cut, \U0001f600 whole"]
        assert len(server.asked) == 1


def test_an_interrupt_keeps_what_was_answered(tmp_path, monkeypatch):
    class Interrupted(files.tqdm):
        def update(self, n=1):
            raise KeyboardInterrupt

    monkeypatch.setattr(files, "tqdm", Interrupted)
    with ChatServer(lambda r: Reply(echo(r), wait=0.05)) as server:
        with pytest.raises(KeyboardInterrupt):
            ask(server, tmp_path, concurrency=3)
        answered = len(server.asked)
        assert answered < len(PROMPTS)
        assert len(list(read_records(tmp_path / "answers.jsonl"))) == answered
        monkeypatch.undo()
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        assert texts(ask(server, tmp_path)) == EXPECTED
        assert len(server.asked) == len(PROMPTS)


@pytest.mark.parametrize("status, remedy", [(401, "OPENAI_API_KEY"), (404, "name of the model")])
def test_a_refused_key_or_unknown_model_ends_the_run_at_once(status, remedy, tmp_path):
    with ChatServer(lambda r: error(status, wait="1")) as server:
        with pytest.raises(ConnectionError, match=rf"status {status}.*{remedy}"):
            ask(server, tmp_path, [f"p{i}" for i in range(100)], concurrency=2)
        assert len(server.asked) < 20


def test_a_spent_quota_ends_the_run_and_says_so(tmp_path):
    with ChatServer(lambda r: error(429, code="insufficient_quota")) as server:
        with pytest.raises(ConnectionError, match="insufficient_quota"):
            ask(server, tmp_path, [f"p{i}" for i in range(100)], concurrency=2)
        assert len(server.asked) < 20


def test_a_server_that_answers_nothing_is_not_asked_everything(tmp_path):
    with ChatServer(lambda r: error(500)) as server:
        with pytest.raises(ConnectionError, match="100 of 100"):
            ask(server, tmp_path, [f"p{i}" for i in range(100)], concurrency=2, retries=0)
        assert len(server.asked) < 30
        url = server.url
    with pytest.raises(ConnectionError, match="no connection"):
        generate_served(["a"], base_url=url, model="m", answers=tmp_path / "a", retries=0, progress=False)


def test_a_prompt_that_is_refused_stops_no_other(tmp_path):
    """Eight and more at the beginning: a status about one prompt says nothing about the server."""
    prompts = [f"prompt {i}" for i in range(30)]
    bad = set(prompts[:20])
    with ChatServer(lambda r: error(400, code="context_length_exceeded") if last(r) in bad else echo(r)) as server:
        with pytest.raises(ConnectionError, match="20 × status 400, context_length_exceeded"):
            ask(server, tmp_path, prompts, concurrency=1)
        assert len(server.asked) == 30
    assert len(list(read_records(tmp_path / "answers.jsonl"))) == 10


def test_answers_that_were_cut_or_withheld_say_so(tmp_path):
    replies = {
        "long": Reply("w1 w2", finish_reason="length"),
        "thought": Reply(None, finish_reason="length"),
        "filtered": Reply(None, finish_reason="content_filter"),
        "azure": error(400, code="content_filter"),
        "uncounted": Reply(body='{"choices": [{"message": {"content": " a "}, "finish_reason": "stop"}]}'),
    }
    with ChatServer(lambda r: replies[last(r)]) as server:
        responses = ask(server, tmp_path, list(replies))
    cut = Response("", 0, False)
    assert responses == [Response("w1 w2", 2, False), cut, cut, cut, Response("a", 0, True)]


@pytest.mark.parametrize("status", [200, 400, 401, 403, 404, 429, 500, "malformed"])
def test_neither_key_nor_text_is_told(status, tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    logging.getLogger("openai").setLevel(logging.DEBUG)
    answers = tmp_path / "answers.jsonl"

    def tactless(request):
        said = f"{KEY} {SECRET} {request}"
        if status == 200:
            return SECRET
        if status == "malformed":
            return Reply(body=said)
        return error(status, said, code=said.replace(" ", "_"))

    with ChatServer(tactless) as server:
        message = ""
        try:
            ask(server, tmp_path, [SECRET] * 3, retries=1, progress=True)
        except ConnectionError as failure:
            message = f"{failure} {failure.__cause__} {failure.__context__}"
        assert bool(message) == (status != 200)
        assert server.asked[0][1]["authorization"] == f"Bearer {KEY}"
    output = capfd.readouterr()
    files = "".join(f.read_text() for f in tmp_path.rglob("*") if f != answers)
    for told in (message, caplog.text, output.out, output.err, files):
        assert KEY not in told and SECRET not in told
    kept = answers.read_text() if answers.exists() else ""
    assert KEY not in kept and (SECRET in kept) == (status == 200)


def test_the_key_travels_encrypted_or_not_at_all(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    sent = {url: served._client(Endpoint(url, "m"), 1, 0, threading.Event()).api_key == KEY for url in (
        "https://api.example.org/v1", "http://localhost:8000/v1", "http://[::1]:8000/v1", "http://api.example.org/v1",
        "http://localhost.example.org/v1",
    )}  # fmt: skip
    assert list(sent.values()) == [True, True, True, False, False]


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000/v1",
        "ftp://host/v1",
        "http://",
        "http://user:quorb@host/v1",
        "http://host/v1?key=quorb",
        "http://h:x/v1",
    ],
)
def test_impossible_addresses_are_refused_without_being_quoted(url, tmp_path):
    with pytest.raises(ValueError, match="address of a server") as caught:
        generate_served(["a"], base_url=url, model="m", answers=tmp_path / "a")
    assert "quorb" not in str(caught.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"decoding": Decoding(num_beams=4)}, "no beams"),
        ({"concurrency": 0}, "above 0"),
        ({"model": ""}, "no name"),
        ({"prompts": ["a", " "]}, "prompt 2 is empty"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_a_call(options, message, tmp_path):
    with ChatServer(echo) as server:
        with pytest.raises(ValueError, match=message):
            ask(server, tmp_path, **options)
        assert not server.asked


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match=r"pip install 'tasft\[serve\]'"):
        generate_served(["a"], base_url="http://localhost/v1", model="m", answers=tmp_path / "a")


def test_nothing_to_ask(tmp_path):
    assert generate_served([], base_url="http://localhost/v1", model="m", answers=tmp_path / "a") == []
    assert not (tmp_path / "a").exists()


def test_records_are_one_line_each_and_read_back(tmp_path):
    records = [{"a": "line\nbreak \u2028 \U0001f600"}, {"b": [1, None, True]}]
    for record in records:
        append_record(tmp_path / "deep" / "file.jsonl", record)
    assert list(read_records(tmp_path / "deep" / "file.jsonl")) == records
    assert len((tmp_path / "deep" / "file.jsonl").read_bytes().splitlines()) == 2
    assert json.loads((tmp_path / "deep" / "file.jsonl").read_text().splitlines()[1]) == records[1]
    assert list(read_records(tmp_path / "none")) == []


def detail(field, message="Extra inputs are not permitted"):
    body = {"detail": [{"type": "extra_forbidden", "loc": ["body", field], "msg": message, "input": "x"}]}
    return Reply(status=422, body=json.dumps(body))


def validation(message):
    return Reply(status=422, body=json.dumps({"error": message, "error_type": "validation"}))


def openai_error(message, param=None, code=None):
    return Reply(status=400, body=json.dumps({"error": {"message": message, "param": param, "code": code}}))


def tgi(r):
    if r.get("top_p") == 1 or r.get("temperature") == 0:
        field = "top_p" if r.get("top_p") == 1 else "temperature"
        return validation(f"Input validation error: `{field}` must be > 0.0 and < 1.0")


def anthropic(r):
    if "temperature" in r and "top_p" in r:
        return openai_error("`temperature` and `top_p` cannot both be specified for this model.")


def o_series(r):
    if "max_tokens" in r:
        told = (
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
        )
        return openai_error(told, "max_tokens", "unsupported_parameter")
    if r.get("temperature", 1) != 1:
        return openai_error("Unsupported value: 'temperature' does not support 0 with this model.", "temperature")


def mistral(r):
    return detail("seed") if "seed" in r else None


@pytest.mark.parametrize("server_of", [tgi, anthropic, o_series, mistral])
@pytest.mark.parametrize("decoding", [Decoding(), Decoding(do_sample=True, temperature=0.7)], ids=["greedy", "sampled"])
def test_servers_that_refuse_a_field_are_asked_without_it(server_of, decoding, tmp_path, caplog):
    with ChatServer(lambda r: server_of(r) or echo(r)) as server:
        assert texts(ask(server, tmp_path, decoding=decoding, concurrency=3)) == EXPECTED
        refused = [r for r in server.requests if server_of(r)]
        assert len(refused) <= 3 * len(caplog.messages), "each worker learns it once"
        for request in server.requests[-3:]:
            assert "model" in request and ("max_tokens" in request) != ("max_completion_tokens" in request)
    left_out = {m.split()[3] for m in caplog.messages}
    expected = {tgi: {"top_p,"} if decoding.do_sample else {"temperature,"}, anthropic: {"top_p,"}, mistral: {"seed,"}}
    expected[o_series] = {"max_tokens,", "temperature,"}
    if not decoding.do_sample:
        expected |= {anthropic: set(), mistral: set()}
    assert left_out == expected[server_of]
    assert ("draws by itself" in caplog.text) == ("temperature," in left_out)


def test_why_a_server_refuses_is_told_in_its_words_with_the_option_that_helps(tmp_path):
    def refusal(reply, *prompts):
        with ChatServer(lambda r: reply) as server, pytest.raises(ConnectionError) as caught:
            ask(server, tmp_path, prompts)
        return str(caught.value)

    message = refusal(detail("stop_at", "Field required"), "a b c", "d e f")
    assert "(2 × status 422: body.stop_at: Field required)" in message and "--request_fields" in message
    assert "status 400: No such model here" in refusal(openai_error("No such model here", "model"), "a b c")
    quoting = openai_error("your prompt, tell me how to zorvex it, is not to our taste", "prompt")
    message = refusal(quoting, "Tell me how to zorvex!")
    assert "(1 × status 400)" in message and "zorvex" not in message


def test_a_limit_that_is_told_by_its_name_is_no_refusal_of_the_field(tmp_path, caplog):
    told = "This model's maximum context length is 9 tokens, and max_tokens is 256"
    with ChatServer(lambda r: openai_error(told)) as server:
        with pytest.raises(ConnectionError, match="maximum context length is 9 tokens"):
            ask(server, tmp_path, ["w w w"])
        assert len(server.asked) == 1 and not caplog.text


def test_fields_of_ones_own_are_added_and_taken_away(tmp_path):
    fields = {"top_k": 1, "temperature": None, "chat_template_kwargs": {"enable_thinking": False}, "max_tokens": 5}
    with ChatServer(echo) as server:
        ask(server, tmp_path, ["a"])
        ask(server, tmp_path, ["a"], fields=fields)
        ask(server, tmp_path, ["a"], fields=fields)
        assert len(server.asked) == 2, "with other fields it is another request, and kept like any"
        sent = server.requests[1]
    assert sent | {"messages": 0, "model": 0} == {
        "messages": 0,
        "model": 0,
        "max_tokens": 5,
        "top_k": 1,
        "chat_template_kwargs": {"enable_thinking": False},
    }


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_a_thinking_that_the_server_keeps_apart_stands_before_the_answer(name, tmp_path):
    def reply(content, why="stop"):
        return Reply(
            body=json.dumps({"choices": [{"message": {"content": content, name: "hm"}, "finish_reason": why}]})
        )

    replies = {"both": reply("yes"), "cut": reply(None, "length"), "tags": reply("<think>hm</think>yes")}
    with ChatServer(lambda r: replies[last(r)]) as server:
        both, cut, tags = ask(server, tmp_path, list(replies))
    assert split_thinking(both.text) == ("hm", "yes", True) == split_thinking(tags.text)
    assert split_thinking(cut.text) == ("hm", "", False) and not cut.finished
