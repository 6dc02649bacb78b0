"""The option tables of the hot commands, and the reader that answers or declines. Either side; imports only leaves.

Each option is declared once, here. Typer's signatures are made from these tables (cli/hot.py), and `read` understands
the same command lines without Typer, which costs 60 ms to import. It answers exactly what Typer would, or None: for
help, mistakes and spellings that it leaves to Typer. It never prints and never guesses.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

FLAG, TEXT, LIST, NUMBER, SECONDS = "flag", "text", "list", "number", "seconds"
_EMPTY: dict[str, Any] = {FLAG: False, TEXT: "", NUMBER: None, SECONDS: None}


class Option:
    """One option: its attribute `name`, its `flags`, the `kind` of its value, and its line of help.

    FLAG is a bool; TEXT a str, "" when not given; LIST a list of str; NUMBER an int and SECONDS a float, or None.
    """

    __slots__ = ("flags", "group", "help", "kind", "metavar", "name")

    def __init__(self, flags: str, kind: str, help: str, metavar: str = "", group: str = "") -> None:
        self.flags = flags.split()
        self.name = flags[flags.index("--") + 2 :].partition(" ")[0].replace("-", "_")
        self.kind = kind
        self.help = help
        self.metavar = metavar
        self.group = group


_COMMON = [
    Option("-e --env", LIST, "set a variable; NAME alone passes the caller's value on", "NAME[=VALUE]"),
    Option("--env-file", LIST, "set the variables in a file of NAME[=VALUE] lines", "FILE"),
    Option("-u --user", TEXT, "run as this user and group of the image", "NAME|UID[:GROUP|GID]"),
    Option("-w --workdir", TEXT, "working directory inside", "PATH"),
    Option("-t --tty", FLAG, "give the command a terminal, also where stdin or stdout is none"),
    Option("-i --interactive", FLAG, "accepted for docker's sake: stdin is always passed on"),
    Option("--no-tty", FLAG, "give the command no terminal of its own"),
    Option("--pass-fd", LIST, "leave this descriptor open in the command", "N"),
    Option("--debug", FLAG, "print each step as it is done"),
]
_SHELL = [
    *_COMMON,
    Option("--name", TEXT, "name the sandbox", "NAME"),
    Option("-l --label", LIST, "note something about the sandbox, for inspect and ps --filter", "KEY[=VALUE]"),
    Option("--label-file", LIST, "note what is in a file of KEY[=VALUE] lines", "FILE"),
    Option("--cidfile", TEXT, "write the sandbox's id to a new file", "FILE"),
    Option("-q --quiet", FLAG, "print no notices of our own, only errors"),
    Option("--pull", TEXT, "when to ask the registry: missing (default), always, never, newer", "POLICY", "Image"),
    Option("--platform", TEXT, "choose among an image's platforms", "OS/ARCH[/VARIANT]", "Image"),
    Option("--rootfs", FLAG, "IMAGE is a folder with a root filesystem; it is not written to", "", "Image"),
    Option("--entrypoint", TEXT, "replace the image's entry point", "COMMAND", "Image"),
    Option("-v --volume", LIST, "bind a file or folder; options ro, rw, noexec", "SOURCE:TARGET[:OPTIONS]", "Files"),
    Option("--mount", LIST, "the same in words: type=bind|tmpfs,source=…,target=…,readonly", "WORDS", "Files"),
    Option("--tmpfs", LIST, "mount an empty tmpfs; options size=, mode=, exec", "TARGET[:OPTIONS]", "Files"),
    Option("--here", FLAG, "the current folder, writable, at the same path, as working directory", "", "Files"),
    Option("--home", FLAG, "with the image host: show the home folder (read-only)", "", "Files"),
    Option("--read-only", FLAG, "make the root filesystem read-only", "", "Files"),
    Option("--device", LIST, "add a device node of the host", "PATH[:TARGET]", "Files"),
    Option("--shm-size", TEXT, "size of /dev/shm (default 64m)", "SIZE", "Files"),
    Option("-h --hostname", TEXT, "host name (default: the sandbox's id)", "NAME", "Network"),
    Option("--net --network", TEXT, "auto, slirp4netns, pasta, none, host, sandbox:NAME, a network", "NAME", "Network"),
    Option("-p --publish", LIST, "publish a port or range, on 127.0.0.1 or IP", "[[IP:]HOST:]PORT[/udp]", "Network"),
    Option("--host-loopback", FLAG, "let it reach our 127.0.0.1, as host.containers.internal", "", "Network"),
    Option("--net-allow", LIST, "let it reach this alone: name, *.name, address, CIDR", "HOST[:PORT]", "Network"),
    Option("--net-log", TEXT, "record what it asks for and what is refused, one JSON object a line", "FILE", "Network"),
    Option("--net-learn", FLAG, "allow everything, and print the --net-allow list at the end", "", "Network"),
    Option("--add-host", LIST, "add a line to /etc/hosts", "NAME:ADDRESS", "Network"),
    Option("--dns", LIST, "ask this resolver", "ADDRESS", "Network"),
    Option("--dns-search", LIST, "search this domain", "DOMAIN", "Network"),
    Option("--idmap", TEXT, "auto, single (no subordinate ids), keep (your own id inside)", "MODE", "Namespaces"),
    Option("--share", LIST, "keep the host's namespace: pid, net, uts, ipc, cgroup", "NAME", "Namespaces"),
    Option("--join", TEXT, "share those of another: net, ipc, uts, or what --share names", "SANDBOX", "Namespaces"),
    Option("--unshare", LIST, "make one more namespace: time", "NAME", "Namespaces"),
    Option("--clock-offset", LIST, "shift a clock in the time namespace", "monotonic|boottime=SECONDS", "Namespaces"),
    Option("--sysctl", LIST, "set a kernel setting of the sandbox's own namespaces", "NAME=VALUE", "Namespaces"),
    Option("--nested", FLAG, "allow user namespaces and mounts inside, so that sandboxes work there", "", "Security"),
    Option("--cap-add", LIST, "give root inside a capability", "NAME", "Security"),
    Option("--cap-drop", LIST, "take a capability, or ALL", "NAME", "Security"),
    Option("--seccomp", TEXT, "use this filter profile, or unconfined", "FILE", "Security"),
    Option("--allow-new-privs", FLAG, "let set-user-id programs and file capabilities work", "", "Security"),
    Option("--setgroups", TEXT, "fake (default: answered, nothing done), allow, deny", "HOW", "Security"),
    Option("--unmask", LIST, "show a masked or write-protected path, or ALL", "PATH", "Security"),
    Option("--privileged", FLAG, "all of these at once: every capability, no filter, nothing masked", "", "Security"),
    Option("-m --memory", TEXT, "limit memory; beyond it the whole sandbox ends", "SIZE", "Limits"),
    Option("--memory-swap", TEXT, "limit memory and swap together; default: twice --memory", "SIZE", "Limits"),
    Option("--memory-high", TEXT, "slow the sandbox down above this much memory", "SIZE", "Limits"),
    Option("--cpus", TEXT, "limit the use of processors", "NUMBER", "Limits"),
    Option("--cpu-weight", NUMBER, "share of busy processors, 1 to 10000 (default 100)", "N", "Limits"),
    Option("--cpuset-cpus", TEXT, "use these processors only", "LIST", "Limits"),
    Option("--pids --pids-limit", NUMBER, "limit the number of processes and threads", "N", "Limits"),
    Option("--io-read-bps --device-read-bps", LIST, "limit bytes read in a second", "DEVICE:SIZE", "Limits"),
    Option("--io-write-bps --device-write-bps", LIST, "limit bytes written in a second", "DEVICE:SIZE", "Limits"),
    Option("--io-read-iops --device-read-iops", LIST, "limit reads in a second", "DEVICE:N", "Limits"),
    Option("--io-write-iops --device-write-iops", LIST, "limit writes in a second", "DEVICE:N", "Limits"),
    Option("--cgroup-conf", LIST, "set a file of the sandbox's cgroup", "FILE=VALUE", "Limits"),
    Option("--best-effort", FLAG, "where a limit cannot be enforced, warn and go on", "", "Limits"),
    Option("--cpu-time", SECONDS, "end it after so much processor time; the exit status is 152", "SECONDS", "Limits"),
    Option("--output-limit", TEXT, "end it after so much output; the exit status is 153", "SIZE", "Limits"),
    Option("--stats", FLAG, "print on stderr what the sandbox used and why it ended", "", "Limits"),
    Option("--stats-json", TEXT, "write what the sandbox used, and why it ended, as JSON", "FILE", "Limits"),
    Option("--receipt", TEXT, "write what is in force as JSON, read back from the kernel", "FILE|-", "Security"),
    Option("--require", LIST, "let it start only if these are in force, as in the receipt", "NAME[,NAME…]", "Security"),
    Option("--ulimit", LIST, "set a resource limit", "NAME=SOFT[:HARD]", "Limits"),
    Option("--umask", TEXT, "file mode creation mask (default 0022)", "OCTAL", "Limits"),
    Option("--oom-score-adj", NUMBER, "make the out-of-memory killer prefer the sandbox", "N", "Limits"),
    Option("--timeout", SECONDS, "end the command after so long; the exit status is 124", "SECONDS", "Limits"),
    Option("--stop-timeout", SECONDS, "seconds between stop signal and SIGKILL (default 10)", "SECONDS", "Limits"),
    Option("--stop-signal", TEXT, "what tells it to end (default: the image's, or SIGTERM)", "SIGNAL", "Limits"),
    Option("--no-init", FLAG, "make the command pid 1 itself", "", "Namespaces"),
    Option("--init", FLAG, "accepted for docker's sake: there is always an init", "", "Namespaces"),
    Option("--rm", FLAG, "accepted for docker's sake: what is written vanishes"),
    Option("--dry-run", FLAG, "print the plan and do nothing"),
]  # fmt: skip

TABLES: dict[str, list[Option]] = {"run": _SHELL, "shell": _SHELL, "exec": _COMMON}


class Request:
    """A command line that was understood: `subject` is the image or sandbox, `arguments` the command, both verbatim.

    Every option of the command's table is an attribute.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, command: str, subject: str, arguments: list[str], values: dict[str, Any]) -> None:
        self.command = command
        self.subject = subject
        self.arguments = arguments
        for option in TABLES[command]:
            self.__dict__[option.name] = [] if option.kind == LIST else _EMPTY[option.kind]
        self.__dict__.update((name, value) for name, value in values.items() if value is not None)


def read(command: str, argv: list[str]) -> Request | None:
    """Return what `argv`, the words after `command`, asks for, or None if Typer has to look at it.

    Options end at the first word that is none; what follows the subject is the command's, byte for byte.
    """
    options = {flag: option for option in TABLES[command] for flag in option.flags}
    values: dict[str, Any] = {}
    position = 0
    while position < len(argv):
        word = argv[position]
        if word == "--":
            position += 1
            break
        if len(word) < 2 or word[0] != "-":
            break
        position += 1
        if word[1] == "-":
            flag, equals, value = word.partition("=")
            option = options.get(flag)
            if option is None or (equals and option.kind == FLAG):
                return None
        else:
            # -it is -i -t; -uroot is -u root; only the last one of a bundle has a value
            *first, last = _unbundle(word, options)
            if any(options.get(flag) is None or options[flag].kind != FLAG for flag in first):
                return None
            values.update({options[flag].name: True for flag in first})
            flag, equals, value = last[:2], last[2:], last[2:]
            option = options.get(flag)
            if option is None:
                return None
        if option.kind == FLAG:
            values[option.name] = True
            continue
        if not equals:
            if position == len(argv):
                return None
            value = argv[position]
            position += 1
        if not _accept(option, value, values):
            return None
    rest = argv[position:]
    if not rest or (command == "exec" and len(rest) < 2) or (command == "shell" and len(rest) > 1):
        return None
    return Request(command, rest[0], rest[1:], values)


def _unbundle(word: str, options: dict[str, Option]) -> list[str]:
    """Return the options bundled in ``-abc``; the last one is followed by its value where it has one."""
    parts: list[str] = []
    for place in range(1, len(word)):
        flag = "-" + word[place]
        option = options.get(flag)
        if option is not None and option.kind != FLAG:
            return [*parts, flag + word[place + 1 :]]
        parts.append(flag)
    return parts


def _accept(option: Option, text: str, values: dict[str, Any]) -> bool:
    """Add the value `text`; tell whether it is one for `option`."""
    if option.kind == LIST:
        values.setdefault(option.name, []).append(text)
    elif option.kind == TEXT:
        values[option.name] = text
    else:
        # Plain digits only; Typer may understand more and says what is wrong with the rest.
        digits = text.removeprefix("-") if option.kind == NUMBER else text.replace(".", "", 1)
        if not (digits.isascii() and digits.isdigit()) or len(digits) > 12:
            return False
        values[option.name] = int(text) if option.kind == NUMBER else float(text)
    return True
