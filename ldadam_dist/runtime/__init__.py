"""Drives steps in flight together and answers their requests with collectives."""

from ldadam_dist.runtime.collectives import agree, exchange, gather_objects, ranks_of
from ldadam_dist.runtime.failures import collective, during, finish, listed, start_anew
from ldadam_dist.runtime.schedule import Job, run

__all__ = [
    "Job",
    "agree",
    "collective",
    "during",
    "exchange",
    "finish",
    "gather_objects",
    "listed",
    "ranks_of",
    "run",
    "start_anew",
]
