"""Answers of a model behind an OpenAI-compatible server: vLLM, llama.cpp, or an API.

The key is read from OPENAI_API_KEY and goes nowhere else. Messages name the server, status codes and counts, never what
was asked or what the server wrote back: servers quote prompts and keys in their errors.
"""

import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..files import append_record, checked, content_hash, progress_bar, read_records
from ..generation import GREEDY, Decoding, Response
from ..judges.client import MALFORMED, Failure, attempt, key, make_client

# A whole conversation of {"role": ..., "content": ...}, or a prompt, which is one user message.
Asked = str | list[dict[str, str]]
_FIRST_WAIT = 0.5  # seconds, after a malformed reply; doubled each time


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
    progress: bool | None = None,
) -> list[Response]:
    """Answer every prompt by `POST base_url/chat/completions`; responses come in the order of the prompts.

    A prompt is sent as one user message, to which the server applies the model's chat template. Greedy is temperature
    0; `max_tokens`, `top_p` and `seed` are sent too. A prompt that stands there a second time is another request, with
    the next seed. A server may add the checkpoint's own defaults, such as a repetition penalty: start vLLM with
    `--generation-config vllm`.

    Each answer is appended to `answers` as soon as it is there, under a hash of server, model, decoding and prompt;
    what the file holds is not asked again, so a run that was killed makes only the missing calls.

    What may pass is tried again by the client (see `judges.client`), a malformed reply by us. A failure is raised when
    all other prompts have been answered; at once only where going on is useless: key refused, model unknown, quota
    spent, or eight failures and not one answer.

    Args:
        prompts: texts, or conversations of `{"role": ..., "content": ...}`.
        answers: JSONL file in the folder of the run. It holds what the model said, not redacted.
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
    keys = _keys(prompts, endpoint, decoding)
    known = _read_answers(answers)
    missing = [i for i, key in enumerate(keys) if key not in known]
    if not missing:
        return [known[key] for key in keys]
    seeds = [decoding.seed + earlier for earlier in _occurrences(prompts)]
    failures: Counter[Failure] = Counter()
    stop, lock = threading.Event(), threading.Lock()
    client = _client(endpoint, timeout, retries, stop)

    def ask(i: int) -> Failure | None:
        """What went wrong, if anything. Answers are kept here, in the worker: an interrupt loses none in flight."""
        answer = _complete(client, _messages(prompts[i]), _settings(model, decoding, seeds[i]), retries, stop)
        if isinstance(answer, Failure):
            return answer
        with lock:
            append_record(answers, checked({"key": keys[i], **asdict(answer)}))
            known[keys[i]] = answer
        return None

    pool = ThreadPoolExecutor(concurrency)
    try:
        with progress_bar(total=len(missing), desc=f"asking {model}", unit="prompt", progress=progress) as bar:
            answered = 0
            for done in as_completed([pool.submit(ask, i) for i in missing]):
                failure = done.result()
                if failure is None:
                    answered += 1
                    bar.update()
                    continue
                failures[failure] += 1
                if _is_useless(failures, answered):
                    break
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        client.close()
    lost = [key for key in keys if key not in known]
    if lost:
        raise ConnectionError(_report(endpoint, failures, len(lost), len(missing), answers))
    return [known[key] for key in keys]


def missing_calls(prompts: Sequence[Asked], *, base_url: str, model: str, answers: Path, decoding: Decoding) -> int:
    """How many calls `generate_served` would make with the same arguments, retries apart."""
    known = _read_answers(answers)
    return sum(key not in known for key in _keys(prompts, Endpoint(base_url, model), decoding))


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


def _keys(prompts: Sequence[Asked], endpoint: Endpoint, decoding: Decoding) -> list[str]:
    for number, prompt in enumerate(prompts, start=1):
        if not prompt or not _messages(prompt)[-1]["content"].strip():
            raise ValueError(f"prompt {number} is empty: remove it from the list")
    server = endpoint.base_url.rstrip("/")
    settings = [_settings(endpoint.model, decoding, decoding.seed + earlier) for earlier in _occurrences(prompts)]
    return [content_hash([server, s, _messages(p)]) for s, p in zip(settings, prompts, strict=True)]


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
                known[key] = Response(text=text, n_tokens=n_tokens, finished=finished)
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
    if text is None:
        text = getattr(choice.message, "refusal", None)
    if text is None and why in ("length", "content_filter"):
        text = ""
    if not isinstance(text, str):
        raise TypeError("a reply without text")
    count = getattr(completion.usage, "completion_tokens", None)
    return Response(text=text.strip(), n_tokens=count if isinstance(count, int) else 0, finished=why == "stop")


def _is_useless(failures: Counter[Failure], answered: int) -> bool:
    """Whether the server will answer none of the other prompts either."""
    if any(f.status in (401, 404) or f.code == "insufficient_quota" for f in failures):
        return True
    # These are about one prompt: too long, or not to the taste of a gateway.
    of_one_prompt = sum(n for f, n in failures.items() if f.status in (400, 413, 422))
    return not answered and failures.total() - of_one_prompt >= 8


def _report(endpoint: Endpoint, failures: Counter[Failure], lost: int, asked: int, answers: Path) -> str:
    remedy = "run the same again to ask for the missing ones only"
    if any(f.status == 401 for f in failures):
        remedy = "set OPENAI_API_KEY to a key that this server takes"
        if not _is_private(endpoint):
            remedy += " and use https, since keys are not sent in the clear"
    elif any(f.status == 404 for f in failures):
        remedy = "check the address (up to /v1) and the name of the model"
    what = ", ".join(f"{n} × {failure.words}" for failure, n in failures.most_common())
    return (
        f"{endpoint.base_url}: {lost} of {asked} requests to {endpoint.model} have no answer ({what}); the others are "
        f"kept in {answers}: {remedy}"
    )
