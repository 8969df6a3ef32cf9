"""What the Prometheus Operator adds to an API server, taken from the operator's own module."""

from pathlib import Path

from tests.peers.go import sources

MODULE = "github.com/prometheus-operator/prometheus-operator"
VERSION = "0.85.0"
GROUP = "monitoring.coreos.com"


def pod_monitors() -> Path:
    """The file with the CustomResourceDefinition of PodMonitors; raises what `sources` does."""
    return sources(MODULE, f"v{VERSION}") / "example" / "prometheus-operator-crd" / f"{GROUP}_podmonitors.yaml"
