"""Where the ranks of a preflight meet: a store, in which they leave what the others read."""

from __future__ import annotations

import json
import os
import socket
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore  # dist's, which types do not know

from ldadam_dist.preflight.facts import Place

_PINGS = 7


class MeetingError(RuntimeError):
    """The ranks cannot meet: who is missing, or what cannot be reached."""


class Meeting:
    """All ranks of the run, over a store of their own at MASTER_ADDR.

    Args:
        timeout: seconds to wait for all ranks, and then for each answer.
    Raises:
        MeetingError: the store cannot be reached or opened.
    """

    def __init__(self, place: Place, timeout: float) -> None:
        self.place, self.timeout = place, timeout
        self.store = PrefixStore("preflight", self._open() if place.master else HashStore())
        self.tell("here", socket.gethostname())

    def expect_all(self) -> None:
        """On rank 0: wait for the others.

        Raises:
            MeetingError: some did not come in time.
        """
        everyone = range(self.place.size)
        came = self.collect("here", everyone, self.timeout)
        if missing := [str(number) for number in everyone if number not in came]:
            raise MeetingError(
                f"rank(s) {', '.join(missing)} of {self.place.size} did not come within {self.timeout:.0f} s; those of "
                f"{', '.join(dict.fromkeys(came.values()))} did. Look at what the missing ones printed, and start all "
                "hosts together."
            )

    def call_off(self, problem: str) -> None:
        """On rank 0: answer whatever the others wait for, and tell them why."""
        self.tell("look around", None)
        self.tell("leaders", None)
        self.tell("problems", [problem])

    def _open(self) -> Store:
        assert self.place.master
        address, port = self.place.master
        # torchrun's agent has opened it already.
        opens = self.place.number == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        limit = timedelta(seconds=self.timeout)
        try:
            return TCPStore(address, port, self.place.size, opens, limit, wait_for_workers=False)
        except (dist.DistError, RuntimeError, ValueError) as error:
            what = (
                f"cannot open port {port} (MASTER_PORT). Is it in use? Choose another"
                if opens
                else f"rank {self.place.number} cannot reach {address}:{port} (MASTER_ADDR:MASTER_PORT) within "
                f"{self.timeout:.0f} s. Is rank 0 running there, is the name right, does a firewall block the port?"
            )
            raise MeetingError(f"{socket.gethostname()}: {what} ({first_line(error)})") from error

    def tell(self, topic: str, value: Any) -> None:
        """Leave this rank's word on a topic."""
        self.store.set(f"{topic}/{self.place.number}", json.dumps(value))

    def collect(self, topic: str, numbers: range | list[int], seconds: float) -> dict[int, Any]:
        """What ranks told on a topic, by rank; without those that did not in time."""
        deadline, told = time.monotonic() + seconds, {}
        for number in numbers:
            try:
                told[number] = self.listen(topic, number, max(deadline - time.monotonic(), 0.01))
            except MeetingError:
                continue
        return told

    def hear(self, topic: str) -> Any:
        """What rank 0 tells on a topic; patient, as it may have waited for others before."""
        return self.listen(topic, 0, 5 * self.timeout)

    def listen(self, topic: str, number: int, seconds: float | None = None) -> Any:
        """What a rank tells on a topic.

        Raises:
            MeetingError: nothing within `seconds`, or rank 0 is gone.
        """
        key, seconds = f"{topic}/{number}", self.timeout if seconds is None else seconds
        try:
            self.store.wait([key], timedelta(seconds=seconds))
            return json.loads(self.store.get(key))
        except (dist.DistError, RuntimeError) as error:
            raise MeetingError(
                f"{socket.gethostname()}: rank {self.place.number} heard nothing from rank {number} within "
                f"{seconds:.0f} s, see what rank {number} printed ({first_line(error)})"
            ) from error

    def clock_offsets(self, numbers: list[int]) -> dict[int, tuple[float, float]]:
        """On rank 0: (seconds a rank's clock is ahead of rank 0's, ± bound), from the quickest of several pings.

        A rank reads its clock somewhere between the ping and its answer, hence half of the time between is the bound.
        """
        offsets = {}
        for number in numbers:
            answers = []
            for ping in range(_PINGS):
                sent = time.time()
                self.tell(f"ping/{number}/{ping}", None)
                theirs = self.listen(f"pong/{ping}", number)
                received = time.time()
                answers.append(((received - sent) / 2, theirs - (sent + received) / 2))
            bound, offset = min(answers)
            offsets[number] = (offset, bound)
        return offsets

    def answer_pings(self) -> None:
        """The other side of `clock_offsets`."""
        for ping in range(_PINGS):
            self.listen(f"ping/{self.place.number}/{ping}", 0)
            self.tell(f"pong/{ping}", time.time())

    def close(self) -> None:
        """Rank 0 keeps the store until the others have read the last word."""
        self.tell("done", None)
        if self.place.number == 0:
            came = [number for number in range(self.place.size) if self.store.check([f"here/{number}"])]
            self.collect("done", came, min(self.timeout, 10))


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]
