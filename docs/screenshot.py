"""A captured screen to a picture: `tmux capture-pane -p -e | python docs/screenshot.py 'TITLE' > docs/top.svg`.

What is drawn is what a terminal showed, colours included.
"""

import io
import re
import sys

from rich.console import Console
from rich.text import Text

_REMOTE_FONTS = re.compile(r"\s*@font-face \{.*?\}", re.DOTALL)


def picture(screen: str, title: str) -> str:
    """A screen, with the sequences that make its colours, as SVG."""
    lines = [Text.from_ansi(line) for line in screen.rstrip("\n").split("\n")]
    width = max(line.cell_len for line in lines)
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for line in lines:
        line.no_wrap = True
        console.print(line)
    drawn = console.export_svg(title=title, unique_id="screen")
    drawn = _REMOTE_FONTS.sub("", drawn)  # whoever looks at it need not ask anybody for a font
    return drawn.replace("<text ", '<text xml:space="preserve" ')  # some take even fixed blanks away at the start


if __name__ == "__main__":
    sys.stdout.write(picture(sys.stdin.read(), sys.argv[1]))
