"""When a collective fails: which rank did not come, and what this one was doing.

The ranks that notice tell each other through the store of the process groups. Those that tell nothing have stalled or
died. A rank that still waits looks there as well, so that nobody waits longer than the first to notice; a back-end
only tells the neighbours of a rank that died. A step in which no collective takes longer than a second asks nothing.
"""

from __future__ import annotations

import atexit
import json
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cache, partial
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

PERIOD = 1.0
"""Seconds that a rank waits in a collective before it looks whether another has given up, and again."""

REPORTS_WITHIN = 5.0
"""Seconds that a rank which has given up waits for the others to say so too."""

LET_GO = 0.2
"""Seconds that a program with gloo waits at its end."""

_COUNT = "ldadam_dist/failures"
"""Key of the number of reports; the reports follow it, numbered from 1."""


@dataclass(frozen=True)
class Report:
    """What a rank says that gives up.

    Attributes:
        rank: its global rank.
        ranks: those of the collective.
        entered, left: when it came to the collective and when it gave up, in seconds since the epoch.
    """

    rank: int
    ranks: list[int]
    entered: float
    left: float


class CollectiveError(RuntimeError):
    """A collective failed on this rank; `__cause__` is what the back-end said.

    Args:
        what: name of the collective.
        ranks: global ranks of its group.
        entered: when this rank came to it, in seconds since the epoch.
        said: the back-end's message.
    """

    def __init__(self, what: str, ranks: list[int], entered: float, said: str) -> None:
        super().__init__(f"{what} over {_ranks(ranks)} failed on rank {dist.get_rank()}: {said}")
        self.what, self.said = what, said
        self.report = Report(dist.get_rank(), ranks, entered, time.time())


@contextmanager
def collective(what: str, ranks: Callable[[], Iterable[int]], entered: float | None = None) -> Iterator[None]:
    """Raise CollectiveError for what the back-end raises within.

    Args:
        what: name of the collective.
        ranks: gives the global ranks that take part.
        entered: when this rank came to it, in seconds since the epoch; now, if not given.
    """
    entered = time.time() if entered is None else entered
    try:
        yield
    except RuntimeError as error:
        raise CollectiveError(what, sorted(ranks()), entered, str(error)) from error


Waiting: TypeAlias = Generator[None, None, T]
"""Work with collectives in it, which pauses once while each is on its way and then waits for it; `finish` gives its
result."""


def complete(calls: Sequence[partial[Any]], group: Any) -> Waiting[None]:
    """Start collectives, pause, and wait for all of them. It pauses without any calls too: ranks may differ in that.

    Args:
        calls: functions of torch.distributed with all arguments but `group` and `async_op`, a tensor first.
        group: their process group.
    Raises:
        CollectiveError: one failed, or another rank of the group has given up meanwhile.
    """
    if not calls:
        yield
        return
    entered = time.time()
    failing = partial(collective, calls[0].func.__name__, partial(dist.get_process_group_ranks, group), entered)
    with failing():
        works = [call(group=group, async_op=True) for call in calls]
    yield
    with failing():
        # With gloo the host waits anyway; a back-end that queues its work on a device must not be waited for here.
        watched = f"{calls[0].args[0].device.type}:gloo" in str(dist.get_backend_config(group))
        for work in works:
            if watched:
                _wait(work, group)
            elif work is not None:
                work.wait()


def finish(waiting: Waiting[T]) -> T:
    """The result of work that may have paused before."""
    while True:
        try:
            next(waiting)
        except StopIteration as end:
            result: T = end.value
            return result


@cache
def _let_go_at_exit() -> None:
    """Give gloo's threads the interpreter once more before it ends.

    A thread lets go of a collective's tensors when the program has gone on already, and needs the interpreter for it.
    If that has begun to end, the process aborts ("terminate called without an active exception") with its work done.
    """
    atexit.register(time.sleep, LET_GO)


def _wait(work: Any, group: Any) -> None:
    deadline = time.monotonic() + _timeout(group) + PERIOD  # gloo's own error comes first, if it can
    while True:
        began = time.monotonic()
        try:
            work.wait(timedelta(seconds=PERIOD))
            return
        except RuntimeError:
            now = time.monotonic()
            # gloo's reduce-scatter is not complete when it has failed either: an error that came at once is its own.
            if work.is_completed() or now - began < PERIOD / 2 or now > deadline:
                raise
        gone = _board.reports().keys() & set(dist.get_process_group_ranks(group))
        if gone:
            raise RuntimeError(f"still waiting when {_ranks(sorted(gone))} had given up.")


def _timeout(group: Any) -> float:
    """Seconds after which a collective of a gloo group fails."""
    limit: timedelta = group._get_backend(torch.device("cpu")).options._timeout
    return limit.total_seconds()


def start_anew() -> None:
    """Reports that there are now are of processes that torchrun has started again since; for before a first step."""
    _board.start_anew()


@contextmanager
def during(doing: Callable[[], str]) -> Iterator[None]:
    """Say more about a collective that fails within.

    Args:
        doing: what this rank does meanwhile: "it <...>".
    Raises:
        RuntimeError: a collective failed; which rank did not come, and what to do.
    """
    _board.start_anew()
    try:
        yield
    except CollectiveError as failure:
        mine = failure.report
        raise RuntimeError(
            f"rank {mine.rank} gave up while it {doing()}, in {failure.what} over {_ranks(mine.ranks)}. "
            f"{_verdict(mine)} Weights and states may differ between ranks now: start all of them again from the last "
            f"checkpoint. The back-end said: {failure.said}"
        ) from failure.__cause__


def listed(items: Iterable[object], most: int = 3) -> str:
    """The first few of them in words, and how many more there are."""
    texts = [str(item) for item in items]
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {listed(ranks, 8)}"


def _verdict(mine: Report) -> str:
    """Who did not come, as far as the ranks have told each other."""
    _board.publish(mine)
    deadline, reports = time.monotonic() + REPORTS_WITHIN, dict[int, Report]()
    while True:
        reports |= _board.reports()  # the store may be gone next time, with the rank that serves it
        missing = _involved(mine, reports) - reports.keys()
        if not missing or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    if mine.rank not in reports:
        return "Which rank did not come is not known, as the store of the process groups cannot be reached."
    if missing:
        they = "it has" if len(missing) == 1 else "they have"
        return (
            f"{_ranks(sorted(missing)).capitalize()} did not come: {they} stalled, died or raised an error. The other "
            f"ranks said within {REPORTS_WITHIN:g} s that they gave up."
        )
    first = min(reports.values(), key=lambda report: report.left)
    last = max(reports.values(), key=lambda report: report.entered)
    if last.entered > first.left:
        return (
            f"Rank {last.rank} had stalled: it came {last.entered - first.left:.1f} s after rank {first.rank} gave up."
        )
    return "All of its ranks gave up: none has stalled or died, a connection between them broke."


def _involved(mine: Report, reports: dict[int, Report]) -> set[int]:
    """The ranks for which this one waited, those for which they waited, and so on."""
    found, waiting = set[int](), set(mine.ranks)
    while waiting:
        found |= waiting
        waiting = {r for rank in waiting if rank in reports for r in reports[rank].ranks} - found
    return found


class _Board:
    """The reports of all ranks, in the store of the process groups."""

    def __init__(self) -> None:
        self._unreachable = False
        self._read = 0  # reports up to this one do not count
        self._is_new = True

    def start_anew(self) -> None:
        """Reports that are there before a rank's first step are of processes that torchrun has started again since.

        Those before its next step, if it has given up and goes on, are of groups that were replaced.
        """
        if self._is_new and dist.is_initialized():
            if "gloo" in str(dist.get_backend_config()):
                _let_go_at_exit()
            self._is_new, self._unreachable = False, False
            self._read = self._count()

    def publish(self, report: Report) -> None:
        """Tell the others."""
        self._is_new = True

        def tell() -> None:
            number = self._store().add(_COUNT, 1)
            self._store().set(f"{_COUNT}/{number}", json.dumps(asdict(report)))

        self._ask(tell)

    def reports(self) -> dict[int, Report]:
        """The last report of every rank that has made one."""
        found = [self._ask(partial(self._report, number)) for number in range(self._read + 1, self._count() + 1)]
        return {report.rank: report for report in found if report is not None}

    def _report(self, number: int) -> Report | None:
        with suppress(dist.DistError):  # its rank died before it could be written
            self._store().wait([f"{_COUNT}/{number}"], timedelta(seconds=PERIOD))
            return Report(**json.loads(self._store().get(f"{_COUNT}/{number}")))
        return None

    def _count(self) -> int:
        """Number of reports so far."""
        return int(self._ask(lambda: self._store().add(_COUNT, 0)) or self._read)

    def _ask(self, question: Callable[[], Any]) -> Any:
        """What the store answers; None if it cannot be reached, and then it is not asked again.

        In a thread: behind a link that is cut it has no time limit but that of TCP, which is a quarter of an hour.
        """
        if self._unreachable:
            return None
        answers: list[Any] = []

        def ask() -> None:
            with suppress(Exception):  # whatever a store raises whose server has died
                answers.append(question())

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(REPORTS_WITHIN)
        self._unreachable = not answers
        return answers[0] if answers else None

    @staticmethod
    def _store() -> Any:
        return dist.group.WORLD.get_group_store()  # type: ignore[union-attr]


_board = _Board()
