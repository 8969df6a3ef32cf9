"""The real Helm and its plugin helm-unittest, built once."""

import json
import os
from pathlib import Path

from tests.peers.go import programs

VERSION = "3.21.4"
UNITTEST_VERSION = "1.1.2"
KUBERNETES_VERSION = "1.36"
"""What Helm renders for where it asks no cluster: that of the client it is built with, as its releases do."""


def environment(directory: Path) -> dict[str, str]:
    """Variables by which `helm` is found, has the command `unittest`, and keeps what it writes in a directory.

    Raises:
        LookupError: one of them cannot be built here; the message says why.
    """
    major, minor = KUBERNETES_VERSION.split(".")
    stamps = {"k8sVersionMajor": major, "k8sVersionMinor": minor}
    link = " ".join(
        f"-X helm.sh/helm/v3/pkg/{package}.{name}={value}"
        for package in ("chartutil", "lint/rules")
        for name, value in stamps.items()
    )
    helm = programs("helm", "helm.sh/helm/v3", f"v{VERSION}", {"helm": "helm.sh/helm/v3/cmd/helm"}, link=link)
    module = "github.com/helm-unittest/helm-unittest"
    packages = {"unittest": f"{module}/cmd/helm-unittest"}
    unittest = programs("helm-unittest", module, f"v{UNITTEST_VERSION}", packages)
    plugin = directory / "plugins" / "unittest" / "plugin.yaml"
    plugin.parent.mkdir(parents=True, exist_ok=True)
    command = str(unittest / "unittest")
    plugin.write_text(json.dumps({"name": "unittest", "version": UNITTEST_VERSION, "command": command}))
    homes = {f"HELM_{kind}_HOME": str(directory / kind.lower()) for kind in ("CACHE", "CONFIG", "DATA")}
    return {
        **os.environ,
        **homes,
        "HELM_PLUGINS": str(directory / "plugins"),
        "PATH": f"{helm}{os.pathsep}{os.environ['PATH']}",
    }
