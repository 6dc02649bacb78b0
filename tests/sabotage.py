"""Make one step of a launch fail, by the kernel: `sabotage.py STEP run …` changes its data, or the ground under it.

Run as a program by test_steps_fail; the launch in it is the product's own from the first line to the last.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rootless import entry, namespaces, options, plan, privileges, syscalls
from rootless.errors import SbxError
from rootless.spec import IdMapping
from rootless.steps import Call, OutsideStep, Plan, Step

Change = Callable[[Plan, Step], None]


def given(**data: object) -> Change:
    """Return the change of a step's data."""

    def change(made: Plan, step: Step) -> None:
        for name, value in data.items():
            setattr(step, name, value)

    return change


def before(act: Callable[[], None]) -> Change:
    """Return the change that something happens to the process just before a step."""

    def change(made: Plan, step: Step) -> None:
        made.inside.insert(made.inside.index(step), Call("sabotage", act))

    return change


def without(name: str) -> Change:
    """Return the change that the sandbox has no namespace of that kind: what changes the host's is refused."""

    def change(made: Plan, step: Step) -> None:
        next(other for other in made.inside if type(other).__name__ == "StartProcess").names.remove(name)  # type: ignore[attr-defined]

    return change


def _overlapping_map(made: Plan, step: Step) -> None:
    made.before_go[0].idmap.uids.append(IdMapping(container_id=0, host_id=0, size=5))  # type: ignore[attr-defined]


def _impossible_flag(made: Plan, step: Step) -> None:
    namespaces.FLAGS["fs"] = 0x200  # CLONE_FS, which excludes CLONE_NEWNS
    step.names.append("fs")  # type: ignore[attr-defined]


class _Refuses(OutsideStep):
    def describe(self) -> str:
        return "attach nothing"

    def execute(self, pid: int) -> None:
        raise SbxError("network-failed", "attach nothing: it cannot be")


def _failing_network(made: Plan, step: Step) -> None:
    made.attach.append(_Refuses())


def few_descriptors() -> None:
    privileges.SetLimits({"nofile": (3, 3)}).execute(None)  # type: ignore[arg-type]


def _unmount(path: str) -> None:
    syscalls.umount(path)


#: step → what makes it fail, and a part of what is then said
CHANGES: dict[str, tuple[Change, str]] = {
    "WriteMaps": (_overlapping_map, "newuidmap: "),
    "BecomeRoot": (before(lambda: syscalls.capset(0, 0, 0)), "become root"),
    "StartProcess": (_impossible_flag, "start pid 1 in new namespaces"),
    "StopPropagation": (without("mnt"), "stop mounts from propagating to the host: Operation not permitted"),
    "Tree": (given(path="/no/such"), "open /no/such"),
    "Filesystem": (given(options={"no-such": "option"}), "create a proc"),
    "Devices": (given(names=["no-such"]), "open the devices no-such: No such file or directory"),
    "Overlay": (given(lowers=["no-such"]), "mount overlay of 1 layers"),
    "BindLower": (given(path="/no/such"), "bind /no/such on"),
    "PivotRoot": (before(lambda: os.chdir("/")), "pivot_root, and detach the host's tree"),
    "Attach": (given(target="/etc/passwd/x"), "on /etc/passwd/x: Not a directory"),
    "PopulateDev": (before(lambda: os.mkdir("/dev/null")), "populate /dev: File exists"),
    "WriteFiles": (given(files={"/proc/no/hosts": ""}), "/proc/no"),
    "MakeFolder": (given(path="/proc/no/such"), "/proc/no"),
    "HostName": (given(name="x" * 65), "set the host name to xxx"),
    "LoopbackUp": (
        before(lambda: syscalls.capset(0, 0, 0)),
        "bring up the loopback interface: Operation not permitted",
    ),
    "Sysctl": (given(name="no.such"), "set no.such to"),
    "Mask": (before(few_descriptors), "mask /proc/acpi"),
    "ReadOnly": (before(few_descriptors), "make read-only /proc/bus"),
    "ReadOnlyRoot": (before(lambda: os.chroot("/etc")), "make the root filesystem read-only: Invalid argument"),
    "OpenTerminal": (before(lambda: _unmount("/dev/pts")), "open a terminal and bind it on /dev/console"),
    "AwaitAttached": (_failing_network, "attach nothing: it cannot be"),
    "NewSession": (before(os.setsid), "start a session: Operation not permitted"),
    "RaiseOomScore": (given(score=5000), "set oom_score_adj to at least 5000: Invalid argument"),
    "SetLimits": (given(limits={"nofile": (1, 1 << 60)}), "set limit nofile to 1:1152921504606846976"),
    "ChangeFolder": (given(path="/no/such"), "change to folder /no/such: No such file or directory"),
    "BoundCapabilities": (before(lambda: syscalls.capset(0, 0, 0)), "bound capabilities to CAP_CHOWN"),
    "SwitchUser": (given(user="no-such"), "become user no-such: not in the image's /etc/passwd"),
    "LoadFilter": (given(program=b"\xff" * 8), "load the seccomp filter default, 1 instructions: Invalid argument"),
    "CloseDescriptors": (given(keep=[999]), "close inherited descriptors but 999: Bad file descriptor"),
    "Exec": (given(argv=[b"/no/such"]), "execute /no/such: No such file or directory"),
}


def main() -> None:
    name = sys.argv.pop(1)
    change, _ = CHANGES[name]
    whole = plan.for_sandbox

    def sabotaged(*arguments: object) -> Plan:
        made = whole(*arguments)  # type: ignore[arg-type]
        named = [step for step in (*made.inside, *made.before_go) if type(step).__name__ == name]
        change(made, named[0])  # type: ignore[arg-type]
        return made

    plan.for_sandbox = sabotaged  # type: ignore[assignment]
    assert options.read("run", sys.argv[2:])
    os._exit(entry.main())


if __name__ == "__main__":
    main()
