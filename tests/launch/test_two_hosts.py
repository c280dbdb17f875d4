"""tests/two_hosts.py, where it is allowed: both launchers on two hosts, of which one dies and one loses its link."""

from pathlib import Path

import pytest
import two_hosts


@pytest.mark.slow
@pytest.mark.parametrize("launcher", list(two_hosts.LAUNCHERS))
def test_two_hosts(launcher: str, tmp_path: Path) -> None:
    try:
        two_hosts.check(launcher, tmp_path, print)
    except two_hosts.UnavailableError as error:
        pytest.skip(str(error))
