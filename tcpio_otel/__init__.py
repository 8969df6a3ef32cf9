"""eBPF-fed agent that turns every TCP packet of a host into OpenTelemetry logs, spans and metrics."""

__version__ = "0.1.0"
