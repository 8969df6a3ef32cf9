"""Figures of a fleet: what docs/scale.md is worked out from."""
