"""The preflight on real ranks, each as a host of its own: a good one passes, and what is wrong with one is named."""

import contextlib
import io
import os
import socket
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from distributed import once, run_like_torchrun

from ldadam_dist.network import choose_interface, interface_of, is_this_machine, route
from ldadam_dist.preflight import __main__ as preflight
from ldadam_dist.preflight import facts, hosts, links, meeting, verdict

# Other tests may run on this machine's cores: a rank that has to wait for one is not a slow host.
FAST = ("--size", "0.5", "--min-free", "0.001", "--max-slowdown", "10")
CLOCK = 5.0
"""Seconds that a wrong clock is ahead."""


def rank(arguments: list[str]) -> int:
    """Entry of a rank: FOLDER FAULTS option ...; FAULTS are name:number of the rank, joined by commas."""
    folder, faults, *options = arguments
    number = int(os.environ["RANK"])
    mine = {fault.split(":")[0] for fault in faults.split(",") if fault and int(fault.split(":")[1]) == number}
    os.environ["LOCAL_RANK"] = "0"
    name = SimpleNamespace(**{key: getattr(socket, key) for key in dir(socket)})
    name.gethostname = lambda: f"host-{number}"
    facts.socket = name
    meeting.socket = name
    if "loopback" not in faults:
        verdict.is_loopback = lambda address: False  # the hosts are told apart by their names only
    hosts._SEEN_WITHIN = 0.3
    output = Path(folder) / "shared"
    if "missing" in mine:
        return 0
    if "version" in mine:
        versions = {**facts.versions(), "transformers": "4.48.0"}
        facts.versions = lambda: versions
    if "unwritable" in mine:
        (Path(folder) / "file").touch()
        output = Path(folder) / "file" / "run"
    if "unshared" in mine:
        output = Path(folder) / "another"
    if "clock" in mine:
        meeting.time = SimpleNamespace(time=lambda: time.time() + CLOCK, monotonic=time.monotonic)
    if "slow" in mine:
        exchange = links.exchange
        links.exchange = lambda *arguments: (time.sleep(0.08), exchange(*arguments))
    if "wrong" in mine:
        links._all_gather = lambda out, mine, async_op: SimpleNamespace(wait=lambda: out.zero_())
    if "blocked" in mine:
        listener = hosts.listener

        @contextlib.contextmanager
        def blocked(address):
            with listener(address) as port:
                pass
            yield port

        hosts.listener = blocked

    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = preflight.main(["--output-dir", str(output), *FAST, *options])
    (Path(folder) / f"rank-{number}").write_text(f"exit code {code}\n{stdout.getvalue()}\n{stderr.getvalue()}")
    return 0


@once
def said(size: int, faults: str, *options: str) -> list[str]:
    """What each rank printed, after its exit code; nothing for a rank that did not come."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_like_torchrun(size, rank, [str(folder), faults, *options])
        assert not list(folder.glob("*/.preflight*"))
        return [path.read_text() if (path := folder / f"rank-{n}").exists() else "" for n in range(size)]


def test_good_hosts_pass():
    first, *others = said(3, "")
    assert first.startswith("exit code 0"), first
    assert "preflight: all is well" in first
    assert all(text.strip() == "exit code 0" for text in others), others
    for name in ("host-0", "host-1", "host-2", "all_reduce", "reduce_scatter", "all_gather", "all_to_all", "torch 2"):
        assert name in first
    assert first.count("GB/s") == 3 + 4  # a link of each host, four collectives


FAULTS = "clock:1,unwritable:2,slow:3,unshared:4"


def test_what_is_wrong_is_named_on_all_hosts():
    """Faults with which collectives still work, each on one of five hosts."""
    first, *others = said(5, FAULTS)
    named = [line for line in first.splitlines() if line.startswith("preflight failed: ")]
    assert len(named) == 4, first
    for expected in (
        "host-1: its clock is +5.0",
        "host-2 cannot write to the output folder",
        "host-3: its best link to another host has",
        "host-4 has another output folder than host-0",
    ):
        assert any(expected in line for line in named), (expected, first)
    for text in [first, *others]:
        assert text.startswith("exit code 1")
        assert [line for line in text.splitlines() if line.startswith("preflight failed: ")] == named


def test_limits_are_options():
    first, _ = said(2, "clock:1", "--max-clock-offset", "6", "--min-free", "1e9", "--min-bandwidth", "1e6")
    assert "its clock is" not in first
    assert "host-1 has" in first
    assert "(--min-free)" in first
    assert "host-0: its best link to another host has" in first
    assert "(--min-bandwidth)" in first


def test_no_collective_runs_where_it_might_hang():
    first, *_ = said(3, "version:2,blocked:1")
    assert "transformers differs: host-2 has 4.48.0 (rank 2); 2 rank(s), as those of host-0, have" in first
    assert "host-1 cannot be reached from host-0 at 127.0.0.1:" in first
    assert "host-1 cannot be reached from host-2" in first
    assert "all_reduce" not in first


def test_an_address_that_is_each_hosts_own_is_refused():
    first, _ = said(2, "loopback:0")
    assert "host-1 takes MASTER_ADDR for its own 127.0.0.1" in first
    assert "launch with the address" in first


def test_wrong_numbers_are_found():
    """On both ranks alike, so that they go on to the next collective together."""
    first, _ = said(2, "wrong:0,wrong:1")
    assert "host-1: a collective failed on rank 1: all_gather on cpu gave wrong numbers" in first


def test_a_rank_that_does_not_come_is_named():
    first, second, _ = said(3, "missing:2", "--timeout", "1")
    assert "rank(s) 2 of 3 did not come within 1 s; those of host-0, host-1 did" in first
    assert "rank(s) 2 of 3 did not come" in second


def test_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert preflight.main(["--output-dir", str(tmp_path / "run"), *FAST]) == 0
    assert "1 rank(s) on 1 host(s)" in capsys.readouterr().out


@pytest.fixture
def launched(monkeypatch):
    """The environment of a rank; call it with its number and its port."""

    def launched(number, port):
        values = {"RANK": number, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return launched


def test_the_address_that_cannot_be_reached_is_named(launched, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    launched(1, port)
    assert preflight.main(["--timeout", "1"]) == 1
    said = capsys.readouterr().err
    assert f"{socket.gethostname()}: rank 1 cannot reach 127.0.0.1:{port} (MASTER_ADDR:MASTER_PORT) within 1 s" in said


def test_a_port_that_is_taken_is_named(launched, capsys):
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        port = server.getsockname()[1]
        launched(0, port)
        assert preflight.main(["--timeout", "1"]) == 1
    assert f"cannot open port {port} (MASTER_PORT). Is it in use?" in capsys.readouterr().err


def test_half_an_environment_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert preflight.main([]) == 1
    assert "MASTER_PORT not set, but RANK" in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8])
def test_everyone_meets_everyone_once(count):
    met = [pair for round_ in links.rounds(list(range(count))) for pair in round_]
    assert {frozenset(pair) for pair in met} == {frozenset((a, b)) for a in range(count) for b in range(a)}
    assert len(met) == count * (count - 1) // 2
    for round_ in links.rounds(list(range(count))):
        players = [player for pair in round_ for player in pair]
        assert len(players) == len(set(players))


def test_routes_of_this_machine():
    assert route("127.0.0.1") == ("127.0.0.1", "127.0.0.1")
    assert is_this_machine("localhost")
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.1") is None


def test_gloo_takes_the_interface_that_leads_to_the_first_host(monkeypatch):
    module = sys.modules["ldadam_dist.network"]
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    choose_interface()
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    monkeypatch.setattr(module, "is_loopback", lambda address: False)
    choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
