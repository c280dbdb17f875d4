"""Judges what the ranks reported: the tables, and the problems with the host that has each."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ldadam_dist.network import is_loopback
from ldadam_dist.preflight.facts import Facts
from ldadam_dist.preflight.links import Timing
from ldadam_dist.tables import format_bytes, table


@dataclass(frozen=True)
class Limits:
    """What is still good."""

    clock_seconds: float
    free_bytes: float
    min_gigabytes_per_second: float
    slower_than_median: float


@dataclass
class Judge:
    """All ranks' facts; a host is a rank that leads one, with those that follow it."""

    facts: Sequence[Facts]
    limits: Limits
    problems: list[str] = field(default_factory=list)
    leaders: list[int] = field(init=False)  # first rank of each host

    def __post_init__(self) -> None:
        self.leaders = [facts.number for facts in self.facts if facts.leads_host]

    def name(self, number: int) -> str:
        """Name of a rank's host; with the host's first rank where several have the same name."""
        leader = self._leader(number)
        name = self.facts[leader].host
        alike = [lead for lead in self.leaders if self.facts[lead].host == name]
        return name if len(alike) == 1 else f"{name} (ranks from {leader})"

    def check_versions(self) -> bool:
        """Whether all ranks have the same; the odd ones are named."""
        good = True
        for what in dict.fromkeys(key for facts in self.facts for key in facts.versions):
            found = [facts.versions.get(what, "none") for facts in self.facts]
            (usual, count), *others = Counter(found).most_common()
            if not others:
                continue
            good = False
            odd: dict[tuple[str, str], list[int]] = {}
            for number, version in enumerate(found):
                if version != usual:
                    odd.setdefault((self.name(number), version), []).append(number)
            where = "; ".join(f"{host} has {version} (rank {_list(n)})" for (host, version), n in odd.items())
            rest = self.name(found.index(usual))
            self.problems.append(f"{what} differs: {where}; {count} rank(s), as those of {rest}, have {usual}")
        return good

    def check_devices(self) -> bool:
        missing = [facts for facts in self.facts if facts.device.startswith("none:")]
        for facts in missing:
            self.problems.append(f"{self.name(facts.number)}: rank {facts.number} has no device, {facts.device}")
        return not missing

    def check_addresses(self) -> bool:
        """Several hosts cannot meet at an address that each takes for itself."""
        if len(self.leaders) == 1:
            return True
        wrong = [number for number in self.leaders if is_loopback(self.facts[number].address or "127.0.0.1")]
        for number in wrong:
            self.problems.append(
                f"{self.name(number)} takes MASTER_ADDR for its own {self.facts[number].address} (see its /etc/hosts), "
                "which other hosts cannot reach: launch with the address that they see instead of the name"
            )
        return not wrong

    def check_answers(self, what: str, asked: Iterable[int], answered: Iterable[int]) -> None:
        answers = set(answered)
        for number in asked:
            if number not in answers:
                self.problems.append(f"{self.name(number)}: rank {number} did not tell {what} in time")

    def check_errors(self, errors: Mapping[int, str]) -> None:
        """Of collectives, by rank; one for each host, as its ranks say much the same."""
        told = set()
        for number, error in errors.items():
            if self._leader(number) not in told:
                told.add(self._leader(number))
                self.problems.append(f"{self.name(number)}: a collective failed on rank {number}: {error}")

    def check_ports(self, unreachable: Mapping[int, Mapping[int, str]]) -> bool:
        """Hosts that could not be reached, and why, by the rank that tried."""
        for number, failed in unreachable.items():
            for host, why in failed.items():
                self.problems.append(
                    f"{self.name(host)} cannot be reached from {self.name(number)} at {why}. Ranks use any free port: "
                    "open all ports between the hosts, and look at the interface that the address belongs to"
                )
        return not any(unreachable.values())

    def check_folders(self, seen: Mapping[int, bool]) -> None:
        """Writing, space, and whether the hosts see the file that rank 0's has there."""
        for number in self.leaders:
            facts, name = self.facts[number], self.name(number)
            if facts.folder_error:
                self.problems.append(f"{name} cannot write to the output folder: {facts.folder_error}")
            elif facts.free_bytes < self.limits.free_bytes:
                self.problems.append(
                    f"{name} has {format_bytes(facts.free_bytes)} free in the output folder: expected at least "
                    f"{format_bytes(self.limits.free_bytes)} (--min-free)"
                )
            elif not seen.get(number, True):
                self.problems.append(
                    f"{name} has another output folder than {self.name(0)}: a file made there is not seen. Checkpoints "
                    "need one folder that all hosts see, as on a network file system"
                )

    def check_clocks(self, offsets: Mapping[int, tuple[float, float]]) -> None:
        for number, (offset, bound) in offsets.items():
            if abs(offset) - bound > self.limits.clock_seconds:
                self.problems.append(
                    f"{self.name(number)}: its clock is {offset:+.3f} s (± {bound:.3f}) off that of {self.name(0)}: "
                    f"expected at most {self.limits.clock_seconds} s (--max-clock-offset); is NTP running?"
                )

    def check_links(self, links: Mapping[int, Mapping[int, float]]) -> None:
        """A host is slow if its best link is: the others have a good one among themselves.

        Args:
            links: GB/s by the hosts' first ranks.
        """
        best = {number: max(found.values()) for number, found in links.items() if found}
        if not best:
            return
        ordered = sorted(best.values())
        usual = ordered[len(ordered) // 2]
        for number, speed in best.items():
            if speed < self.limits.min_gigabytes_per_second:
                self.problems.append(
                    f"{self.name(number)}: its best link to another host has {speed:.3g} GB/s: expected at least "
                    f"{self.limits.min_gigabytes_per_second} (--min-bandwidth)"
                )
            elif speed * self.limits.slower_than_median < usual:
                self.problems.append(
                    f"{self.name(number)}: its best link to another host has {speed:.3g} GB/s, the median host's "
                    f"{usual:.3g}: expected at least 1/{self.limits.slower_than_median:g} of that (--max-slowdown)"
                )

    def usual_versions(self) -> str:
        """What most ranks have."""
        names = dict.fromkeys(key for facts in self.facts for key in facts.versions if key != "device type")
        usual = {name: Counter(f.versions.get(name, "none") for f in self.facts).most_common(1)[0][0] for name in names}
        return ", ".join(f"{name} {version}" for name, version in usual.items() if version != "not installed")

    def host_table(
        self, offsets: Mapping[int, tuple[float, float]], links: Mapping[int, Mapping[int, float]]
    ) -> list[str]:
        head = ["host", "ranks", "device", "address", "clock offset", "free in output", "best link"]
        rows = []
        for number, following in zip(self.leaders, [*self.leaders[1:], len(self.facts)], strict=True):
            facts = self.facts[number]
            offset = (
                f"{1e3 * offsets[number][0]:+.1f} ± {1e3 * offsets[number][1]:.1f} ms" if number in offsets else "-"
            )
            free = "-" if facts.folder_error else format_bytes(facts.free_bytes)
            best = f"{max(links[number].values()):.3g} GB/s" if links.get(number) else "-"
            span = f"{number}-{following - 1}" if following > number + 1 else str(number)
            rows.append([facts.host, span, facts.device, facts.address or "-", offset, free, best])
        return table([head, *rows], "<<<<>>>")

    def _leader(self, number: int) -> int:
        return self.leaders[bisect_right(self.leaders, number) - 1]


def collective_table(timings: Sequence[Timing], size: float) -> list[str]:
    """Args: `size`: MiB in the vector."""
    head = [f"collective of {size:g} MiB", "device", "time", "sent per rank"]
    rows = [[t.name, t.device, f"{1e3 * t.seconds:.2f} ms", f"{t.gigabytes_per_second:.3g} GB/s"] for t in timings]
    return table([head, *rows], "<<>>")


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
