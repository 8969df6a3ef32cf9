"""Bytes to receivers: bounded queues, retries, OTLP/gRPC, OTLP/HTTP, OTLP/JSON files, standard output."""
