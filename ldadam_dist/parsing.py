"""Command lines of modules that run by themselves, with the standard library alone."""

from __future__ import annotations

import argparse
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """An `ArgumentParser` that says in one line on stderr what is wrong, and exits with 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")
