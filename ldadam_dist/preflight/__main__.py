"""python -m ldadam_dist.preflight: are the hosts of a run fit for it? Exit code 0, or 1 with the bad host named."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ldadam_dist.network import choose_interface
from ldadam_dist.parsing import OneLineParser
from ldadam_dist.preflight import hosts
from ldadam_dist.preflight.facts import Facts, Place, look, own_address
from ldadam_dist.preflight.links import Timing, time_collectives, time_links
from ldadam_dist.preflight.meeting import Meeting, MeetingError, first_line
from ldadam_dist.preflight.verdict import Judge, Limits, collective_table

GIB = 2**30


PROG = "python -m ldadam_dist.preflight"


def parse(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = OneLineParser(
        prog=prog,
        description="Checks versions, devices, ports, clocks, the output folder, collectives and their bandwidth on "
        "all ranks. Start it as the run will be started: under torchrun, deepspeed or alone.",
        epilog="example: torchrun --nproc-per-node 8 -m ldadam_dist.preflight --output-dir runs --min-bandwidth 10",
    )
    parser.add_argument("--output-dir", type=Path, default=Path("runs"), help="folder of the run (default: runs)")
    parser.add_argument(
        "--timeout", type=float, default=60, help="seconds to wait for all ranks, and for each answer (default: 60)"
    )
    parser.add_argument(
        "--size", type=float, default=16, help="MiB in the vectors that bandwidth is measured with (default: 16)"
    )
    parser.add_argument(
        "--min-bandwidth", type=float, default=0, help="GB/s that the best link of each host must have (default: any)"
    )
    parser.add_argument(
        "--max-slowdown",
        type=float,
        default=4,
        help="times that a host's best link may be slower than the median host's (default: 4)",
    )
    parser.add_argument("--min-free", type=float, default=1, help="GiB free in the output folder (default: 1)")
    parser.add_argument(
        "--max-clock-offset", type=float, default=1, help="seconds that clocks may differ from rank 0's (default: 1)"
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    options = parser.parse_args(arguments)
    for name, (least, most) in _BOUNDS.items():
        value = getattr(options, name)
        if not least <= value <= most:  # false for NaN
            parser.error(f"--{name.replace('_', '-')}={value}: expected a number from {least:g} to {most:g}")
    return options


_BOUNDS = {
    "timeout": (1e-3, 1e6),
    "size": (1e-3, 2**16),
    "min_bandwidth": (0, 1e6),
    "max_slowdown": (1, math.inf),
    "min_free": (0, 1e9),
    "max_clock_offset": (0, math.inf),
}
"""Least and largest values of the options, in their units."""


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> int:
    """The command line; returns its exit code. `prog` is how its help calls it."""
    options = parse(arguments, prog)
    options.output_dir = options.output_dir.expanduser()
    try:
        place = Place.from_environment()
        meeting = Meeting(place, options.timeout)
        address = own_address(place)
        with hosts.listener(address if place.leads_host else None) as port:
            facts = look(place, options.output_dir, address, port)
            problems = (lead if place.number == 0 else follow)(meeting, facts, options)
        meeting.close()
    except (MeetingError, ValueError) as error:
        print(f"preflight failed: {error}", file=sys.stderr, flush=True)
        return 1
    if place.leads_host:  # once on each host
        for problem in problems:
            print(f"preflight failed: {problem}", file=sys.stderr, flush=True)
    return 1 if problems else 0


def lead(meeting: Meeting, facts: Facts, options: argparse.Namespace) -> list[str]:
    """Rank 0: the problems, told to the others as well, also that they could not be found out."""
    try:
        meeting.expect_all()
        return decide(meeting, facts, options)
    except MeetingError as error:
        meeting.call_off(str(error))
        return [str(error)]


def decide(meeting: Meeting, facts: Facts, options: argparse.Namespace) -> list[str]:
    """Collect what the others find, print the tables, and tell all the problems."""
    size, timeout = meeting.place.size, meeting.timeout
    meeting.tell("facts", asdict(facts))
    reports = meeting.collect("facts", range(size), timeout)
    if silent := [number for number in range(size) if number not in reports]:
        raise MeetingError(f"rank(s) {', '.join(map(str, silent))} came, but did not report within {timeout:.0f} s")
    limits = Limits(options.max_clock_offset, options.min_free * GIB, options.min_bandwidth, options.max_slowdown)
    judge = Judge([Facts(**reports[number]) for number in range(size)], limits)
    leaders = judge.leaders

    with hosts.shown_file(options.output_dir) as file:
        targets = [(lead, judge.facts[lead].address, judge.facts[lead].port) for lead in leaders if size > 1]
        meeting.tell("look around", {"targets": targets, "file": file})
        meeting.tell("found", look_around(targets, file, options.output_dir))
        # A leader tries one host after another, and a blocked one takes its time.
        found = meeting.collect("found", leaders, timeout + len(leaders) * hosts.CONNECT_SECONDS)
    offsets = meeting.clock_offsets([lead for lead in leaders[1:] if lead in found])

    judge.check_answers("what it finds", leaders, found)
    versions, devices, addresses = judge.check_versions(), judge.check_devices(), judge.check_addresses()
    ports = judge.check_ports({number: dict(each["unreachable"]) for number, each in found.items()})
    judge.check_folders({number: each["sees"] for number, each in found.items()})
    judge.check_clocks(offsets)
    # Where one of these is wrong, collectives may hang.
    measure = versions and devices and addresses and ports and len(found) == len(leaders)
    meeting.tell("leaders", leaders if measure else None)
    links: dict[int, dict[int, float]] = {}
    timings: list[Timing] = []
    if measure:
        own = run_collectives(meeting, leaders, options)
        meeting.tell("measured", own)
        measured = meeting.collect("measured", range(size), timeout + 10)
        judge.check_answers("its collectives", range(size), measured)
        judge.check_errors({number: each["error"] for number, each in measured.items() if each["error"]})
        timings = [Timing(**timing) for timing in own["timings"]]
        links = {number: dict(each["links"]) for number, each in measured.items() if each["links"]}
        judge.check_links(links)
    meeting.tell("problems", judge.problems)

    print(f"preflight of {size} rank(s) on {len(leaders)} host(s)\n{judge.usual_versions()}\n")
    print("\n".join(judge.host_table(offsets, links)), end="\n\n")
    if timings:
        print("\n".join(collective_table(timings, options.size)), end="\n\n")
    print(f"preflight: {len(judge.problems)} problem(s)" if judge.problems else "preflight: all is well", flush=True)
    return judge.problems


def follow(meeting: Meeting, facts: Facts, options: argparse.Namespace) -> list[str]:
    """The other ranks: do what rank 0 asks for, and hear the problems from it."""
    meeting.tell("facts", asdict(facts))
    if meeting.place.leads_host:
        asked = meeting.hear("look around")
        if asked is not None:
            meeting.tell("found", look_around(asked["targets"], asked["file"], options.output_dir))
            meeting.answer_pings()
    leaders = meeting.hear("leaders")
    if leaders is not None:
        meeting.tell("measured", run_collectives(meeting, leaders, options))
    return list(meeting.hear("problems"))


def look_around(targets: Sequence[Sequence[Any]], file: str | None, folder: Path) -> dict[str, Any]:
    """What the first rank of a host finds: hosts it cannot reach, and whether it sees rank 0's file in its folder."""
    addresses = {int(lead): (str(address), int(port)) for lead, address, port in targets}
    return {
        "unreachable": list(hosts.unreachable(addresses).items()),
        "sees": file is not None and hosts.sees(folder, file),
    }


def run_collectives(meeting: Meeting, leaders: list[int], options: argparse.Namespace) -> dict[str, Any]:
    """Timings of collectives, links of this host, and what went wrong; never raises, so that rank 0 hears of it."""
    place, elements = meeting.place, max(1, round(options.size * 2**20 / 4))
    measured: dict[str, Any] = {"timings": [], "links": [], "error": None}
    try:
        device = start_group(meeting, options.timeout)
        measured["timings"] = [asdict(timing) for timing in time_collectives(device, elements, options.timeout)]
        if place.number in leaders:
            measured["links"] = list(time_links(leaders, device, elements, options.timeout).items())
        dist.destroy_process_group()
    except (RuntimeError, ValueError) as error:
        measured["error"] = first_line(error)
    return measured


def start_group(meeting: Meeting, timeout: float) -> torch.device:
    """The process group of all ranks, as the trainer's; returns this rank's device."""
    choose_interface()
    place = meeting.place
    common: dict[str, Any] = {"store": meeting.store, "timeout": timedelta(seconds=timeout)}
    if torch.cuda.is_available():
        device = torch.device("cuda", place.local_number)
        torch.cuda.set_device(device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl", rank=place.number, world_size=place.size, device_id=device, **common
        )
        return device
    dist.init_process_group("gloo", rank=place.number, world_size=place.size, **common)
    return torch.device("cpu")


if __name__ == "__main__":
    sys.exit(main())
