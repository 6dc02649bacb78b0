"""What a sandbox's network costs, beside the helper program alone: iperf3, connections, and the time until it is there.

    sh helpers/bench net [--seconds S] [--rounds N]      as an ordinary user

The helper alone is the same program with the same options on a net namespace of unshare(1)'s, as fresh as a sandbox's
each time, and what uses it is in a session of its own like a sandbox's command. Both are measured in every round, in
turns first; medians are shown, and the median of the rounds' ratios, for what else the machine does changes from round
to round more than anything that is measured. All traffic is between the host's loopback and namespaces of this run's
own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT))

from rootless import network  # noqa: E402

SBX = [sys.executable, "-I", "-S", "-E", str(CHECKOUT / "rootless" / "__main__.py")]
GATEWAY = "10.0.2.2"
RESET = struct.pack("ii", 1, 0)  # struct linger
BACKENDS = [name for name in ("slirp4netns", "pasta") if shutil.which(name)]
CONNECT = """
import socket, sys, time
host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
start = time.monotonic()
for _ in range(count):
    with socket.create_connection((host, port), 10) as link:
        link.recv(1)
print(count / (time.monotonic() - start))
"""
Runner = Callable[[list[str]], list[str]]


def inside_sbx(backend: str) -> Runner:
    """Return what puts a command into a sandbox."""
    return lambda command: [*SBX, "run", "--no-tty", "--net", backend, "--host-loopback", "host", *command]


@contextlib.contextmanager
def helper_alone(backend: str) -> Iterator[Runner]:
    """A net namespace with the helper program, and what puts a command into it."""
    ready, says_ready = os.pipe()
    holder = subprocess.Popen(
        ["unshare", "-Urn", "sh", "-c", "echo; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout
    holder.stdout.readline()
    if backend == "slirp4netns":
        words = ["slirp4netns", "--configure", "--mtu=65520", "--enable-sandbox", "--enable-seccomp", "--ready-fd",
                 str(says_ready), *(["--enable-ipv6"] if network.has_ipv6() else []),
                 "--userns-path", f"/proc/{holder.pid}/ns/user", str(holder.pid), "tap0"]  # fmt: skip
    else:
        words = ["pasta", "--foreground", "--quiet", "--config-net", "--ns-ifname", "tap0", "-a", "10.0.2.100", "-n",
                 "24", "-g", GATEWAY, "--ipv4-only", "-t", "none", "-u", "none", "-T", "none", "-U", "none",
                 str(holder.pid)]  # fmt: skip
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    helper = subprocess.Popen(words, pass_fds=[says_ready], **quiet)
    os.close(says_ready)
    enter = ["nsenter", "-t", str(holder.pid), "-U", "-n", "--preserve-credentials"]
    try:
        if backend == "slirp4netns":
            os.read(ready, 1)
        else:
            while "tap0" not in subprocess.run([*enter, "ip", "route"], capture_output=True, text=True).stdout:
                time.sleep(0.05)  # without going to the background it says nothing when it is ready
        # In a session of its own, as in a sandbox: the scheduler shares the processors out among sessions (sched(7),
        # autogroup), so one that is the helper's and the server's too would give these more.
        yield lambda command: [*enter, "setsid", "--wait", *command]
    finally:
        os.close(ready)
        helper.send_signal(signal.SIGTERM)
        helper.wait()
        holder.communicate()


def gigabits(run: Runner, seconds: int, *options: str) -> float:
    """Return what iperf3 carries, 0.0 where it stalls."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    server = subprocess.Popen(
        ["iperf3", "-s", "-1", "-B", "127.0.0.1", "-p", port, "--forceflush"], stdout=subprocess.PIPE
    )
    assert server.stdout
    server.stdout.readline()
    server.stdout.readline()
    words = ["iperf3", "-c", GATEWAY, "-p", port, "-t", str(seconds), "-J", *options]
    try:
        done = subprocess.run(run(words), capture_output=True, text=True, timeout=seconds + 10)
        return float(json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"]) / 1e9
    except (subprocess.TimeoutExpired, KeyError, ValueError):
        return 0.0
    finally:
        server.kill()
        server.communicate()


def connections(run: Runner, count: int) -> float:
    """Return how many connections in a second, one after the other, a program inside makes to the host's loopback."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)

        def serve() -> None:
            with contextlib.suppress(OSError):  # closed, because the other side gave up
                for _ in range(count):
                    with listener.accept()[0] as link:
                        link.send(b".")
                        link.recv(1)
                        # A reset, after the other side's end, leaves nobody in TIME_WAIT: with as many there as there
                        # are ports, connections are what is slow to find one, and then fail.
                        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

        threading.Thread(target=serve, daemon=True).start()
        port = str(listener.getsockname()[1])
        words = run(["/usr/bin/python3", "-c", CONNECT, GATEWAY, port, str(count)])
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        if done.returncode:
            sys.exit(f"bench net: {done.stderr}")
        return float(done.stdout)


def compare(backend: str, measure: Callable[[Runner], float], rounds: int) -> tuple[float, float, float]:
    """Return the median of `measure` for the helper alone and for sbx, and that of the rounds' ratios."""
    alone: list[float] = []
    ours: list[float] = []

    def measure_alone() -> None:
        with helper_alone(backend) as run:
            alone.append(measure(run))

    acts = [measure_alone, lambda: ours.append(measure(inside_sbx(backend)))]
    for _ in range(rounds):
        for act in acts:
            act()
        acts.reverse()
    ratios = [mine / theirs for mine, theirs in zip(ours, alone, strict=True) if theirs]
    return statistics.median(alone), statistics.median(ours), statistics.median(ratios) if ratios else 0.0


def launch(backend: str) -> float:
    """Return the milliseconds of one launch of true."""
    start = time.monotonic()
    subprocess.run([*SBX, "run", "--no-tty", "--net", backend, "host", "true"], check=True, stdin=subprocess.DEVNULL)
    return (time.monotonic() - start) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=2, help="of each iperf3 run")
    parser.add_argument("--rounds", type=int, default=9, help="how often each is measured; medians count")
    parser.add_argument("--connections", type=int, default=2000)
    words = parser.parse_args()
    if not shutil.which("iperf3"):
        sys.exit("bench net: no iperf3 (package iperf3)")
    print(f"{'':24}{'helper alone':>14}{'sbx':>10}{'ratio':>8}")
    measures: dict[str, Callable[[Runner], float]] = {
        "to the host, Gbit/s": lambda run: gigabits(run, words.seconds),
        "from the host, Gbit/s": lambda run: gigabits(run, words.seconds, "-R"),
        "connections/s": lambda run: connections(run, words.connections),
    }
    for backend in BACKENDS:
        for what, measure in measures.items():
            theirs, ours, ratio = compare(backend, measure, words.rounds)
            shown = f"{ratio:.2f}" if ratio else "stalls"
            print(f"{backend:12}{what:>22}{theirs:>10.1f}{ours:>10.1f}{shown:>8}", flush=True)
    times = {name: [] for name in ("none", *BACKENDS)}
    for _ in range(words.rounds * 3):
        for name, values in times.items():
            values.append(launch(name))
    base = statistics.median(times["none"])
    for name, values in times.items():
        print(f"start-up with {name:12} {statistics.median(values):8.1f} ms, {statistics.median(values) - base:+.1f}")


if __name__ == "__main__":
    main()
