"""What the commands share: errors in one line, Ctrl-C without a traceback."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def run(parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], None]) -> None:
    """Parse the command line and do the work; say in one line what is wrong."""
    arguments = parser.parse_args()
    try:
        work(arguments)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"{parser.prog}: error: {' '.join(str(error).split())}") from error
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: interrupted; what is finished is kept\n")


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser of `python -m name`, with the options that all commands have."""
    found = argparse.ArgumentParser(
        f"python -m {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--device", default="cpu", help="torch device (default %(default)s)")
    found.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    return found
