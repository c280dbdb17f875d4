"""Checks the hosts of a run before it starts: `python -m ldadam_dist.preflight`, under the run's launcher or alone.

What the ranks tell each other goes through a store (meeting.py), so that it arrives where collectives do not work.
"""
