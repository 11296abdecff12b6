"""Requests to an OpenAI-compatible server, with patience."""

import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from dpo_dist.errors import ConfigError

# Seconds before each further attempt.
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
_LONGEST_WAIT = 60.0
_TRANSIENT = frozenset({408, 409, 425, 429})
_SHOWN = 300  # letters of what a server says


class Client:
    """A server under an address.

    Args:
        option: that named it, for messages.
        url: with or without `/v1` at its end.
        api_key: sent with each request, and shown nowhere; None: none.
        timeout: seconds for each request.
    Raises:
        ConfigError: this is no address.
    """

    def __init__(self, option: str, url: str, api_key: str | None, timeout: float) -> None:
        # Others would make urllib read local files.
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{option}={url} is no address of a server; give one such as http://localhost:8000")
        self._option, self._url = option, url.rstrip("/").removesuffix("/v1")
        self._api_key, self._timeout = api_key, timeout
        self._opener = urllib.request.build_opener(_NoRedirect)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The first of the answer's choices.

        Raises:
            ConfigError: the server refuses the request, or does not answer it in any attempt.
        """
        said = ""
        for wait in (*WAITS, None):
            try:
                choice = self._once(path, body)["choices"][0]
                return choice if isinstance(choice, dict) else {}
            except urllib.error.HTTPError as error:
                with error:
                    said = self._said(error)
                if error.code < 500 and error.code not in _TRANSIENT:
                    raise self._error(f"refuses {path}: {said}", "correct what it names") from None
                pause = _asked_to_wait(error)
            # No connection, no answer in time, half an answer, or one of another kind.
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
                said, pause = f"{type(error).__name__}: {getattr(error, 'reason', error)}", 0.0
            if wait is not None:
                time.sleep(max(wait, pause))
        what = f"gave no answer to {path} in {len(WAITS) + 1} attempts, at last {self._hidden(said)}"
        raise self._error(what, "see that it runs, or raise --timeout")

    def _once(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        request = urllib.request.Request(f"{self._url}/v1/{path}", json.dumps(body).encode(), headers, method="POST")
        with self._opener.open(request, timeout=self._timeout) as response:
            return json.load(response)

    def _said(self, error: urllib.error.HTTPError) -> str:
        try:
            text = error.read(10_000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            text = ""
        return self._hidden(f"{error.code} {' '.join(text.split())}".strip())[:_SHOWN]

    def _hidden(self, text: str) -> str:
        return text.replace(self._api_key, "***") if self._api_key else text

    def _error(self, what: str, way_out: str) -> ConfigError:
        return ConfigError(
            f"{self._option}={self._url} {what}; {way_out}. What it has answered is kept, and the same command goes "
            "on from there"
        )


def text_of(choice: dict[str, Any]) -> str | None:
    """What a choice says, as UTF-8 can hold it; None: nothing."""
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    return text.encode("utf-8", "replace").decode() if isinstance(text, str) else None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would send the key to wherever a server points."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        return None


def _asked_to_wait(error: urllib.error.HTTPError) -> float:
    try:
        return min(float(error.headers.get("Retry-After") or 0), _LONGEST_WAIT)
    except ValueError:  # a date
        return 0.0


def all_of(calls: Sequence[Callable[[], None]], num_at_once: int, told: Callable[[int], None]) -> None:
    """Make the calls, some at a time. After an error no further one begins; those that have begun come to their end.

    Args:
        calls: each keeps what it finds.
        num_at_once: threads.
        told: is given the number of those that are done.
    """
    failed = threading.Event()

    def unless_failed(call: Callable[[], None]) -> None:
        if failed.is_set():
            return
        try:
            call()
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(num_at_once) as pool:
        futures = [pool.submit(unless_failed, call) for call in calls]
        try:
            for num_done, future in enumerate(as_completed(futures), start=1):
                future.result()
                told(num_done)
        except BaseException:
            failed.set()
            raise
