"""Connections to numbers: what went between workloads and their peers."""
