"""torch's DTensor, without importing it: that takes most of a second, and on one device nobody needs it."""

from __future__ import annotations

import sys
from typing import Any


def dtensor_type() -> Any:
    """DTensor, to be asked for by `isinstance`; an empty tuple while nobody has imported it, as there is none then."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
