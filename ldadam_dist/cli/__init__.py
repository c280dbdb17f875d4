"""The command `ldadam-dist`, also `python -m ldadam_dist`."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: those of the command line; None for the process's own.
    Returns:
        exit code: 0, 1 if something was found unfit, 2 for wrong input, of which one line on stderr tells.
    """
    try:
        import typer  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        sys.stderr.write("error: this command needs typer: pip install 'ldadam-dist[cli]'\n")
        return 2
    from ldadam_dist.cli.app import run

    return run(arguments)


__all__ = ["main"]
