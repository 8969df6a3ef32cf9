"""A kubelet by its protocol: what it is told, what it may say, and who it must be.

The real one is asked in tests/integration/test_integration_node.py.
"""

import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import trustme
from kubernetes import client as kubernetes_client

from tcpio_otel.attribution.kubelet import Kubelet, RefusedError
from tcpio_otel.attribution.kubernetes import NodePods
from tcpio_otel.attribution.pods import Wanted
from tcpio_otel.errors import EnvironmentFault
from tests.kernel.harness import wait_for

NODE, TOKEN = "node-1", "bearer of-the-agent"
AWAY = "cannot reach it: Failed to establish a new connection: [Errno 111] Connection refused"
HASH = "0123456789abcdef0123456789abcdef"


def pod(uid: str, name: str, **annotations: str) -> dict[str, Any]:
    metadata = {"uid": uid, "name": name, "namespace": "shop", "annotations": annotations}
    return {"metadata": metadata, "spec": {"nodeName": NODE}, "status": {}}


class Server(HTTPServer):
    """Answers as it is told, and keeps what it was asked."""

    status, body = 200, b"{}"

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None]] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    def tell(self, *items: dict[str, Any]) -> None:
        self.status, self.body = 200, json.dumps({"kind": "PodList", "items": list(items) or None}).encode()


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["authorization"]))
        self.send_response(self.server.status)
        self.send_header("content-length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca(authority: trustme.CA, tmp_path: Path) -> Path:
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    return tmp_path / "ca.pem"


@pytest.fixture
def server(authority: trustme.CA) -> Iterator[Server]:
    made = Server()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(NODE).configure_cert(context)
    made.socket = context.wrap_socket(made.socket, server_side=True)
    with serving(made):
        yield made


def settings(ca: Path | None = None) -> Any:
    made = kubernetes_client.Configuration()
    made.api_key["authorization"] = TOKEN
    made.ssl_ca_cert = None if ca is None else str(ca)
    made.host, made.retries = "https://127.0.0.1:1", False  # where nobody answers
    return made


def url(server: Server, scheme: str = "https") -> str:
    return f"{scheme}://127.0.0.1:{server.server_port}"


def refused(ask: Callable[[], object]) -> str:
    with pytest.raises(RefusedError) as caught:
        ask()
    return str(caught.value)


def test_it_is_asked_with_the_token_of_the_agent(server: Server, ca: Path) -> None:
    server.tell(pod("uid-1", "web"))
    kubelet = Kubelet(url(server) + "/", NODE, settings(ca), None)
    assert [item["metadata"]["name"] for item in kubelet.pods()] == ["web"]
    server.tell()
    assert kubelet.pods() == []
    assert server.asked == [("/pods", TOKEN)] * 2


def test_a_certificate_of_its_own_will_do(server: Server, ca: Path) -> None:
    server.tell(pod("uid-1", "web"))
    assert Kubelet(url(server), NODE, settings(None), ca).pods()


def test_no_token_is_sent_in_the_clear() -> None:
    with serving(Server()) as server:
        server.tell(pod("uid-1", "web"))
        assert Kubelet(url(server, "http"), NODE, settings(), None).pods()
        assert server.asked == [("/pods", None)]


def test_another_node_is_not_believed(server: Server, ca: Path) -> None:
    with pytest.raises(Exception, match="Hostname mismatch, certificate is not valid for 'node-2'"):
        Kubelet(url(server), "node-2", settings(ca), None).pods()
    trustme.CA().cert_pem.write_to_path(other := ca.with_name("other.pem"))
    with pytest.raises(Exception, match="certificate verify failed"):
        Kubelet(url(server), NODE, settings(ca), other).pods()
    assert server.asked == []


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (401, b"Unauthorized", "401 Unauthorized"),
        (403, b"Forbidden (user=x,\n verb=get)", "403 Forbidden (user=x, verb=get)"),
        (500, b"", "500 Internal Server Error"),
        (200, b"<html>", "it says what no kubelet says"),
        (200, b"[]", "it says what no kubelet says"),
        (200, b"{}", "it says what no kubelet says"),
    ],
)
def test_what_is_no_list_of_pods_is_said(server: Server, ca: Path, status: int, body: bytes, words: str) -> None:
    server.status, server.body = status, body
    assert refused(Kubelet(url(server), NODE, settings(ca), None).pods) == words


def test_certificates_are_read_at_once(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="nowhere for the kubelet: No such file or directory"):
        Kubelet("https://127.0.0.1:10250", NODE, settings(), tmp_path / "nowhere")
    (tmp_path / "ca.pem").write_text("no certificate")
    with pytest.raises(EnvironmentFault, match=r"ca\.pem for the kubelet: "):
        Kubelet("https://127.0.0.1:10250", NODE, settings(), tmp_path / "ca.pem")


def test_it_stands_in_for_the_api_server(server: Server, ca: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Pods come and go by its account; when it refuses, what is known stays, and the log has both reasons."""
    server.tell(pod("uid-1", "web"), pod(HASH, "etcd", **{"kubernetes.io/config.hash": HASH}))
    clock = [0.0]
    kubelet = Kubelet(url(server), NODE, settings(ca), None)
    with NodePods(
        kubernetes_client.ApiClient(settings(ca)), NODE, Wanted(), kubelet=kubelet, clock=lambda: clock[0]
    ) as pods:
        wait_for(lambda: "kubelet" in pods.fault, "the kubelet to be asked")
        assert pods.fault == f"{AWAY}; the kubelet tells of them instead"
        assert pods["uid-1"]
        assert pods[HASH]
        server.tell(pod("uid-2", "cart"), pod(HASH, "etcd", **{"kubernetes.io/config.hash": HASH}))
        wait_for(lambda: pods["uid-2"], "the pod that followed")
        assert pods["uid-1"]  # its last records may still come
        clock[0] = 1000.0
        server.status, server.body = 401, b"Unauthorized"
        wait_for(lambda: "401" in pods.fault, "the refusal", 30)
        assert pods.fault == f"{AWAY}; the kubelet: 401 Unauthorized"
        assert pods["uid-2"]
        assert pods["uid-1"] is None
    assert [record.getMessage().rpartition("; ")[2] for record in caplog.records] == [
        "the kubelet tells of them instead",
        "the kubelet: 401 Unauthorized",
    ]


def test_static_pods_keep_the_uid_of_the_api_server() -> None:
    """The kubelet knows them by their hash; whoever tells last, they are one pod, and it does not go."""
    mirror = pod("uid-of-mirror", "etcd", **{"kubernetes.io/config.hash": HASH})
    static = pod(HASH, "etcd", **{"kubernetes.io/config.hash": HASH})
    clock = [0.0]
    pods = NodePods(kubernetes_client.ApiClient(settings()), NODE, Wanted(), clock=lambda: clock[0])

    def told(item: dict[str, Any]) -> str:
        uid = item["metadata"]["uid"]
        pods.take(uid, item)
        pods.listed({uid})
        clock[0] += 1000
        pods.pause()
        assert len(pods) == 1
        found = pods[HASH]
        assert found
        return found.attributes["k8s.pod.uid"]

    assert [told(item) for item in (static, mirror, static, mirror)] == [HASH, *["uid-of-mirror"] * 3]
