"""A real Kubernetes API server with its etcd, built once, started for a test on loopback.

It has RBAC and no controllers: nothing turns a Deployment into pods, and no kubelet says where one runs. A test writes
what they would. With an address that pods reach, it is one for tests.peers.node, which has all of that.
"""

import base64
import json
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import trustme
import urllib3
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.integration.collector import free_port
from tests.peers.go import programs

VERSION = "1.37.2"
RBAC = "/apis/rbac.authorization.k8s.io/v1"


def build() -> Path:
    """The directory of kube-apiserver, kubectl and etcd, built if they are not in the cache.

    Raises:
        LookupError: they cannot be built here; the message says why.
    """
    major, minor, patch = VERSION.split(".")
    stamps = {"gitVersion": f"v{VERSION}", "gitMajor": major, "gitMinor": minor}
    return programs(
        "kubernetes",
        "k8s.io/kubernetes",
        f"v{VERSION}",
        {
            "etcd": "go.etcd.io/etcd/server/v3",  # at the version that Kubernetes itself requires
            "kubectl": "k8s.io/kubernetes/cmd/kubectl",
            "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
        },
        link=" ".join(f"-X k8s.io/component-base/version.{name}={value}" for name, value in stamps.items()),
        sibling=f"v0.{minor}.{patch}",
    )


class ControlPlane:
    """An API server that is running, and the etcd that keeps its objects."""

    def __init__(self, directory: Path, flags: tuple[str, ...], address: str, service: str) -> None:
        self.directory = directory
        self.port = free_port()
        self.url = f"https://{address}:{self.port}"
        self.ca_file = directory / "ca.pem"
        self.admin_token = secrets.token_urlsafe()
        self.kubectl = build() / "kubectl"
        self._flags, self._address, self._service = flags, address, service
        self._etcd_url = f"http://127.0.0.1:{free_port()}"
        self._signing_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._write_credentials()
        self._http = urllib3.PoolManager(ca_certs=str(self.ca_file), retries=False, maxsize=8)

    def _write_credentials(self) -> None:
        self.authority = trustme.CA()
        self.authority.cert_pem.write_to_path(self.ca_file)
        names = {self._address, self._service, "localhost", "kubernetes.default.svc"}
        certificate = self.authority.issue_cert(*sorted(names - {""}))
        certificate.private_key_and_cert_chain_pem.write_to_path(self.directory / "server.pem")
        key = self._signing_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (self.directory / "accounts.pem").write_bytes(key)
        (self.directory / "tokens.csv").write_text(f"{self.admin_token},admin,admin,system:masters\n")

    def start(self) -> None:
        """Start the API server, and wait until it says that it is ready.

        Raises:
            RuntimeError: it does not come up; the message has the end of its log.
        """
        certificate, accounts = self.directory / "server.pem", self.directory / "accounts.pem"
        # A loopback address may not be in an endpoint; and accounts come from a controller, which the other has.
        alone = ("--endpoint-reconciler-type=none", "--disable-admission-plugins=ServiceAccount")
        self._run(
            "kube-apiserver",
            f"--etcd-servers={self._etcd_url}",
            f"--bind-address={self._address}",
            f"--secure-port={self.port}",
            f"--advertise-address={self._address}",
            f"--tls-cert-file={certificate}",
            f"--tls-private-key-file={certificate}",
            f"--token-auth-file={self.directory / 'tokens.csv'}",
            "--authorization-mode=RBAC",
            f"--service-account-issuer={self.url}",
            f"--service-account-key-file={accounts}",
            f"--service-account-signing-key-file={accounts}",
            "--shutdown-watch-termination-grace-period=1s",  # an open watch would hold it up for a minute
            *(() if self._service else alone),
            *self._flags,
            ready=lambda: self.call("GET", "/readyz").status == 200,
        )

    def stop(self) -> None:
        """Stop the API server, which ends the watches; etcd goes on, and keeps what it had."""
        self._end("kube-apiserver")

    def restart(self) -> None:
        """Stop the API server and start it on the same port with the same objects."""
        self.stop()
        self.start()

    def pid(self, name: str) -> int:
        """Of `kube-apiserver` or `etcd`."""
        return self._processes[name].pid

    def compact(self) -> None:
        """Have etcd forget every version of an object but the present one.

        The API server has a cache of recent versions, and refuses an older one with 410 Gone once it has restarted. One
        that was started with --watch-cache=false refuses it at once.
        """
        key = base64.b64encode(b"/").decode()
        found = self._http.request("POST", f"{self._etcd_url}/v3/kv/range", json={"key": key}).json()
        target = {"revision": found["header"]["revision"], "physical": True}
        done = self._http.request("POST", f"{self._etcd_url}/v3/kv/compaction", json=target)
        assert done.status == 200, done.data.decode()

    def call(self, method: str, path: str, body: Any = None, token: str | None = None) -> urllib3.BaseHTTPResponse:
        """Ask the API server, as admin unless there is a token; PATCH merges. The answer may be a refusal."""
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        headers = {"Authorization": f"Bearer {token or self.admin_token}", "Content-Type": kind}
        return self._http.request(method, self.url + path, headers=headers, json=body, timeout=60)

    def create(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Create an object as admin; `kind` and `apiVersion` follow from the path."""
        response = self.call("POST", path, body)
        assert response.status == 201, response.data.decode()
        created: dict[str, Any] = response.json()
        return created

    def account(self, name: str) -> None:
        """Create a service account in the default namespace, which may do nothing yet."""
        self.create("/api/v1/namespaces/default/serviceaccounts", {"metadata": {"name": name}})

    def allow(self, account: str, *rules: dict[str, Any]) -> None:
        """Say what an account of the default namespace may do, everywhere, by a ClusterRole of its name.

        A rule without an API group is of the core's.
        """
        complete = [{"apiGroups": [""], **rule} for rule in rules]
        path, role = f"{RBAC}/clusterroles", {"metadata": {"name": account}, "rules": complete}
        if self.call("GET", f"{path}/{account}").status == 200:
            response = self.call("PUT", f"{path}/{account}", role)
            assert response.status == 200, response.data.decode()
            return
        self.create(path, role)
        self.bind(account)

    def bind(self, account: str) -> None:
        """Give an account of the default namespace the ClusterRole of its name."""
        subject = {"kind": "ServiceAccount", "name": account, "namespace": "default"}
        role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": account}
        body = {"metadata": {"name": account}, "subjects": [subject], "roleRef": role}
        self.create(f"{RBAC}/clusterrolebindings", body)

    def token(self, namespace: str, account: str, seconds: int = 3600) -> str:
        """A token of a service account.

        The server issues none that lives less than ten minutes. A shorter one is signed here with the server's key, and
        the minute that the server allows for clocks that differ is taken off. A token is also refused when its account
        is deleted. Either takes up to ten seconds more where the server has just found the token good, as it remembers
        that.
        """
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        issued: str = self.create(path, {"spec": {"expirationSeconds": max(seconds, 600)}})["status"]["token"]
        if seconds >= 600:
            return issued
        header, payload, _ = issued.split(".")
        claims = json.loads(base64.urlsafe_b64decode(payload + "=="))
        claims["exp"] = int(time.time()) + seconds - 60
        unsigned = f"{header}.{_base64url(json.dumps(claims).encode())}"
        return f"{unsigned}.{_base64url(self._signing_key.sign(unsigned.encode(), padding.PKCS1v15(), SHA256()))}"

    def kubeconfig(self, path: Path, token: str | None = None) -> Path:
        """Write what kubectl and clients need, for admin unless there is a token."""
        cluster = {"server": self.url, "certificate-authority": str(self.ca_file)}
        configuration = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": {"token": token or self.admin_token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "current-context": "test",
        }
        path.write_text(json.dumps(configuration))
        return path

    def _start_etcd(self) -> None:
        peers = f"http://127.0.0.1:{free_port()}"
        self._run(
            "etcd",
            f"--data-dir={self.directory / 'etcd'}",
            f"--listen-client-urls={self._etcd_url}",
            f"--advertise-client-urls={self._etcd_url}",
            f"--listen-peer-urls={peers}",
            f"--initial-advertise-peer-urls={peers}",
            f"--initial-cluster=default={peers}",
            "--unsafe-no-fsync",  # no test cuts the power
            ready=lambda: self._http.request("GET", f"{self._etcd_url}/health").status == 200,
        )

    def _run(self, name: str, *flags: str, ready: Callable[[], bool]) -> None:
        log = self.directory / f"{name}.log"
        with log.open("ab") as output:
            process = subprocess.Popen([build() / name, *flags], stdout=output, stderr=output)
        self._processes[name] = process
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            try:
                if ready():
                    return
            except urllib3.exceptions.HTTPError:
                pass  # it does not listen yet
            time.sleep(0.05)
        ended = f"ended with {process.returncode}" if process.returncode is not None else "is not ready after 2 minutes"
        raise RuntimeError("\n".join([f"{name} {ended}:", *log.read_text().splitlines()[-20:]]))

    def _end(self, name: str) -> None:
        if process := self._processes.pop(name, None):
            process.terminate()
            try:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(30)
            finally:
                process.kill()
                process.wait()


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@contextmanager
def control_plane(
    directory: Path, *flags: str, address: str = "127.0.0.1", service: str = ""
) -> Iterator[ControlPlane]:
    """Start etcd and an API server, which is given the flags too; certificates, data and logs go into the directory.

    Args:
        directory: where they go.
        flags: more of the API server's.
        address: where it listens.
        service: the address of its Service, of a cluster that has nodes and controllers; empty: of one without.

    Raises:
        LookupError: they cannot be built here.
        RuntimeError: one of them does not come up.
    """
    running = ControlPlane(directory, flags, address, service)
    with ExitStack() as stack:
        stack.callback(running._end, "etcd")
        stack.callback(running.stop)
        running._start_etcd()
        running.start()
        yield running
