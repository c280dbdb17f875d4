"""Drives steps in flight together and answers their requests with collectives."""

from ldadam_dist.runtime.collectives import (
    agree,
    all_reduce,
    exchange,
    gather_objects,
    is_group,
    joined,
    maxima,
    mean_slice,
    ranks_of,
)
from ldadam_dist.runtime.failures import collective, during, finish, listed, start_anew
from ldadam_dist.runtime.presence import Presence
from ldadam_dist.runtime.schedule import Job, run

__all__ = [
    "Job",
    "Presence",
    "agree",
    "all_reduce",
    "collective",
    "during",
    "exchange",
    "finish",
    "gather_objects",
    "is_group",
    "joined",
    "listed",
    "maxima",
    "mean_slice",
    "ranks_of",
    "run",
    "start_anew",
]
