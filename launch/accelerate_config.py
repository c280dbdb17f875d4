"""Check a configuration file of accelerate, whose own reader takes misspelt keys of a section without a word.

python launch/accelerate_config.py configs/accelerate/fsdp2.yaml
"""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

# Run as a file, Python looks for modules in launch/ alone: name the repository as well.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.config import ConfigError, expect

PREFIXES = {"fsdp_config": "fsdp_", "fp8_config": "fp8_", "dynamo_config": "dynamo_"}
"""What accelerate puts before the keys of some sections, unless it stands there."""


def check(path: str) -> None:
    """Raise ConfigError for a file that accelerate cannot read, or a key that its launcher does not know."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    try:
        config = load_config_from_file(path)
    except Exception as error:  # of yaml, of accelerate, of enumerations
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    known = {action.dest for action in launch_command_parser()._actions}
    for section, values in vars(config).items():
        prefix = PREFIXES.get(section, "")
        for key in values if isinstance(values, dict) else ():
            full = key if key.startswith(prefix) else prefix + key
            near = difflib.get_close_matches(full, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            expect(full in known, f"{path}: {section} has the unknown key {key!r}{hint}")


if __name__ == "__main__":
    try:
        check(sys.argv[1])
    except ConfigError as found:
        print(f"error: {found}", file=sys.stderr)
        sys.exit(2)
