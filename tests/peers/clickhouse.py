"""ClickHouse's own engine, as chdb has it, behind the HTTP interface that its clients and the Collector's exporter use.

chdb is ClickHouse without its server. What is here in place of that hands queries and blocks on, and nothing else.
"""

import json
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.integration.collector import free_port
from tests.peers.server import serving

DATABASE = "otel"
BLOCK_INFO = bytes([1, 0, 2, 0xFF, 0xFF, 0xFF, 0xFF, 0])


def build() -> None:
    """Nothing is built, but it may be missing.

    Raises:
        LookupError: there is no chdb here.
    """
    if find_spec("chdb") is None:
        raise LookupError("chdb is not installed: there is no ClickHouse to ask")


@dataclass(frozen=True)
class ClickHouse:
    """One that is running."""

    url: str

    @property
    def endpoint(self) -> str:
        """Where a Collector sends to."""
        return self.url

    def query(self, sql: str, **parameters: object) -> list[dict[str, Any]]:
        """The rows of an answer; `parameters` are those that stand in braces in the query.

        Raises:
            RuntimeError: ClickHouse refuses the query; the message is its own.
        """
        given = {f"param_{name}": str(value) for name, value in parameters.items()}
        flags = urllib.parse.urlencode({"database": DATABASE, "default_format": "JSONEachRow", **given})
        try:
            with urllib.request.urlopen(f"{self.url}/?{flags}", sql.encode(), timeout=60) as response:
                return [json.loads(line) for line in response.read().splitlines()]
        except urllib.error.HTTPError as refusal:
            raise RuntimeError(refusal.read().decode()) from None


@contextmanager
def started(directory: Path) -> Iterator[ClickHouse]:
    """Start it with an empty store in a directory, on loopback; raises what `build` does."""
    build()
    port = free_port()
    command = [sys.executable, "-m", "tests.peers.clickhouse", str(port), str(directory / "clickhouse")]
    with serving(command, port, directory / "clickhouse.log") as url:
        yield ClickHouse(url)


def _number(value: int) -> bytes:
    """An unsigned LEB128."""
    return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80]) + _number(value >> 7)


def _text(value: str) -> bytes:
    return _number(len(value.encode())) + value.encode()


class Server:
    """A WSGI application over one session of chdb."""

    def __init__(self, store: str) -> None:
        from chdb.session import Session  # half a gigabyte, which only the process of this server wants

        self._session = Session(store)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer one request."""
        flags = dict(urllib.parse.parse_qsl(environ["QUERY_STRING"]))
        body = environ["wsgi.input"].read()
        try:
            if "query" in flags:
                answer = self._insert(flags["query"], body)
            elif "revision()" in (sql := body.decode()):
                answer = self._hello()
            else:
                answer = self._ask(sql, flags)
        except RuntimeError as refusal:
            start_response("500 Internal Server Error", [("Content-Type", "text/plain")])
            return [str(refusal).encode()]
        start_response("200 OK", [("Content-Length", str(len(answer)))])
        return [answer]

    def _ask(self, sql: str, flags: dict[str, str]) -> bytes:
        self._session.query(f"USE `{flags.get('database', 'default')}`")
        parameters = {name.removeprefix("param_"): text for name, text in flags.items() if name.startswith("param_")}
        return bytes(self._session.query(sql, flags["default_format"], params=parameters).bytes() or b"")

    def _insert(self, sql: str, rows: bytes) -> bytes:
        into, _, form = sql.rpartition(" FORMAT ")
        with tempfile.NamedTemporaryFile() as file:
            file.write(rows)
            file.flush()
            self._session.query(f"{into} SELECT * FROM file('{file.name}', {form})")
        return b""

    def _hello(self) -> bytes:
        """Who is there, and that it writes blocks as revision 0 has them, which is how chdb does.

        The driver wants this one block as its own revision has it.
        """
        asked = self._session.query("SELECT displayName(), version(), timezone()", "JSONCompactEachRow")
        name, version, zone = json.loads(str(asked))
        strings = {"displayName()": name, "version()": version, "timezone()": zone}
        columns = [_text(column) + _text("String") + b"\0" + _text(value) for column, value in strings.items()]
        columns.insert(2, _text("revision()") + _text("UInt32") + b"\0" + bytes(4))
        return BLOCK_INFO + _number(len(columns)) + _number(1) + b"".join(columns)


if __name__ == "__main__":
    import waitress

    waitress.serve(Server(sys.argv[2]), host="127.0.0.1", port=int(sys.argv[1]), threads=1)
