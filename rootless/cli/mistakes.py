"""Usage errors in our own words, with what words of docker, podman and bubblewrap are here. Warm: after a mistake."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from rootless import cli
from rootless.errors import SbxError, printable

_MADE = "a sandbox is made and started by sbx run, and nothing stays of it when its command has ended"
#: command of another tool → what to do here
COMMANDS = {
    "attach": "run one more command in it: sbx exec -it NAME sh",
    "build": "run the steps in a sandbox, and make an image of the result: sbx help images",
    "builder": "there is nothing of builds to look after: sbx help images",
    "buildx": "run the steps in a sandbox, and make an image of the result: sbx help images",
    "commit": "sbx exec NAME tar -c -C / bin etc … | sbx import IMAGE -",
    "compose": "sandboxes can share a network: sbx help network",
    "container": "these commands stand alone: sbx ps, sbx exec, sbx stop …",
    "context": "there is no daemon to choose: sandboxes are this machine's",
    "cp": "hand a folder in, sbx run -v SOURCE:TARGET; or: sbx exec NAME tar -c -C FOLDER FILE | tar -x",
    "create": _MADE,
    "diff": "ls $(sbx inspect -f '{{.rootfs.folder}}' NAME)/upper",
    "events": "each sbx run tells its own sandbox's end by its exit status; those that run: sbx ps",
    "generate": "a systemd unit's ExecStart is the sbx run itself",
    "healthcheck": "ask from outside when you like: sbx exec NAME COMMAND",
    "info": "it is: sbx doctor",
    "list": "it is: sbx ps",
    "logs": "a command's output goes to the stdout and stderr of its own sbx run",
    "ls": "it is: sbx ps",
    "machine": "there is no virtual machine: sandboxes run on this kernel",
    "manifest": "it is: sbx inspect IMAGE",
    "mount": "look into a sandbox with sbx exec; an image's files: sbx export IMAGE",
    "plugin": "there are none; networks are: sbx help network",
    "pod": "sandboxes share namespaces with --join SANDBOX: sbx help network",
    "remove": f"{_MADE}; to end it: sbx stop NAME",
    "rename": "a name is given at the start: sbx run --name NAME",
    "restart": _MADE,
    "rm": f"{_MADE}; to end it: sbx stop NAME",
    "search": "registries list no names to programs; ask for one by name: sbx pull NAME",
    "secret": "hand a file in: sbx run -v FILE:/run/secrets/NAME:ro",
    "start": _MADE,
    "swarm": "sandboxes belong to one machine; they can share a network: sbx help network",
    "version": "it is: sbx --version",
    "volume": "a volume is a folder of yours: sbx run -v ./data:/data",
    "wait": "sbx run itself ends with its command, and with its exit status",
    "image build": "run the steps in a sandbox, and make an image of the result: sbx help images",
    "image list": "it is: sbx images",
    "image ls": "it is: sbx images",
    "image remove": "it is: sbx rmi",
    "image rm": "it is: sbx rmi",
    **{f"image {name}": f"it is: sbx {name}"
       for name in ("export", "history", "import", "inspect", "load", "pull", "push", "save", "tag")},
    "network connect": "a sandbox joins at its start: sbx run --net NAME",
    "network disconnect": "a sandbox joins at its start: sbx run --net NAME",
    "network list": "it is: sbx network ls",
    "network prune": "a network that nobody is in takes nothing; to remove it: sbx network rm NAME",
    "network remove": "it is: sbx network rm",
    "system events": "those that run: sbx ps",
    "system info": "it is: sbx doctor",
    "system prune": "it is: sbx image prune; of sandboxes that have ended nothing stays",
}  # fmt: skip

_DETACH = "a sandbox lives as long as its sbx run: sbx run … </dev/null >log 2>&1 &"
_HEALTH = "nothing runs beside the command; ask when you like: sbx exec NAME COMMAND"
_LOGS = "its output is that of sbx run: >log 2>&1"
_ADDRESS = "addresses are chosen; sandboxes of a network find each other by --name"
_PLACE = "it is written to this machine's disk and vanishes; --tmpfs TARGET:size=SIZE is a limit"
_SHARE = "--share NAME keeps a namespace of the host's, --join SANDBOX shares those of another: sbx help network"
_ALWAYS = "it is always so: leave it out"
#: option of another tool's run → what to do here
OPTIONS = {
    "-a": "stdin, stdout and stderr are always passed on",
    "--annotation": "it is: --label KEY=VALUE",
    "--attach": "stdin, stdout and stderr are always passed on",
    "--blkio-weight": "it is: --cgroup-conf io.weight=N",
    "-c": "it is: --cpu-weight N, and 100 is what docker's 1024 is",
    "--cpu-period": "it is: --cpus NUMBER",
    "--cpu-quota": "it is: --cpus NUMBER",
    "--cpu-shares": "it is: --cpu-weight N, and 100 is what docker's 1024 is",
    "--cpuset-mems": "it is: --cgroup-conf cpuset.mems=LIST",
    "-d": _DETACH,
    "--detach": _DETACH,
    "--detach-keys": "there is no detaching; another terminal: sbx exec NAME sh",
    "--device-cgroup-rule": "it is: --device PATH",
    "--disable-content-trust": _ALWAYS,
    "--dns-opt": "hand a file in: -v ./resolv.conf:/etc/resolv.conf:ro",
    "--dns-option": "hand a file in: -v ./resolv.conf:/etc/resolv.conf:ro",
    "--domainname": "it is: --hostname NAME.DOMAIN",
    "--env-host": "each is handed in by name: -e NAME",
    "--expose": "every port can be reached by who is in the same network; for others: -p 8080:80",
    "--gidmap": "--idmap auto, keep (your own id inside) or single: sbx help users",
    "--health-cmd": _HEALTH,
    "--health-interval": _HEALTH,
    "--health-retries": _HEALTH,
    "--health-timeout": _HEALTH,
    "--http-proxy": "hand it in: -e http_proxy",
    "--ip": _ADDRESS,
    "--ip6": _ADDRESS,
    "--log-driver": _LOGS,
    "--log-opt": _LOGS,
    "--mac-address": _ADDRESS,
    "--memory-reservation": "it is: --cgroup-conf memory.low=SIZE; or --memory-high, which slows it down",
    "--memory-swappiness": "it is: --memory-swap, with the same size as --memory for none",
    "--network-alias": "--name is its name in a network, too",
    "--no-healthcheck": _ALWAYS,
    "--oom-kill-disable": "--memory-high slows a sandbox down instead",
    "--pod": "--join SANDBOX shares its network, ipc and host name: sbx help network",
    "--replace": "sbx stop NAME first",
    "--runtime": "there is none to choose: leave it out",
    "--secret": "hand a file in: -v FILE:/run/secrets/NAME:ro",
    "--sig-proxy": "signals are always passed on",
    "--storage-opt": _PLACE,
    "--systemd": "--no-init makes the command pid 1",
    "--tz": "hand it in: -e TZ=Europe/Berlin",
    "--uidmap": "--idmap auto, keep (your own id inside) or single: sbx help users",
    "--volume-driver": "a volume is a folder of yours: -v ./data:/data",
    "-P": "name the ports: -p 8080:80",
    "--publish-all": "name the ports: -p 8080:80",
    "--cgroupns": _SHARE,
    "--ipc": _SHARE,
    "--pid": _SHARE,
    "--uts": _SHARE,
    "--link": "--net sandbox:NAME shares a network",
    "--userns": "--idmap auto, keep (your own id inside) or single: sbx help users",
    "--security-opt": "--seccomp FILE, --unmask PATH; no-new-privileges holds unless --allow-new-privs is given",
    "--group-add": "no supplementary groups are kept or given: sbx help users",
    "--gpus": "add its device nodes: --device /dev/dri/renderD128",
    "--restart": f"{_MADE}; a systemd unit can run it again",
    "--volumes-from": "name the folders: -v SOURCE:TARGET",
    "--bind": "it is: -v SOURCE:TARGET",
    "--chdir": "it is: -w PATH",
    "--clearenv": _ALWAYS,
    "--dev": _ALWAYS,
    "--proc": _ALWAYS,
    "--gid": "it is: -u UID:GID",
    "--uid": "it is: -u UID:GID",
    "--unshare-ipc": _ALWAYS,
    "--unshare-pid": _ALWAYS,
    "--unshare-user": _ALWAYS,
    "--unshare-uts": _ALWAYS,
    "--unsetenv": "the environment is the image's and what -e gives",
    "--dev-bind": "it is: --device /dev/NAME",
    "--die-with-parent": _ALWAYS,
    "--new-session": _ALWAYS,
    "--ro-bind": "it is: -v SOURCE:TARGET:ro",
    "--setenv": "it is: -e NAME=VALUE",
    "--share-net": "it is: --net host",
    "--unshare-all": _ALWAYS,
    "--unshare-net": "it is: --net none",
}
#: the same of other commands
OTHERS = {
    "-D": "each step is printed by: sbx run --debug",
    "--debug": "each step is printed by: sbx run --debug",
    "-H": "there is no daemon to choose: sandboxes are this machine's",
    "--host": "there is no daemon to choose: sandboxes are this machine's",
    "--log-level": "each step is printed by: sbx run --debug",
    "-v": "it is: sbx --version",
    "exec --privileged": "what it may do was decided when it was run: sbx run --privileged",
    "network create -d": "there is one kind: leave it out",
    "network create --driver": "there is one kind: leave it out",
    "pull --tls-verify": "name the registry insecure in a file: sbx help registries",
    "push --tls-verify": "name the registry insecure in a file: sbx help registries",
    "login --tls-verify": "name the registry insecure in a file: sbx help registries",
    "pull -a": "tags are asked for one by one",
    "pull --all-tags": "tags are asked for one by one",
    "system df -v": "of each image: sbx images",
    "system df --verbose": "of each image: sbx images",
    "login -p": "others see a command line: --password-stdin",
    "login --password": "others see a command line: --password-stdin",
    "ps -n": "all that run are shown: nothing stays of what ended",
    "ps --last": "all that run are shown: nothing stays of what ended",
    "ps -l": "the last line is the latest",
    "ps --latest": "the last line is the latest",
    "ps -s": "what they use is shown by: sbx stats --once",
    "ps --size": "what they use is shown by: sbx stats --once",
    "stats --format": "--json, and jq",
    "history --format": "--json, and jq",
    "inspect -s": "what it uses is shown by: sbx stats --once",
    "inspect --size": "what it uses is shown by: sbx stats --once",
}


def explain(error: Any, words: Sequence[str]) -> SbxError:
    """Return the usage error that Typer found in `words`, the command line, with the one hint that helps."""
    context = getattr(error, "ctx", None)
    path = context.command_path.split()[1:] if context else [printable(word) for word in words[:1]]
    see = f"see: {' '.join(['sbx', *path, '--help'])}"
    message = " ".join(printable(error.format_message()).split())
    if unknown := re.match(r"No such command (['\"])(.*)\1\.", message):
        name = " ".join([*path, unknown[2]])
        hint = _standing_alone(words) or COMMANDS.get(name)
        return _error(f"no such command: {name}", hint or _guess(message.rpartition(" mean ")[2], see))
    if hasattr(error, "possibilities"):
        option = printable(error.option_name)
        known = OPTIONS.get(option) if path[:1] in (["run"], ["shell"], ["exec"]) else None
        known = OTHERS.get(" ".join([*path, option])) or known
        return _error(f"no such option: {option}", known or _guess(", ".join(_alike(option, error.possibilities)), see))
    if re.search(" does not take a value$", message.removesuffix(".")):
        return _error(message[:1].lower() + message[1:].removesuffix("."), "it is on when it is given: leave out the =")
    return _error(message[:1].lower() + message[1:].removesuffix("."), see)


def _standing_alone(words: Sequence[str]) -> str:
    """Return what ``container COMMAND`` is here, if that is what `words` are."""
    if len(words) < 2 or words[0] != "container":
        return ""
    name = {"ls": "ps", "list": "ps"}.get(words[1], words[1])
    ours = any(name in commands.split() for commands in cli.GROUPS.values())
    return f"it is: sbx {name}" if ours else COMMANDS.get(name, "")


def _alike(option: str, known: Sequence[str] | None) -> list[str]:
    """Return the options that `option` may be a slip of; what Typer takes for alike is often not."""
    return sorted(difflib.get_close_matches(option, known or (), cutoff=0.75))


def _guess(names: str, see: str) -> str:
    """Return the hint that one of `names` may have been meant, if there are any."""
    names = names.replace("'", "").removesuffix("?")
    return f"did you mean {names}? {see}" if names and " such " not in names else see


def _error(message: str, hint: str) -> SbxError:
    return SbxError("usage", message, hint)
