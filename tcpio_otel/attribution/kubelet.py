"""The pods of this node, as its own kubelet has them: for as long as the API server does not answer.

`GET /pods` (pkg/kubelet/server/server.go) answers with a core/v1 PodList, of static pods too.
"""

import json
import ssl
from pathlib import Path
from typing import Any

import urllib3

from tcpio_otel.attribution.pods import Item
from tcpio_otel.errors import EnvironmentFault

TIMEOUT_S = 10.0


class RefusedError(Exception):
    """The kubelet has answered, and not with pods."""


class Kubelet:
    """A kubelet, asked with the agent's own credentials of the API server.

    Its certificate must name its node, as one does that the kubelet signed itself, or the cluster's authority for it.

    Args:
        url: of the kubelet; no token is sent where it begins with http://.
        node: the name of its node.
        settings: `kubernetes.client.Configuration` of the API server's client.
        certificate: a file with the authority of its certificate, PEM; None: the cluster's.

    Raises:
        EnvironmentFault: a certificate cannot be used.
    """

    def __init__(self, url: str, node: str, settings: Any, certificate: Path | None) -> None:
        self._url, self._settings = f"{url.rstrip('/')}/pods", settings
        secrets: dict[str, Any] = {}
        if url.startswith("https:"):
            secrets = {"ssl_context": _context(settings, certificate), "server_hostname": node}
        self._pool = urllib3.PoolManager(retries=False, timeout=TIMEOUT_S, **secrets)

    def pods(self) -> list[Item]:
        """What runs on the node, by the kubelet's account.

        Raises:
            RefusedError: it gives none; the message has its words.
            urllib3.exceptions.HTTPError, OSError: it cannot be reached.
        """
        said = self._settings.auth_settings().get("BearerToken") if self._url.startswith("https:") else None
        headers = {said["key"]: said["value"]} if said else {}
        answer = self._pool.request("GET", self._url, headers=headers)
        if answer.status != 200:
            words = " ".join(answer.data.decode(errors="replace").split())
            raise RefusedError(f"{answer.status} {words[:200] or answer.reason}")
        try:
            items: list[Item] = json.loads(answer.data)["items"] or []
        except (ValueError, LookupError, TypeError):
            raise RefusedError("it says what no kubelet says") from None
        return items


def _context(settings: Any, certificate: Path | None) -> ssl.SSLContext:
    file = certificate or settings.ssl_ca_cert
    try:
        context = ssl.create_default_context(cafile=file)
        if settings.cert_file:
            context.load_cert_chain(settings.cert_file, settings.key_file)
    except OSError as error:  # ssl.SSLError is one
        raise EnvironmentFault(f"cannot use {file} for the kubelet: {error.strerror or error}") from None
    return context
