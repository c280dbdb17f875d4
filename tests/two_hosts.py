"""Two hosts on one machine: a run on both, through the death of one host's processes and a link that is cut.

    sudo python tests/two_hosts.py                      # torchrun, then deepspeed
    sudo python tests/two_hosts.py torchrun --keep      # one of them; keeps logs and checkpoints

Under each launcher, with the scripts in launch/: train on two hosts, kill -9 one host's processes, start again, cut the
link, see both sides give up, restore it, start again. Weights and losses at the end are those of two processes on one
host to which nothing happened, bit by bit. The hosts are network namespaces (namespaces.py).

Exit code 0: all as expected; 1: not; 77: not allowed or not installed here, and why. Nothing is left behind.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from namespaces import ADDRESSES, Host, Network, UnavailableError, call, network

REPOSITORY = Path(__file__).resolve().parents[1]
SKIPPED = 77
LIMIT = 600
"""Seconds for whatever must come to an end."""
COLLECTIVE_TIMEOUT = 15
"""Seconds after which a rank gives up on the others."""
STEPS, SAVE_EVERY = 60, 4


@dataclass
class Launched:
    """The processes of one start: a command on each host that has one, and what it printed."""

    commands: dict[str, subprocess.Popen[bytes]]
    logs: dict[str, Path]

    def wait(self, seconds: float = LIMIT) -> dict[str, int]:
        """Exit codes.

        Raises:
            AssertionError: one of them is still running after so long.
        """
        deadline = time.monotonic() + seconds
        for name, process in self.commands.items():
            try:
                process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"{name} still runs after {seconds:.0f} s\n{self.output()}") from None
        return {name: process.returncode for name, process in self.commands.items()}

    def output(self) -> str:
        return "\n".join(f"---- {name}\n{log.read_text(errors='replace')}" for name, log in self.logs.items())


class Launcher(ABC):
    """How runs are started: on two hosts, and on one with as many processes."""

    name: str

    def __init__(self, net: Network, folder: Path) -> None:
        self.hosts, self.alone, self.folder = net.hosts, net.alone, folder
        self.run, self.reference_run = folder / f"{self.name}-two-hosts", folder / f"{self.name}-one-host"
        self.count = 0

    @abstractmethod
    def two_hosts(self) -> dict[str, list[str]]:
        """The command of each host."""

    @abstractmethod
    def one_host(self) -> list[str]:
        """The command of the run that nothing happens to."""

    def training(self, run: Path) -> list[str]:
        """Options of launch/pretrain.py, the same at each start: a run goes on from its newest checkpoint by itself."""
        return ["--config", str(self.folder / "tiny.yaml"), "--output_dir", str(run)]

    def start(self, preflight: bool = False) -> Launched:
        options = [] if preflight else ["--no-preflight"]
        commands = {
            host.name: host.command(*command, *options, *self.training(self.run))
            for host in self.hosts
            if (command := self.two_hosts().get(host.name))
        }
        return self.launch(commands)

    def reference(self) -> Launched:
        command = [*self.one_host(), "--no-preflight", *self.training(self.reference_run)]
        return self.launch({self.alone.name: self.alone.command(*command)})

    def launch(self, commands: dict[str, list[str]]) -> Launched:
        self.count += 1
        logs = {name: self.folder / f"{self.name}-{self.count}-{name}.log" for name in commands}
        environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **self.environment()}
        started = {}
        for name, command in commands.items():
            with logs[name].open("wb") as log:
                started[name] = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
                )
        return Launched(started, logs)

    def environment(self) -> dict[str, str]:
        return {}


class Torchrun(Launcher):
    name = "torchrun"
    script = (str(REPOSITORY / "launch" / "torchrun.sh"), "--cpu", "--stuck-timeout", "10")

    def two_hosts(self) -> dict[str, list[str]]:
        meet = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-endpoint", f"{ADDRESSES['host-a']}:29500"]
        return {host.name: [*self.script, *meet] for host in self.hosts}

    def one_host(self) -> list[str]:
        return [*self.script, "--nproc-per-node", "2"]


class DeepSpeed(Launcher):
    """The launcher on the first host, which reaches both with pdsh over ssh, a daemon with keys of its own on each."""

    name = "deepspeed"
    script = (str(REPOSITORY / "launch" / "deepspeed.sh"), "--cpu")

    def __init__(self, net: Network, folder: Path) -> None:
        super().__init__(net, folder)
        missing = [program for program in ("/usr/sbin/sshd", "ssh", "ssh-keygen", "pdsh") if not shutil.which(program)]
        if missing:
            install = "apt-get install openssh-server openssh-client pdsh"
            raise UnavailableError(f"{', '.join(missing)} not installed: {install}")
        try:
            import deepspeed  # noqa: F401
        except ImportError:
            raise UnavailableError("deepspeed is not installed: pip install -e '.[deepspeed]'") from None
        (folder / "hostfile").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES.values()))
        self.ssh = folder / "ssh"
        self.ssh.mkdir(mode=0o700)
        for key in ("host", "user"):
            call(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.ssh / key)])
        (self.ssh / "sshd_config").write_text(
            f"HostKey {self.ssh}/host\nAuthorizedKeysFile {self.ssh}/user.pub\nPidFile none\nUsePAM no\n"
            "StrictModes no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\nMaxStartups 100\n"
        )
        (self.ssh / "config").write_text(
            f"IdentityFile {self.ssh}/user\nIdentitiesOnly yes\nStrictHostKeyChecking no\n"
            f"UserKnownHostsFile {self.ssh}/known_hosts\nLogLevel ERROR\nBatchMode yes\nConnectTimeout 10\n"
        )
        # deepspeed and pdsh call "ssh": one that reads only this configuration.
        (self.ssh / "bin").mkdir()
        wrapper = self.ssh / "bin" / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {self.ssh}/config "$@"\n')
        wrapper.chmod(0o755)
        for host in self.hosts:
            before = host.processes()
            host.run("/usr/sbin/sshd", "-f", self.ssh / "sshd_config", "-E", self.ssh / f"{host.name}.log")
            host.keep = host.processes().keys() - before.keys()

    def environment(self) -> dict[str, str]:
        return {"PATH": f"{self.ssh}/bin:{os.environ['PATH']}", "PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=5"}

    def training(self, run: Path) -> list[str]:
        return [*super().training(run), "--deepspeed", str(REPOSITORY / "configs" / "deepspeed" / "zero2.json")]

    def two_hosts(self) -> dict[str, list[str]]:
        return {"host-a": [*self.script, "--hostfile", str(self.folder / "hostfile")]}

    def one_host(self) -> list[str]:
        return [*self.script, "--num-gpus", "2"]


def write_config(folder: Path) -> None:
    shapes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1}
    (folder / "model.json").write_text(json.dumps({**shapes, "max_position_embeddings": 64}))
    (folder / "corpus").mkdir()
    for page in (REPOSITORY / "docs").glob("*.md"):
        (folder / "corpus" / f"{page.stem}.txt").write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    options = {
        "model": str(folder / "model.json"),
        "data": str(folder / "corpus"),
        "text_unit": "paragraph",
        "cache_dir": str(folder / "cache"),
        "validation_fraction": 0.2,
        "vocab_size": 300,
        "seq_len": 32,
        "rank": 4,
        "warmup_steps": 3,
        "steps": STEPS,
        "batch_size": 8,
        "save_every": SAVE_EVERY,
        "eval_every": 0,
        "timeout_minutes": COLLECTIVE_TIMEOUT / 60,
    }
    (folder / "tiny.yaml").write_text(json.dumps(options))  # which is YAML


def checkpoints(run: Path) -> list[Path]:
    """Whole ones, oldest first."""
    return sorted((run / "checkpoints").glob("step_[0-9]*[0-9]"))


def wait_for(what: str, condition: Callable[[], object], launched: Launched) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        ended = {name: process.poll() for name, process in launched.commands.items() if process.poll() is not None}
        assert not ended, f"ended with {ended} before {what}\n{launched.output()}"
        assert time.monotonic() < deadline, f"{what}: not within {LIMIT} s\n{launched.output()}"
        time.sleep(0.01)


def sequence(launcher: Launcher, net: Network, say: Callable[[str], None]) -> None:
    """All of it under one launcher.

    Raises:
        AssertionError: something went otherwise than expected; with the output of the launchers.
    """
    run, second = launcher.run, net.hosts[1]

    def new_checkpoint(launched: Launched) -> int:
        before = newest(run)
        wait_for("a new checkpoint", lambda: newest(run) > before, launched)
        return newest(run)

    def failed(launched: Launched, words: Sequence[str]) -> None:
        """Both sides end, with an exit code and words that tell."""
        started = time.monotonic()
        codes = launched.wait()
        seconds = time.monotonic() - started
        output = launched.output()
        assert all(codes.values()), f"exit codes {codes}\n{output}"
        assert any(word in output for word in words), f"none of {words} in\n{output}"
        wait_for_none(net.hosts)
        say(f"all processes gave up within {seconds:.0f} s, exit codes {codes}; the newest checkpoint is {newest(run)}")
        assert newest(run) < STEPS, "the run was over before"

    launched = launcher.start(preflight=True)
    step = new_checkpoint(launched)
    assert "preflight: all is well" in launched.output(), launched.output()
    say(f"two hosts passed the preflight and train; step {step} is saved")
    second.kill()
    say(f"kill -9 of all processes of {second.name}")
    failed(launched, ["Connection closed by peer", "Connection reset by peer", "Broken pipe"])

    launched = launcher.start()
    step = new_checkpoint(launched)
    say(f"started again; went on, and step {step} is saved")
    net.cut(second.name)
    say(f"link of {second.name} cut")
    reference = launcher.reference()
    failed(launched, ["Timed out", "timed out"])
    net.restore(second.name)
    say("link restored")

    launched = launcher.start()
    codes = launched.wait()
    assert not any(codes.values()), f"exit codes {codes}\n{launched.output()}"
    codes = reference.wait()
    assert not any(codes.values()), f"exit codes {codes}\n{reference.output()}"
    compare(run, launcher.reference_run)
    say(f"started again; went on to step {newest(run)}, with the losses and weights of a run on one host, bit by bit")


def newest(run: Path) -> int:
    """Step of the newest checkpoint, 0 if there is none."""
    return max((int(folder.name.removeprefix("step_")) for folder in checkpoints(run)), default=0)


def wait_for_none(hosts: Sequence[Host]) -> None:
    """Until no process of a run is left on the hosts; an sshd does not notice that its link is cut."""
    deadline = time.monotonic() + LIMIT
    while left := [line for host in hosts for line in host.processes().values() if not line.startswith("sshd")]:
        assert time.monotonic() < deadline, f"outlive the launcher: {left}"
        time.sleep(0.05)


def compare(run: Path, reference: Path) -> None:
    import torch

    def losses(folder: Path) -> list[tuple[object, ...]]:
        lines = (folder / "log.jsonl").read_text().splitlines()
        return [tuple(json.loads(line)[name] for name in ("step", "loss", "val_loss", "grad_norm")) for line in lines]

    found, expected = losses(run), losses(reference)
    assert len(found) == STEPS, f"{len(found)} steps are in the log"
    different = [pair for pair in zip(found, expected, strict=True) if pair[0] != pair[1]]
    assert not different, f"(step, loss, validation loss, norm) differ from those of one host, first: {different[0]}"
    weights, expected_weights = load_weights(checkpoints(run)[-1]), load_weights(checkpoints(reference)[-1])
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected_weights[name]), f"{name} differs from that of one host"


def load_weights(checkpoint: Path) -> dict[str, object]:
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    zero = checkpoint / "zero" / "mp_rank_00_model_states.pt"
    if zero.exists():
        return dict(torch.load(zero, weights_only=False)["module"])
    with tempfile.NamedTemporaryFile() as file:
        dcp_to_torch_save(checkpoint, file.name)
        return dict(torch.load(file.name, weights_only=False)["model"])


LAUNCHERS: dict[str, type[Launcher]] = {"torchrun": Torchrun, "deepspeed": DeepSpeed}


def check(name: str, folder: Path, say: Callable[[str], None]) -> None:
    """The whole sequence under a launcher; writes into the folder.

    Raises:
        UnavailableError: this machine cannot do it.
        AssertionError: something went otherwise than expected.
    """
    write_config(folder)
    with network(folder) as net:
        sequence(LAUNCHERS[name](net, folder), net, say)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("launchers", nargs="*", metavar="LAUNCHER", help=f"of {', '.join(LAUNCHERS)} (default: all)")
    parser.add_argument("--keep", action="store_true", help="keep the folder with logs and checkpoints, and name it")
    options = parser.parse_args(arguments)
    if unknown := set(options.launchers) - set(LAUNCHERS):
        parser.error(f"{', '.join(unknown)}: expected {' or '.join(LAUNCHERS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # cleans up as Ctrl-C does
    results = []
    for name in options.launchers or LAUNCHERS:
        started = time.monotonic()

        def say(message: str, name: str = name, started: float = started) -> None:
            print(f"[{name} {time.monotonic() - started:5.1f} s] {message}", flush=True)

        folder = Path(tempfile.mkdtemp(prefix="two-hosts-"))
        try:
            check(name, folder, say)
            results.append(0)
        except UnavailableError as error:
            say(f"skipped: {error}")
            results.append(SKIPPED)
        except AssertionError as error:
            say(f"FAILED: {error}")
            results.append(1)
        finally:
            if options.keep:
                say(f"kept {folder}")
            else:
                shutil.rmtree(folder, ignore_errors=True)
    return 1 if 1 in results else min(results)


if __name__ == "__main__":
    sys.exit(main())
