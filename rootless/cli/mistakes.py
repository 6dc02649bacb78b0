"""Usage errors in our own words, with what words of docker, podman and bubblewrap are here. Warm: after a mistake."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rootless.errors import SbxError, printable

_MADE = "a sandbox is made and started by sbx run, and nothing stays of it when its command has ended"
#: command of another tool → what to do here
COMMANDS = {
    "attach": "run one more command in it: sbx exec -it NAME sh",
    "build": "run the steps in a sandbox, and make an image of the result: sbx help images",
    "commit": "sbx exec NAME tar -c -C / bin etc … | sbx import IMAGE -",
    "compose": "sandboxes can share a network: sbx help network",
    "container": "these commands stand alone: sbx ps, sbx exec, sbx stop …",
    "cp": "hand a folder in, sbx run -v SOURCE:TARGET; or: sbx exec NAME tar -c -C FOLDER FILE | tar -x",
    "create": _MADE,
    "info": "it is: sbx doctor",
    "list": "it is: sbx ps",
    "logs": "a command's output goes to the stdout and stderr of its own sbx run",
    "ls": "it is: sbx ps",
    "restart": _MADE,
    "rm": f"{_MADE}; to end it: sbx stop NAME",
    "start": _MADE,
    "version": "it is: sbx --version",
    "volume": "a volume is a folder of yours: sbx run -v ./data:/data",
    "wait": "sbx run itself ends with its command, and with its exit status",
    "image list": "it is: sbx images",
    "image ls": "it is: sbx images",
    "image remove": "it is: sbx rmi",
    "image rm": "it is: sbx rmi",
    **{f"image {name}": f"it is: sbx {name}"
       for name in ("export", "history", "import", "inspect", "load", "pull", "push", "save", "tag")},
    "network list": "it is: sbx network ls",
    "network remove": "it is: sbx network rm",
    "system info": "it is: sbx doctor",
    "system prune": "it is: sbx image prune; of sandboxes that have ended nothing stays",
}  # fmt: skip

_DETACH = "a sandbox lives as long as its sbx run: put that into the background, </dev/null &"
_SHARE = "--share NAME keeps a namespace of the host's, --join SANDBOX shares those of another: sbx help network"
_ALWAYS = "it is always so: leave it out"
#: option of another tool's run → what to do here
OPTIONS = {
    "-d": _DETACH,
    "--detach": _DETACH,
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
        return _error(f"no such command: {name}", COMMANDS.get(name) or _guess(message.rpartition(" mean ")[2], see))
    if hasattr(error, "possibilities"):
        option = printable(error.option_name)
        known = OPTIONS.get(option) if path[:1] in (["run"], ["shell"], ["exec"]) else None
        known = OTHERS.get(" ".join([*path, option])) or known
        return _error(f"no such option: {option}", known or _guess(", ".join(sorted(error.possibilities or ())), see))
    return _error(message[:1].lower() + message[1:].removesuffix("."), see)


def _guess(names: str, see: str) -> str:
    """Return the hint that one of `names` may have been meant, if there are any."""
    names = names.replace("'", "").removesuffix("?")
    return f"did you mean {names}? {see}" if names and " such " not in names else see


def _error(message: str, hint: str) -> SbxError:
    return SbxError("usage", message, hint)
