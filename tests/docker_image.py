"""The image of docker/Dockerfile, built and run without a Docker engine: by buildah, on a Debian made by debootstrap.

    sudo python tests/docker_image.py           # --keep keeps the folder with the image, and names it

What is checked: nothing is installed but what constraints.txt pins, and no cache, no secret and no file that is not
meant to be there is left; nothing runs as root; the entry point's words, exit codes and errors; NCCL's InfiniBand
libraries and `ldadam-dist doctor`; training on one node, and on the two of docker/compose.yaml, which are network
namespaces here (namespaces.py). pip's settings on this machine are used for the build, TORCH_INDEX_URL too.

Exit code 0: all as expected; 1: not; 77: not allowed or not installed here, and why. Nothing is left behind.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import yaml
from namespaces import ADDRESSES, UnavailableError, network
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parents[1]
SKIPPED = 77
LIMIT = 900
"""Seconds for whatever must come to an end; the slowest is the build."""
SUITE, PYTHON = "bookworm", "3.11"
MIRROR = "http://deb.debian.org/debian"
APP = "/opt/ldadam_dist"
NODES = dict(zip(("node0", "node1"), ADDRESSES.values(), strict=True))
ALONE = "alone"
"""Host name of a container that is not a node of two."""
STEPS = 4
TINY = (
    f"--data README.md --text_unit paragraph --validation_fraction 0.2 --vocab_size 300 --seq_len 32 --rank 4 "
    f"--batch_size 4 --steps {STEPS} --warmup_steps 1 --eval_every 0"
)


def run(words: Sequence[str], limit: float = LIMIT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words,
        cwd=REPOSITORY,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=limit,
        stdin=subprocess.DEVNULL,
    )


def call(command: Sequence[object], limit: float = LIMIT) -> str:
    """What the command prints to stdout.

    Raises:
        AssertionError: it failed; with the end of what it printed.
    """
    words = [str(word) for word in command]
    done = run(words, limit=limit)
    said = (done.stdout + done.stderr)[-6000:]
    assert done.returncode == 0, f"`{shlex.join(words)}`: exit code {done.returncode}\n{said}"
    return done.stdout


def pip_settings() -> dict[str, str]:
    """pip's settings that say where packages are; those of the environment over those of files."""
    lines = call([sys.executable, "-m", "pip", "config", "list"]).splitlines()
    pairs = [line.split("=", 1) for line in lines if "=" in line]
    levels = ["global", "user", "site", ":env:"]
    pairs.sort(key=lambda pair: levels.index(pair[0].split(".")[0]) if pair[0].split(".")[0] in levels else 0)
    found = {key.split(".")[-1]: str(ast.literal_eval(value)) for key, value in pairs}
    wanted = ("index-url", "extra-index-url", "find-links", "trusted-host", "proxy", "cert")
    return {name: found[name] for name in wanted if name in found}


def expect_packages(torch_index: Sequence[str]) -> None:
    """Is there an index of packages, and a torch without CUDA, which would be several GB?"""
    with tempfile.TemporaryDirectory() as target:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--report", "-", "--no-deps"]
        command += ["--constraint", "constraints.txt", "--only-binary", ":all:", "--python-version", PYTHON]
        # A torch may lie in a folder of this machine; hjson, which DeepSpeed needs, tells whether there is an index.
        command += ["--target", target, "--ignore-installed", *torch_index, "hjson", "torch"]
        try:
            report = json.loads(call(command, 120))
        except (AssertionError, subprocess.TimeoutExpired) as error:
            raise UnavailableError(f"pip finds no packages: {str(error).strip().splitlines()[-1]}") from None
    (version,) = (one["metadata"]["version"] for one in report["install"] if one["metadata"]["name"] == "torch")
    if "+cpu" not in version:
        raise UnavailableError(f"pip would take torch {version} with CUDA, several GB: set TORCH_INDEX_URL (README.md)")


def interpolate(text: str, values: dict[str, str]) -> str:
    """${NAME:-default}, as Docker Compose has it."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda match: values.get(match[1]) or match[2], text)


def launch_scripts() -> dict[str, str]:
    """The words that the entry point has for scripts of launch/."""
    text = (REPOSITORY / "docker" / "entrypoint.sh").read_text()
    return dict(re.findall(r"^ +(\w+)\) exec \"\$repository/(\S+)\" \"\$\{@:2\}\" ;;$", text, re.MULTILINE))


class Image:
    """The built image and a container of it, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        if os.geteuid() != 0:
            raise UnavailableError("needs root, for debootstrap and chroot: sudo")
        for program in ("buildah", "debootstrap"):
            if not shutil.which(program):
                raise UnavailableError(f"{program} is not installed: apt-get install {program}")
        self.folder = folder
        storage = {"--root": folder / "store", "--runroot": folder / "run", "--storage-driver": "vfs"}
        # A buildah that is killed leaves what it has in TMPDIR.
        self.buildah = ["env", f"TMPDIR={folder}", "buildah", *(word for pair in storage.items() for word in pair)]

    def make_base(self) -> None:
        """A Debian without Python."""
        root = self.folder / "debian"
        try:  # what it mounts goes with the namespace, whatever ends it
            call(["unshare", "--mount", "debootstrap", "--variant=minbase", SUITE, root, MIRROR])
        except (AssertionError, subprocess.TimeoutExpired) as error:
            raise UnavailableError(f"no Debian from {MIRROR}: {str(error).strip().splitlines()[-1]}") from None
        for package in (root / "var/cache/apt/archives").glob("*.deb"):  # debootstrap's own
            package.unlink()
        container = call([*self.buildah, "from", "scratch"]).strip()
        call([*self.buildah, "copy", "--quiet", container, root, "/"])
        call([*self.buildah, "commit", "--quiet", "--rm", container, "localhost/debian"])
        shutil.rmtree(root)

    def build(self, torch_index: str) -> None:
        settings = pip_settings()
        mounts = []
        for name in ("find-links", "cert"):
            places = settings.pop(name, "").split()
            for index, place in enumerate(places):
                path = urlparse(place).path
                if Path(path).exists():
                    places[index] = f"/run/pip/{name}-{index}"
                    mounts += ["--volume", f"{path}:{places[index]}:ro"]
            if places:
                settings[name] = " ".join(places)
        for name in ("index-url", "extra-index-url"):  # folders are not seen from in there
            urls = [url for url in settings.pop(name, "").split() if urlparse(url).scheme != "file"]
            if urls:
                settings[name] = " ".join(urls)
        secret = self.folder / "pip.conf"
        secret.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
        arguments = ["--build-arg", "BASE_IMAGE=localhost/debian", "--build-arg", f"TORCH_INDEX_URL={torch_index}"]
        command = [*self.buildah, "build", "--isolation", "chroot", "--format", "docker", "--layers=false", *arguments]
        command += [*mounts, "--secret", f"id=pip.conf,src={secret}", "--file", "docker/Dockerfile", "--tag", "image"]
        call([*command, "."])
        self.config: dict[str, Any] = json.loads(call([*self.buildah, "inspect", "--type", "image", "image"]))
        self.config = self.config["Docker"]["config"]
        # Not a volume at /etc/hosts: buildah mounts one of its own there, and which of the two lies on top varies.
        names = [word for name, address in NODES.items() for word in ("--add-host", f"{name}:{address}")]
        names += ["--add-host", f"{ALONE}:127.0.0.1"]
        self.container = call([*self.buildah, "from", "--pull-never", *names, "image"]).strip()

    def inside(self, *command: object, node: str = ALONE, options: Sequence[str] = ()) -> list[str]:
        """Run a command in the container, as its user; the entry point is left out, as `buildah run` does."""
        run = [*self.buildah, "run", "--isolation", "chroot", "--hostname", node, *options, self.container, "--"]
        return [str(word) for word in (*run, *command)]

    def started(self, *arguments: object, options: Sequence[str] = ()) -> list[str]:
        """docker run IMAGE ARGUMENTS"""
        return self.inside(*self.config["Entrypoint"], *arguments, options=options)

    def run(self, *arguments: object, options: Sequence[str] = ()) -> str:
        return call(self.started(*arguments, options=options))


def check_contents(image: Image) -> None:
    pinned = {}
    for line in (REPOSITORY / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            marker = requirement.marker
            python = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0"}
            if marker is None or marker.evaluate(python):
                pinned[requirement.name.replace("_", "-").lower()] = str(requirement.specifier).removeprefix("==")
    frozen = image.run("pip", "freeze", "--exclude-editable").splitlines()
    installed = dict(line.replace("_", "-").lower().split("==") for line in frozen)
    wrong = {name: version for name, version in installed.items() if version.split("+")[0] != pinned.get(name)}
    assert not wrong, f"not as in constraints.txt: {wrong}"
    folders = ["/root", "/home", "/tmp", "/var/tmp", "/var/cache/apt", "/var/lib/apt/lists"]
    left = image.run("find", *folders, "-type", "f", "-size", "+20k", options=["--user", "0"])
    assert left == "", f"caches are left in the image:\n{left}"
    image.run("test", "!", "-s", "/etc/pip.conf")  # the build's secret
    meant = "LICENSE README.md configs constraints.txt docker launch ldadam_dist pyproject.toml".split()
    made = ["ldadam_dist.egg-info", "runs"]
    assert sorted(image.run("ls", "-A", APP).split()) == sorted([*meant, *made])


def check_entry_point(image: Image) -> None:
    assert image.config["User"] == "1000:1000"
    assert image.run("id", "--user").strip() == "1000"
    assert image.run("sh", "-c", f"test -w {APP}/runs && ! test -w {APP}/launch && echo yes").strip() == "yes"
    assert image.run(*image.config["Cmd"]).startswith("usage: docker run ")
    for word, script in launch_scripts().items():
        assert image.run(word, "--help").startswith(f"usage: {script} ")
    trained = image.run("pretrain", "--dry-run", "--lr", "1e-3", "--output_dir", "a b").splitlines()[-1]
    assert trained.endswith(f"{APP}/launch/pretrain.py --lr 1e-3 --output_dir a\\ b"), trained
    unknown = image.run("sh", "-c", "touch ~/.cache/x && echo $USER", options=["--user", "4321:4321"])
    assert unknown.strip() == "4321"


def check_errors(image: Image) -> None:
    """Exit codes come out of the container, and what is wrong gets the errors that it gets outside."""
    assert run(image.started("bash", "-c", "exit 7")).returncode == 7
    script = str(REPOSITORY / "docker" / "entrypoint.sh")
    wrong: list[list[str]] = [
        ["--steps", "3"],
        ["pretrain", "--nproc-per-node", "0"],
        ["pretrain", "--nnodes", "2"],
        ["pretrain", "--cpu", "--no-preflight", "--nproc-per-node", "1", "--stepz", "3"],
        ["pretrain", "--nproc-per-node", "2"],  # no GPU
        ["finetune", "--num-machines", "2"],
    ]
    for arguments in wrong:
        found = run(image.started(*arguments))
        expected = run(["bash", script, *arguments], PYTHON=sys.executable)
        complaints = [
            [line for line in done.stderr.splitlines() if line.startswith(("error: ", "docker/", "launch/"))]
            for done in (found, expected)
        ]
        complaints[1] = [line.replace(socket.gethostname(), ALONE) for line in complaints[1]]
        assert complaints[0], f"{arguments}: no error, but\n{found.stderr}"
        assert found.returncode == expected.returncode != 0, f"{arguments}: {found.returncode}, {expected.returncode}"
        assert complaints[0] == complaints[1], f"{arguments}: {complaints[0]} inside, {complaints[1]} outside"


def check_health(image: Image) -> None:
    assert image.config.get("Healthcheck") in (None, {"Test": ["NONE"]})
    image.run("python", "-c", "import ctypes; ctypes.CDLL('libibverbs.so.1'), ctypes.CDLL('libmlx5.so.1')")
    assert "ldadam-dist is healthy" in image.run("ldadam-dist", "doctor")  # two processes as well


def losses(log: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()]


def exit_codes(running: dict[str, subprocess.Popen[bytes]]) -> dict[str, int | None]:
    """When all have ended, or one has failed, for which the others would wait."""
    codes: dict[str, int | None] = dict.fromkeys(running)
    deadline = time.monotonic() + LIMIT
    while None in codes.values() and not any(codes.values()) and time.monotonic() < deadline:
        time.sleep(0.2)
        codes = {name: process.poll() for name, process in running.items()}
    return codes


def check_training(image: Image, say: Callable[[str], None]) -> None:
    """On one node with two processes, and on two nodes with one each: the same losses."""
    volumes = []
    for volume in ("runs", "cache"):
        (image.folder / volume).mkdir()
        os.chown(image.folder / volume, 1000, 1000)  # as Docker does with a named volume
    mounted = {"runs": f"{APP}/runs", "cache": "/home/trainer/.cache"}
    for volume, place in mounted.items():
        volumes += ["--volume", f"{image.folder / volume}:{place}"]
    config = ["--config", "configs/pretrain/default.yaml", *TINY.split()]
    image.run("pretrain", "--cpu", "--nproc-per-node", 2, *config, "--output_dir", "runs/one-node", options=volumes)
    expected = losses(image.folder / "runs" / "one-node" / "log.jsonl")
    assert len(expected) == STEPS
    say(f"one node trained, losses {expected}")

    compose = yaml.safe_load(interpolate((REPOSITORY / "docker" / "compose.yaml").read_text(), {"ARGS": TINY}))
    services = compose["services"]
    assert list(services) == list(NODES)
    # Each node has its part of the cores, as each of two processes on one has: with more threads sums round otherwise.
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // 2)
    parts = {name: cores[-share * number :][:share] for number, name in enumerate(services, start=1)}
    with network(image.folder) as net:
        running = {}
        for host, (name, service) in zip(net.hosts, services.items(), strict=True):
            assert service["volumes"] == [f"{volume}:{place}" for volume, place in mounted.items()]
            variables = [f"{key}={value}" for key, value in service["environment"].items()]
            words = ["env", *variables, *image.config["Entrypoint"], *shlex.split(service["command"])]
            pinned = ["taskset", "--cpu-list", ",".join(map(str, parts[name]))]
            command = host.command(*pinned, *image.inside(*words, node=service["hostname"], options=volumes))
            with (image.folder / f"{name}.log").open("wb") as log:
                running[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            codes = exit_codes(running)
        finally:
            for process in running.values():
                process.kill()
    output = "\n".join((image.folder / f"{name}.log").read_text(errors="replace")[-3000:] for name in running)
    assert set(codes.values()) == {0}, f"exit codes {codes}, None: still running\n{output}"
    assert "preflight: all is well" in output, output
    found = losses(image.folder / "runs" / "two-nodes" / "log.jsonl")
    assert found == expected, f"losses {found} on two nodes, {expected} on one"
    say("two nodes met and trained, with the same losses")


def check(folder: Path, say: Callable[[str], None]) -> None:
    """Build the image and run it; writes into the folder.

    Raises:
        UnavailableError: this machine cannot do it.
        AssertionError: something went otherwise than expected.
    """
    image = Image(folder)
    torch_index = os.environ.get("TORCH_INDEX_URL", "")
    expect_packages(["--extra-index-url", torch_index] if torch_index else [])
    image.make_base()
    say(f"Debian {SUITE} is there")
    image.build(torch_index)
    size = json.loads(call([*image.buildah, "images", "--json", "image"]))[0]["size"]
    say(f"the image is built, {size}")
    check_contents(image)
    check_entry_point(image)
    say("versions, user and entry point are as expected")
    check_errors(image)
    say("exit codes and errors are those of outside")
    check_training(image, say)
    check_health(image)
    say("healthy")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="keep the folder with the image and logs, and name it")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # cleans up as Ctrl-C does
    started = time.monotonic()

    def say(message: str) -> None:
        print(f"[{time.monotonic() - started:5.1f} s] {message}", flush=True)

    folder = Path(tempfile.mkdtemp(prefix="docker-image-"))
    try:
        check(folder, say)
        return 0
    except UnavailableError as error:
        say(f"skipped: {error}")
        return SKIPPED
    except AssertionError as error:
        say(f"FAILED: {str(error) or traceback.format_exc()}")
        return 1
    finally:
        if options.keep:
            say(f"kept {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
