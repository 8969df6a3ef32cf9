"""Sockets to workloads: the container, pod, unit or process that each belongs to."""
