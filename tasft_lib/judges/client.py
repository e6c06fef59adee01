"""The official OpenAI client, for any server of its protocol: made in one way, its failures told in a few words.

The client itself repeats what may pass (408, 409, 429, 5xx, timeouts, lost connections) after what Retry-After says, up
to two minutes, or else a wait that doubles from half a second to eight. A failure is returned, not raised: an exception
of the client carries request, key and texts along.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

LONGEST_RETRY_AFTER = 120  # seconds that the client waits for
# Error codes that help and can be nothing that was asked; the rest of an error's body is never shown.
_CODES = ("content_filter", "context_length_exceeded", "insufficient_quota", "invalid_api_key", "model_not_found")


@dataclass(frozen=True)
class Failure:
    """Why there is no answer: an HTTP `status` with one of the known `code`s, or none of both; in `words`.

    `reason` is what the server itself wrote, which may quote prompt and key: for `served`, that shows what cannot.
    """

    words: str
    status: int | None = None
    code: str | None = None
    reason: str = field(default="", compare=False)


MALFORMED = Failure("malformed reply")


def key() -> str | None:
    """OPENAI_API_KEY, None where it is not set or empty."""
    return os.environ.get("OPENAI_API_KEY") or None


def make_client(api_key: str | None, base_url: str | None, *, timeout: float, retries: int, hooks: dict | None = None):
    """The client; `hooks` are its HTTP client's `event_hooks`. Raises `ValueError` where the package is missing."""
    try:
        import openai
    except ImportError as error:
        raise ValueError("asking a server takes the openai package: pip install 'tasft[serve]'") from error
    # At DEBUG it logs requests whole.
    logger = logging.getLogger("openai")
    logger.setLevel(max(logger.level, logging.INFO))
    return openai.OpenAI(
        api_key=api_key or "none",  # it insists on one; a server that needs none takes any
        base_url=base_url,
        timeout=timeout,
        max_retries=retries,
        http_client=openai.DefaultHttpxClient(event_hooks=hooks or {}),
    )


def attempt(call: Callable[[], Any]) -> Any:
    """What `call()` returns, or a `Failure`; a reply that it cannot read (ValueError, TypeError, ...) is malformed."""
    import openai

    try:
        return call()
    except openai.APIStatusError as error:
        code = error.code if error.code in _CODES else None
        words = f"status {error.status_code}" + (f", {code}" if code else "")
        seconds = error.response.headers.get("retry-after") or ""
        if seconds.isdigit() and int(seconds) > LONGEST_RETRY_AFTER:
            words += f", to be tried again in {int(seconds)} s"
        return Failure(words, error.status_code, code, _reason(error))
    except openai.APITimeoutError:
        return Failure("timeout")
    except openai.APIConnectionError:
        return Failure("no connection")
    except (openai.OpenAIError, ValueError, TypeError, AttributeError, LookupError):
        return MALFORMED


def _reason(error) -> str:
    """The message in an error's body, as OpenAI, TGI, FastAPI and others have it, with the field that it is about."""
    try:
        body = error.response.json()
    except ValueError:
        return ""
    found, field_name = body, None
    while isinstance(found, dict):
        field_name = found.get("param") if isinstance(found.get("param"), str) else field_name
        found = next((found[name] for name in ("error", "detail", "message", "msg") if found.get(name)), "")
    if isinstance(found, list):  # FastAPI's: where in the request, and what
        parts = [part for part in found if isinstance(part, dict)]
        found = "; ".join(f"{'.'.join(map(str, part.get('loc') or []))}: {part.get('msg')}" for part in parts)
    words = " ".join(str(found).split())
    return words if field_name is None or field_name in words else f"{field_name}: {words}"
