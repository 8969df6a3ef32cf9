"""The command line's parsers, one for each command."""

import argparse

from tcpio_otel.cli import parser


def commands() -> dict[str, argparse.ArgumentParser]:
    """By name; argparse has no public way to them."""
    (action,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return action.choices
