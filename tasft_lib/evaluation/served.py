"""Answers of a model behind an OpenAI-compatible server: vLLM, llama.cpp, or an API.

The key is read from OPENAI_API_KEY and goes nowhere else. Messages name the server, status codes and counts, and why
the server refuses in its own words, unless they quote what was asked or the key.
"""

import logging
import re
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..generation import GREEDY, Decoding, Response
from ..judges.client import MALFORMED, Failure, attempt, key, make_client
from ..records.templates import CLOSING, OPENING
from ..storage.files import append_record, checked, content_hash, progress_bar, read_records

logger = logging.getLogger(__name__)
# A whole conversation of {"role": ..., "content": ...}, or a prompt, which is one user message.
Asked = str | list[dict[str, str]]
_FIRST_WAIT = 0.5  # seconds, after a malformed reply; doubled each time
# Fields of a request that a server may do without, when it names one in refusing it; `max_tokens` has another name.
_OPTIONAL = ("temperature", "top_p", "seed")
_REFUSALS = (400, 403, 404, 405, 413, 415, 422)
_LONGEST_REASON = 200  # characters
# Of scripts that put no spaces between words each character.
_WORD = r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]|[^\W_]+"
# Where servers put a model's thinking: vLLM, SGLang, DeepSeek; OpenRouter and newer vLLM.
_REASONING = ("reasoning_content", "reasoning")


@dataclass(frozen=True)
class Endpoint:
    """A served model: the server's address up to "/v1", and the name under which the server has the model."""

    base_url: str
    model: str

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("the served model has no name: give the one that the server lists under /v1/models")
        try:
            parts = urlsplit(self.base_url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            usable = False
        # The message does not quote the address, which may hold a password.
        if not usable or parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                "the address of a server is http(s)://host[:port]/v1, without user, password or query: correct it; a "
                "key belongs in OPENAI_API_KEY"
            )


def generate_served(
    prompts: Sequence[Asked],
    *,
    base_url: str,
    model: str,
    answers: Path,
    decoding: Decoding = GREEDY,
    concurrency: int = 8,
    timeout: float = 120.0,
    retries: int = 6,
    fields: dict[str, Any] | None = None,
    progress: bool | None = None,
) -> list[Response]:
    """Answer every prompt by `POST base_url/chat/completions`; responses come in the order of the prompts.

    A prompt is sent as one user message, to which the server applies the model's chat template. Greedy is temperature
    0, and `max_tokens` is sent; a draw has `temperature`, `top_p` and `seed`. A prompt that stands there a second time
    is another request, with the next seed. A server may add the checkpoint's own defaults, such as a repetition
    penalty: start vLLM with `--generation-config vllm`.

    A server that names one of these fields in refusing a request is asked without it from then on (`max_tokens` is then
    called `max_completion_tokens`), and a warning says so: answers are no longer greedy where it takes no temperature.
    What a server reports as reasoning stands in the answer in <think> and </think>.

    Each answer is appended to `answers` as soon as it is there, under a hash of server, model, decoding and prompt;
    what the file holds is not asked again, so a run that was killed makes only the missing calls.

    What may pass is tried again by the client (see `judges.client`), a malformed reply by us. A failure is raised when
    all other prompts have been answered; at once only where going on is useless: key refused, model unknown, quota
    spent, or eight failures and not one answer.

    Args:
        prompts: texts, or conversations of `{"role": ..., "content": ...}`.
        answers: JSONL file in the folder of the run. It holds what the model said, not redacted.
        fields: what each request has besides, or in place of the above; without a field whose value is None.
        timeout: seconds that one attempt may take.
        retries: further attempts at each prompt.
        progress: True or False forces the bar on or off; None shows it on a terminal.

    Returns:
        `n_tokens` is what the server counts, 0 where it counts nothing. `finished` is False for an answer cut off by
        `max_new_tokens` or withheld by a content filter (its text is what came through, mostly nothing).

    Raises:
        ValueError: beams, an impossible address or setting, an empty prompt, or no `openai` package.
        ConnectionError: some prompts have no answer; the finished ones are kept.
    """
    endpoint = Endpoint(base_url, model)
    if concurrency < 1 or retries < 0 or timeout <= 0:
        raise ValueError(
            f"concurrency and timeout must be above 0, retries 0 or more: {concurrency}, {timeout}, {retries}"
        )
    keys = _keys(prompts, endpoint, decoding, fields)
    known = _read_answers(answers)
    missing = [i for i, key in enumerate(keys) if key not in known]
    if not missing:
        return [known[key] for key in keys]
    seeds = [decoding.seed + earlier for earlier in _occurrences(prompts)]
    reasons: dict[Failure, str] = {}
    stop, lock = threading.Event(), threading.Lock()
    client = _client(endpoint, timeout, retries, stop)
    dialect = _Dialect(fields or {})

    def ask(i: int) -> Failure | None:
        """What went wrong, if anything. Answers are kept here, in the worker: an interrupt loses none in flight."""
        messages = _messages(prompts[i])
        while True:
            request = dialect.request(_sent(decoding, seeds[i]))
            # In extra_body the client takes fields that are not OpenAI's, too.
            answer = _complete(client, messages, {"model": model, "extra_body": request}, retries, stop)
            if not isinstance(answer, Failure):
                break
            reason = _showable(answer, messages)
            if not dialect.learns(answer, reason, request):
                with lock:
                    reasons.setdefault(answer, reason)
                return answer
        with lock:
            append_record(answers, checked({"key": keys[i], **asdict(answer)}))
            known[keys[i]] = answer
        return None

    pool = ThreadPoolExecutor(concurrency)
    try:
        with progress_bar(total=len(missing), desc=f"asking {model}", unit="prompt", progress=progress) as bar:
            failures = _failures([pool.submit(ask, i) for i in missing], bar)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        client.close()
    lost = [key for key in keys if key not in known]
    if lost:
        raise ConnectionError(_report(endpoint, failures, reasons, len(lost), len(missing), answers))
    return [known[key] for key in keys]


def missing_calls(
    prompts: Sequence[Asked],
    *,
    base_url: str,
    model: str,
    answers: Path,
    decoding: Decoding,
    fields: dict[str, Any] | None = None,
) -> int:
    """How many calls `generate_served` would make with the same arguments, retries apart."""
    known = _read_answers(answers)
    return sum(key not in known for key in _keys(prompts, Endpoint(base_url, model), decoding, fields))


class _Dialect:
    """What this server understands of a request; several threads learn it together."""

    def __init__(self, fields: dict[str, Any]):
        self._fields, self._refused = fields, set()
        self._lock = threading.Lock()

    def request(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings with the caller's own fields, as this server takes them."""
        known = {_renamed(name) if name in self._refused else name: value for name, value in settings.items()}
        known = {name: value for name, value in known.items() if name is not None} | self._fields
        return {name: value for name, value in known.items() if value is not None}

    def learns(self, failure: Failure, reason: str, request: dict[str, Any]) -> bool:
        """Whether the server has refused a field of ours by its name, so that it may be asked without it."""
        if failure.status not in (400, 422) or failure.code is not None:
            return False
        ours = [name for name in ("max_tokens", *_OPTIONAL) if name in request and name not in self._fields]
        named = [name for name in ours if re.search(rf"\b{name}\b", reason)]
        if "max_completion_tokens" not in reason:  # then it is about their number
            named = [name for name in named if name != "max_tokens"]
        # Where two do not go together, the one that decides more stays.
        named = named[-1:] if "temperature" in named else named
        with self._lock:
            new = set(named) - self._refused
            self._refused |= new
        for name in new:
            instead = f"called {_renamed(name)}" if _renamed(name) else "left out"
            sampled = "; answers are drawn as it draws by itself" if name == "temperature" else ""
            logger.warning("the server refuses %s, which is %s from now on%s", name, instead, sampled)
        return bool(named)


def _renamed(name: str) -> str | None:
    return "max_completion_tokens" if name == "max_tokens" else None


def _messages(asked: Asked) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked}] if isinstance(asked, str) else asked


def _occurrences(prompts: Sequence[Asked]) -> list[int]:
    """How often each prompt has stood in the list before."""
    seen: Counter[str] = Counter()
    earlier = []
    for prompt in prompts:
        name = content_hash(_messages(prompt))
        earlier.append(seen[name])
        seen[name] += 1
    return earlier


def _keys(
    prompts: Sequence[Asked], endpoint: Endpoint, decoding: Decoding, fields: dict[str, Any] | None = None
) -> list[str]:
    for number, prompt in enumerate(prompts, start=1):
        if not prompt or not _messages(prompt)[-1]["content"].strip():
            raise ValueError(f"prompt {number} is empty: remove it from the list")
    server = endpoint.base_url.rstrip("/")
    settings = [_settings(endpoint.model, decoding, decoding.seed + earlier) for earlier in _occurrences(prompts)]
    more = [fields] if fields else []
    return [content_hash([server, s, _messages(p), *more]) for s, p in zip(settings, prompts, strict=True)]


def _sent(decoding: Decoding, seed: int) -> dict[str, Any]:
    """`_settings` without what has no effect on a greedy answer: some servers refuse fields at their neutral value."""
    settings = _settings("", decoding, seed)
    without_effect = ("model",) if decoding.do_sample else ("model", "top_p", "seed")
    return {name: value for name, value in settings.items() if name not in without_effect}


def _settings(model: str, decoding: Decoding, seed: int) -> dict[str, Any]:
    if decoding.num_beams > 1:
        raise ValueError(f"a chat server has no beams: set num_beams=1 (it is {decoding.num_beams}), or run it locally")
    sampled = decoding.do_sample
    return {
        "model": model,
        "max_tokens": decoding.max_new_tokens,
        "temperature": decoding.temperature if sampled else 0.0,
        "top_p": decoding.top_p if sampled else 1.0,
        "seed": seed,
    }


def _read_answers(path: Path) -> dict[str, Response]:
    known = {}
    for record in read_records(Path(path)):
        match record:
            case {"key": str(key), "text": str(text), "n_tokens": int(n_tokens), "finished": bool(finished)}:
                known[key] = Response(text=_whole(text), n_tokens=n_tokens, finished=finished)
    return known


def _client(endpoint: Endpoint, timeout: float, retries: int, stop: threading.Event):
    def spare(response) -> None:
        """No retry once an interrupt has come, nor of a spent quota, whose status is that of a full hour."""
        if stop.is_set() or (response.status_code == 429 and b"insufficient_quota" in response.read()):
            response.headers["x-should-retry"] = "false"

    own_key = key() if _is_private(endpoint) else None
    return make_client(own_key, endpoint.base_url, timeout=timeout, retries=retries, hooks={"response": [spare]})


def _is_private(endpoint: Endpoint) -> bool:
    """Whether a key may travel there: encrypted, or within this machine."""
    parts = urlsplit(endpoint.base_url)
    return parts.scheme == "https" or parts.hostname in ("localhost", "127.0.0.1", "::1")


def _complete(client, messages: list[dict], settings: dict, retries: int, stop: threading.Event) -> Response | Failure:
    """The answer, or why there is none. The client retries, but for a malformed reply, which it does not see as one."""
    for number in range(retries + 1):
        if stop.is_set():
            return Failure("stopped")
        answer = attempt(lambda: _response(client.chat.completions.create(messages=messages, **settings)))
        if answer is not MALFORMED:
            break
        stop.wait(_FIRST_WAIT * 2 ** min(number, 4))
    if isinstance(answer, Failure) and (answer.status, answer.code) == (400, "content_filter"):
        return Response(text="", n_tokens=0, finished=False)
    return answer


def _response(completion) -> Response:
    choice = completion.choices[0]
    text, why = choice.message.content, choice.finish_reason
    thinking = next((t for n in _REASONING if isinstance(t := getattr(choice.message, n, None), str) and t.strip()), "")
    if thinking and not (text or "").lstrip().startswith(OPENING):
        text = f"{OPENING}\n{thinking.strip()}\n" + (f"{CLOSING}\n\n{text}" if text else "")
    if text is None:
        text = getattr(choice.message, "refusal", None)
    if text is None and why in ("length", "content_filter"):
        text = ""
    if not isinstance(text, str):
        raise TypeError("a reply without text")
    count = getattr(completion.usage, "completion_tokens", None)
    return Response(text=_whole(text.strip()), n_tokens=count if isinstance(count, int) else 0, finished=why == "stop")


def _whole(text: str) -> str:
    """The text with "?" for each half of a character: JSON can hold one, where a limit cut an emoji, no file can."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _failures(asking: list[Future[Failure | None]], bar) -> Counter[Failure]:
    """What went wrong, counted as it comes, and answers counted on the bar; ends early where going on is useless."""
    failures: Counter[Failure] = Counter()
    answered = 0
    for done in as_completed(asking):
        failure = done.result()
        if failure is None:
            answered += 1
            bar.update()
            continue
        failures[failure] += 1
        if _is_useless(failures, answered):
            break
    return failures


def _is_useless(failures: Counter[Failure], answered: int) -> bool:
    """Whether the server will answer none of the other prompts either."""
    if any(f.status in (401, 404) or f.code == "insufficient_quota" for f in failures):
        return True
    # These are about one prompt: too long, or not to the taste of a gateway.
    of_one_prompt = sum(n for f, n in failures.items() if f.status in (400, 413, 422))
    return not answered and failures.total() - of_one_prompt >= 8


def _showable(failure: Failure, messages: list[dict]) -> str:
    """Why the server refuses this request, in its own words; "" where they may quote what was asked, or the key."""
    reason, secret = failure.reason if failure.status in _REFUSALS else "", key() or ""
    pieces = [secret[i : i + 6] for i in range(0, len(secret) - 5)] + [
        piece for message in messages for piece in _pieces(message["content"])
    ]
    folded = f" {' '.join(re.findall(_WORD, reason.casefold()))} "
    if any(piece in reason or piece in folded for piece in pieces):
        return ""
    return reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]}…"


def _pieces(text: str) -> set[str]:
    """What a quotation of the text would hold: three of its words in a row, or all where there are fewer."""
    words = re.findall(_WORD, text.casefold())
    return {f" {' '.join(words[i : i + 3])} " for i in range(max(len(words) - 2, 1))} if words else set()


def _report(
    endpoint: Endpoint, failures: Counter[Failure], reasons: dict[Failure, str], lost: int, asked: int, answers: Path
) -> str:
    remedy = "run the same again to ask for the missing ones only"
    if any(f.status == 401 for f in failures):
        remedy = "set OPENAI_API_KEY to a key that this server takes"
        if not _is_private(endpoint):
            remedy += " and use https, since keys are not sent in the clear"
    elif any(f.status == 404 for f in failures):
        remedy = "check the address (up to /v1) and the name of the model"
    elif any(f.status in (400, 422) and f.code is None for f in failures):
        remedy = "--request_fields adds a field to the requests or leaves one out; " + remedy
    words = {failure: ": ".join(filter(None, [failure.words, reasons.get(failure)])) for failure in failures}
    what = ", ".join(f"{n} × {words[failure]}" for failure, n in failures.most_common())
    return (
        f"{endpoint.base_url}: {lost} of {asked} requests to {endpoint.model} have no answer ({what}); the others are "
        f"kept in {answers}: {remedy}"
    )
