"""A file of a web server, by the standard library: fsspec would need aiohttp for it."""

import base64
import http.client
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dpo_dist.data.remote_file import Readable, State

_TIMEOUT_S = 60.0  # without a byte
_TRY_AGAIN = frozenset({408, 425, 429})  # and all from 500 on
_NO_ADDRESS = "a space, a letter beyond ASCII or a port that is no number; write such a character as %20 and the like"
_VALIDATORS = ("ETag", "Last-Modified", "Content-Length")


@dataclass(frozen=True)
class WebFile:
    """What a URL of http or https names. Proxies are those of the environment."""

    url: str

    def state(self) -> State:
        """What the server says of the content, without reading it.

        A signed address may be read, and often not be asked with HEAD.
        """
        with self._answer() as answer:
            found = {name: answer.headers[name] for name in _VALIDATORS if answer.headers[name] is not None}
        size = found.get("Content-Length")
        return State(found if len(found) > (size is not None) else {}, int(size) if size is not None else None)

    @contextmanager
    def open(self) -> Iterator[Readable]:
        """The content, as it is stored; raises one of `REFUSED` where trying again is idle."""
        with self._answer() as answer:
            yield answer

    @contextmanager
    def _answer(self) -> Iterator[http.client.HTTPResponse]:
        try:
            with urllib.request.urlopen(self._request(), timeout=_TIMEOUT_S) as answer:
                yield answer
        except urllib.error.HTTPError as error:
            with error:
                said = f"HTTP {error.code} {error.reason}"
            if error.code in (404, 410):
                raise FileNotFoundError(said) from error
            if error.code in (401, 403):
                raise PermissionError(said) from error
            if error.code in _TRY_AGAIN or error.code >= 500:
                raise ConnectionError(said) from error
            raise ValueError(said) from error
        except urllib.error.URLError as error:
            raise ConnectionError(str(error.reason)) from error
        except http.client.InvalidURL as error:
            raise ValueError(_NO_ADDRESS) from error  # its text quotes the query
        except UnicodeError as error:
            raise ValueError(_NO_ADDRESS) from error
        except http.client.HTTPException as error:
            raise ConnectionError(f"{type(error).__name__}: {error}") from error

    def _request(self) -> urllib.request.Request:
        parts = urllib.parse.urlsplit(self.url)
        user, at, host = parts.netloc.rpartition("@")
        path = urllib.parse.quote(parts.path, safe="/%:@!$&'()*+,;=~-._")
        request = urllib.request.Request(urllib.parse.urlunsplit((parts.scheme, host, path, parts.query, "")))
        if at:
            # Not sent to where the server may send us on.
            token = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {token}")
        return request
