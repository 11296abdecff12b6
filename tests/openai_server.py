"""A server on this machine that speaks OpenAI's protocol, as the model and as the judge."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from dpo_dist.sampling.judging import JUDGE_PROMPT

Reply = Callable[[str, dict[str, Any]], "str | int | None"]
"""What to answer to a path and a body: a text, an HTTP status, or None for silence."""


class Server:
    """Remembers what it was asked: path, body and headers."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.requests: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.url = ""

    def answer(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
        """Status and JSON."""
        self.requests.append((path, body, headers))
        said = self.reply(path, body)
        if said is None:
            time.sleep(2)
        if said is None or isinstance(said, int):
            return said or 500, {"error": {"message": f"no, {headers.get('Authorization')}"}}
        finish = "length" if said.endswith("...") else "stop"
        choice = {"message": {"role": "assistant", "content": said}} if "chat" in path else {"text": said}
        return 200, {"choices": [{"index": 0, "finish_reason": finish, **choice}]}


@contextmanager
def serving(reply: Reply, port: int = 0) -> Iterator[Server]:
    """Runs while the block does; port 0 is one that is free."""
    server = Server(reply)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # what a redirect would become
            self.do_POST()

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
            status, answer = server.answer(self.path, body, dict(self.headers))
            content = json.dumps(answer).encode()
            try:
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", f"{server.url}/elsewhere")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except OSError:  # the other side has given up
                pass

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def shown_to_judge(body: dict[str, Any]) -> tuple[str, str]:
    """Answers A and B."""
    text = body["messages"][0]["content"]
    before_a, before_b, after = (
        JUDGE_PROMPT.split(mark)[1].split("{")[0] for mark in ("{prompt}", "{first}", "{second}")
    )
    rest = text.split(before_a, 1)[1]
    first, rest = rest.split(before_b, 1)
    return first, rest.rsplit(after, 1)[0]


def longer(path: str, body: dict[str, Any]) -> str:
    """A judge that likes length."""
    first, second = shown_to_judge(body)
    return "A" if len(first) > len(second) else "B" if len(second) > len(first) else "TIE"
