"""In place of Elasticsearch or OpenSearch, which cannot be had as a Go module: the one request that exporters make.

`POST /_bulk` has a line for each action and one for its document. A document is taken where its action and it are what
either server would take: `create` or `index` into a named index, and a JSON object.
"""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Bulk:
    """What was taken: each document, with the index that it was for. Headers are in lower case."""

    url: str = ""
    documents: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    headers: set[tuple[str, str]] = field(default_factory=set)

    def of(self, index: str) -> list[dict[str, Any]]:
        """The documents of indices whose names begin so."""
        return [document for name, document in self.documents if name.startswith(index)]


@contextmanager
def bulk() -> Iterator[Bulk]:
    """Serve on loopback."""
    taken = Bulk()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers["content-encoding"] == "gzip":
                body = gzip.decompress(body)
            taken.headers |= {(name.lower(), value.lower()) for name, value in self.headers.items()}
            path, _, _ = self.path.partition("?")
            known = path.rpartition("/")[2] == "_bulk"
            answer = {"errors": False, "items": _take(taken, body)} if known else {}
            self._answer(200 if known else 404, answer)

        def do_GET(self) -> None:
            self._answer(200, {"version": {"number": "8.18.0", "build_flavor": "default"}})

        def _answer(self, status: int, answer: dict[str, Any]) -> None:
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("x-elastic-product", "Elasticsearch")
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    taken.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield taken
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _take(taken: Bulk, body: bytes) -> list[dict[str, Any]]:
    lines = body.splitlines()
    answers = []
    for action, document in zip(lines[::2], lines[1::2], strict=True):
        ((kind, where),) = json.loads(action).items()
        found = json.loads(document)
        if kind not in ("create", "index") or not where.get("_index") or not isinstance(found, dict):
            taken.refused.append(f"{action!r} {document!r}")
            answers.append({kind: {"status": 400, "error": {"type": "illegal_argument_exception"}}})
            continue
        taken.documents.append((where["_index"], found))
        answers.append({kind: {"_index": where["_index"], "status": 201}})
    return answers
