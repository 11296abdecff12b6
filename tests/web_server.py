"""A web server for tests: files of a folder, and answers that go wrong when asked to."""

import base64
import hashlib
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class WebServer(ThreadingHTTPServer):
    """Serves `folder`; what it is asked is counted."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.answers: list[int | str] = []
        """Status of the next answers; "cut" breaks off in the middle. 200 when it is empty."""
        self.login: str | None = None
        self.tells_versions = True
        self.requests = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def put(self, name: str, content: bytes) -> None:
        (self.folder / name).write_bytes(content)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that closes early is meant to."""


class _Handler(BaseHTTPRequestHandler):
    server: WebServer

    def do_GET(self) -> None:
        self.server.requests += 1
        answer = self.server.answers.pop(0) if self.server.answers else 200
        file = self.server.folder / urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).lstrip("/")
        if self.server.login is not None:
            expected = "Basic " + base64.b64encode(self.server.login.encode()).decode()
            answer = answer if self.headers["Authorization"] == expected else 401
        if not file.is_file():
            answer = 404
        if answer not in (200, "cut"):
            self.send_error(int(answer))
            return
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        if self.server.tells_versions:
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()[:16]}"')
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if answer == "cut" else content)

    def log_message(self, format: str, *args: object) -> None:
        """Standard error is the tests'."""


@contextmanager
def serving(folder: Path) -> Iterator[WebServer]:
    """A server in a thread of this process."""
    with WebServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
