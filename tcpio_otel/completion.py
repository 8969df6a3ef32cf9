"""The command line's parser to what shells source so that they complete it: shtab's work, with what it cannot know."""

import argparse
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import shtab

from tcpio_otel.config import LEAVES

_PATHS = {"FILE": shtab.FILE, "DIR": shtab.DIRECTORY}
_SOURCE = {
    "bash": "_tcpio_otel_source",
    "zsh": "_tcpio_otel_source",
    "fish": "(_tcpio_otel_source)",
    "preamble": {
        "bash": """
_tcpio_otel_source() {
  compgen -W "live pcap:" -- "$1"
}
""",
        "zsh": """
_tcpio_otel_source() {
  if compset -P pcap:; then
    _files
  else
    compadd live
    compadd -S '' pcap:
  fi
}
""",
        "fish": """
function _tcpio_otel_source
  printf '%s\\n' live pcap:
  for path in (__fish_complete_path (string replace -r '^pcap:' '' -- (commandline -ct)))
    echo pcap:$path
  end
end
""",
    },
}
# Bash takes --option=VALUE and pcap:FILE for three words each.
_BASH = """
_tcpio_otel() {
  local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} colon=$((COMP_CWORD - 1))
  [[ $word != : ]] || colon=$COMP_CWORD
  if [[ ${COMP_WORDS[colon]} == : && ${COMP_WORDS[colon - 1]} == pcap ]]; then
    compopt -o filenames
    mapfile -t COMPREPLY < <(compgen -f -- "${word#:}")
    return
  elif [[ $word == = ]]; then
    COMP_WORDS[COMP_CWORD]=
  elif [[ $before == = ]]; then
    COMP_WORDS[COMP_CWORD - 1]=$word
    ((COMP_CWORD -= 1))
  fi
  _shtab_tcpio_otel
  [[ ${COMPREPLY[*]} != pcap: ]] || compopt -o nospace
}
complete -o bashdefault -F _tcpio_otel tcpio-otel
"""


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """What a shell sources.

    Args:
        parser: of the command line; is changed on the way.
        shell: one of shtab's.
    """
    for action in _actions(parser):
        _describe(action, shell)
    return f"{shtab.complete(parser, shell)}\n{_BASH if shell == 'bash' else ''}"


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Those of a parser and of its commands."""
    for action in parser._actions:  # argparse has no other way to them, and shtab goes it too
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)


def _describe(action: Any, shell: str) -> None:
    """Say to shtab what an option takes, by its key of the configuration and by how help calls its value."""
    # Options such as -config are for Telegraf's own way of calling; fish has no short ones of several letters.
    action.option_strings = [name for name in action.option_strings if name[:2] == "--" or len(name) == 2]
    if shell == "zsh" and action.nargs is None:
        # So zsh is told that --option=VALUE is as good as --option VALUE.
        action.option_strings = [f"{name}=" if name[:2] == "--" else name for name in action.option_strings]
    leaf = LEAVES.get(action.dest)
    if action.dest == "source":
        action.complete = _SOURCE
        action.metavar = "SOURCE"  # zsh's own language has a meaning for colons
    elif leaf and action.nargs is None and isinstance(leaf.type, type) and issubclass(leaf.type, StrEnum):
        action.choices = [*leaf.type]
    elif action.metavar in _PATHS:
        action.complete = _PATHS[action.metavar]
