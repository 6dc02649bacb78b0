"""Request + Image → SandboxSpec: flags over the image's config over defaults. Outside.

Here the caller's words get their meaning and the caller's mistakes their message. It looks at the host (does a source
exist? which folder is this?) and changes nothing.
"""

from __future__ import annotations

import _signal
import os

from rootless import capabilities, idmap, network, paths, privileges
from rootless.errors import SbxError, printable
from rootless.namespaces import DEFAULT, SHAREABLE
from rootless.network import names
from rootless.resources import parse_size
from rootless.spec import Image, Mount, Rootfs, SandboxSpec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from rootless.joining import Peer
    from rootless.networks.member import Member
    from rootless.options import Request
    from rootless.spec import IdMap

PATH = privileges.DEFAULT_PATH.decode()
HOST = "host"  #: the image that is the host's own root

#: Hidden and write-protected as the OCI runtimes' defaults have them, and what they forget.
MASKED = [
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
    "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/proc/config.gz", "/proc/kallsyms",
    "/proc/kpagecgroup", "/proc/kpagecount", "/proc/kpageflags", "/proc/vmallocinfo", "/sys/firmware",
    "/sys/fs/selinux", "/sys/kernel/debug", "/sys/kernel/tracing", "/sys/kernel/security", "/sys/kernel/vmcoreinfo",
    "/sys/class/dmi", "/sys/devices/virtual/dmi", "/sys/devices/virtual/powercap", "/sys/class/powercap",
]  # fmt: skip
READ_ONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]


def sandbox(
    request: Request, image: Image, ids: IdMap, name: str, identity: str, folder: str, peer: Peer | Member | None = None
) -> SandboxSpec:
    """Return the complete spec of the sandbox that `request` asks for."""
    _check(request)
    on_host = image.reference == HOST
    mounts = _mounts(request)
    workdir = request.workdir or image.working_dir or "/"
    if request.here:
        here = _current_folder()
        mounts.append(Mount(source=here, target=here))
        workdir = request.workdir or here
    elif on_host and not request.workdir:
        workdir = _visible_folder()
    if on_host:
        mounts = [*_private_folders(request, ids), *mounts]
    hostname = _host_name(request.hostname or name)
    user, _, group = (request.user or image.user or _default_user(ids)).partition(":")
    net, notice = network.wanted(request)
    notices = [notice] if notice else []
    if peer and "net" in peer.names:
        net.guarded = peer.spec.network.guarded
    if peer and "uts" in peer.names:
        hostname = peer.spec.hostname
    spec = SandboxSpec(
        name=name, id=identity, image=request.subject, folder=folder, idmap=ids, network=net,
        rootfs=_rootfs(image, request), mounts=sorted(mounts, key=lambda mount: mount.target.count("/")),
        namespaces=_namespaces(request, peer), clock_offsets=_clock_offsets(request),
        devices=[_device(device) for device in request.device],
        argv=_argv(request, image), otherwise=b"sh" if request.command == "shell" else b"",
        env=_environment(request, image, hostname),
        workdir=_inside(workdir, "working directory"),
        user=_check_user(user, "user"), group=_check_user(group, "group"), hostname=hostname,
        limits=_limits(request.ulimit), umask=_umask(request.umask), oom_score=request.oom_score_adj or 0,
        shm_size=parse_size(request.shm_size, "--shm-size") if request.shm_size else 64 << 20,
        pass_fds=[int(text) for text in request.pass_fd], init=not request.no_init,
        # One id mapped: setgroups(2) is denied already, and there is no outer root that a second one could protect.
        joined=peer.names if peer else [], notices=notices,
        stop_signal=_stop_signal(request, image, notices), labels=_labels(request),
        stop_timeout=10.0 if request.stop_timeout is None else request.stop_timeout,
        nested_users=peer.spec.nested_users if peer else ids.mode != "single",
    )  # fmt: skip
    _protect(spec, request)
    network.check(spec)
    files = _files(spec, request, on_host, peer)
    # What the user mounts there is what the user wants to see.
    theirs = [mount.target for mount in mounts if mount.kind == "bind"]
    spec.files = {path: text for path, text in files.items() if path not in theirs and "/etc" not in theirs}
    return spec


def command_in(request: Request, spec: SandboxSpec) -> SandboxSpec:
    """Return `spec`, that of a running sandbox, changed to what an `exec` request asks for."""
    spec.argv = [os.fsencode(word) for word in request.arguments]
    spec.env = {**spec.env, **_asked(request)}
    if request.user:
        user, _, group = request.user.partition(":")
        spec.user, spec.group = _check_user(user, "user"), _check_user(group, "group")
    spec.workdir = _inside(request.workdir or spec.workdir, "working directory")
    spec.pass_fds = [int(text) for text in request.pass_fd]
    return spec


# ── the root and the mounts ───────────────────────────────────────────────────────────────────────────────────────────


def _rootfs(image: Image, request: Request) -> Rootfs:
    if image.reference == HOST:
        return Rootfs(kind="host", path="/", read_only=True)
    if request.rootfs:
        return Rootfs(kind="folder", path=image.digest, read_only=request.read_only)
    return Rootfs(kind="layers", layers=image.layers, read_only=request.read_only)


def _mounts(request: Request) -> list[Mount]:
    mounts = [_volume(text) for text in request.volume]
    mounts += [_mount_words(text) for text in request.mount]
    return mounts + [_tmpfs(text) for text in request.tmpfs]


def _volume(text: str) -> Mount:
    """``SOURCE:TARGET[:OPTIONS]``; one word alone is a volume without a name elsewhere, never the host's folder."""
    source, _, rest = text.partition(":")
    target, _, options = rest.partition(":")
    if not source or not target or ":" in options:
        raise SbxError(
            "mount-invalid",
            f"read volume {printable(text)!r}: it is SOURCE:TARGET[:OPTIONS]",
            "paths with a colon need --mount type=bind,source=…,target=…; an empty folder is --tmpfs TARGET",
        )
    mount = Mount(source=_source(source, text), target=_target(target, text))
    for option in filter(None, options.split(",")):
        _set_option(mount, option, text)
    return mount


def _set_option(mount: Mount, option: str, text: str) -> None:
    if option in ("ro", "readonly", "rro"):
        mount.read_only = True
    elif option == "noexec":
        mount.noexec = True
    elif option not in ("rw", "exec", "rbind", "bind", "nosuid", "nodev", "z", "Z", "private", "rprivate"):
        known = "size=, mode=, exec, ro" if mount.kind == "tmpfs" else "ro, rw, noexec"
        raise SbxError("mount-invalid", f"read mount {printable(text)!r}: unknown option {printable(option)!r}",
                       f"options are {known}")  # fmt: skip


def _mount_words(text: str) -> Mount:
    """docker's ``type=bind,source=…,target=…,readonly``."""
    words = dict(word.partition("=")[::2] for word in text.split(","))
    kind = words.pop("type", "bind")
    target = next((words.pop(key) for key in ("target", "destination", "dst") if key in words), "")
    source = next((words.pop(key) for key in ("source", "src") if key in words), "")
    if kind == "tmpfs":
        options = [f"{key.removeprefix('tmpfs-')}={value}" if value else key for key, value in words.items()]
        return _tmpfs(f"{target}:{','.join(options)}")
    if kind != "bind" or not source or not target:
        raise SbxError(
            "mount-invalid",
            f"read mount {printable(text)!r}: it is type=bind|tmpfs,source=…,target=…[,readonly]",
            "a volume is a folder of yours: type=bind,source=./data,target=/data" if kind == "volume" else "",
        )
    mount = Mount(source=_source(source, text), target=_target(target, text))
    for key, value in words.items():
        if value in ("", "true", "1"):
            _set_option(mount, key, text)
        elif key != "bind-propagation" and value not in ("false", "0"):
            _set_option(mount, f"{key}={value}", text)
    return mount


def _tmpfs(text: str) -> Mount:
    """``TARGET[:size=…,mode=…,exec,ro]``; nosuid, nodev and noexec as docker's are, unless `exec` is said."""
    target, _, options = text.partition(":")
    mount = Mount(kind="tmpfs", target=_target(target, text), noexec=True, options={"mode": "1777"})
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        if equals and key == "size":
            mount.options["size"] = value if value.endswith("%") else str(parse_size(value, f"--tmpfs {text}"))
        elif equals and key in ("mode", "nr_inodes", "uid", "gid"):
            mount.options[key] = value
        elif option == "exec":
            mount.noexec = False
        else:
            _set_option(mount, option, text)
    return mount


def _source(path: str, text: str) -> str:
    """Return the absolute path of a mount's source, which exists."""
    absolute = os.path.abspath(path) if path[0] in "./" else ""
    if not absolute:
        raise SbxError("mount-invalid", f"read volume {printable(text)!r}: {printable(path)} is not a path",
                       f"write ./{printable(path)} for a file or folder here")  # fmt: skip
    try:
        os.stat(absolute)
    except OSError as error:
        raise SbxError(
            "mount-source-missing", f"mount {absolute}: {error.strerror}", "the source of a mount has to exist"
        ) from None
    return absolute


def _target(path: str, text: str) -> str:
    path = _inside(path, "mount target")
    if path == "/":
        raise SbxError(
            "mount-invalid", f"read mount {printable(text)!r}: the target cannot be the root", "see: --rootfs"
        )
    return path


def _inside(path: str, what: str) -> str:
    """Return `path`, absolute inside, without ``.`` and ``..``."""
    if not path.startswith("/") or "\0" in path:
        raise SbxError("path-invalid", f"read {what} {printable(path)!r}: it is no absolute path")
    return os.path.normpath(path).replace("//", "/")


def _current_folder() -> str:
    try:
        return os.getcwd()
    except OSError as error:
        raise SbxError(
            "folder-gone", f"find the current folder: {error.strerror}", "go to another one with cd"
        ) from None


def _hidden_on_host() -> list[str]:
    return [*_SHARED, *_homes(), *_ours()]


_SHARED = ("/tmp", "/run", "/var/tmp")


def _homes() -> list[str]:
    """The caller's home folders: what HOME says, and what /etc/passwd does."""
    return _folders(paths.home(), idmap.user_home(os.geteuid()))


def _ours() -> list[str]:
    """Where our own files are, sockets among them that other sandboxes' networks obey."""
    return _folders(paths.data(), paths.config())


def _folders(*found: str) -> list[str]:
    return [
        path
        for path in dict.fromkeys(map(os.path.realpath, filter(None, found)))
        if path != "/" and os.path.isdir(path)
    ]


def _is_below(path: str, folders: list[str]) -> bool:
    return any(path == folder or path.startswith(folder + "/") for folder in folders)


def _visible_folder() -> str:
    """Return the current folder if the image `host` shows it, else the root."""
    try:
        here = os.getcwd()
    except OSError:
        return "/"
    return "/" if _is_below(here, _hidden_on_host()) else here


def _private_folders(request: Request, ids: IdMap) -> list[Mount]:
    """The folders of the host's tree that the image `host` replaces by empty ones."""
    user, _, group = _default_user(ids).partition(":")
    owner = {"uid": user, "gid": group or "0"}
    folders = [Mount(kind="tmpfs", target=path, options={"mode": "1777"}) for path in ("/tmp", "/var/tmp")]
    folders.append(Mount(kind="tmpfs", target="/run", options={"mode": "755"}))
    covered: list[str] = []
    for path in [] if request.home else sorted(_homes()):
        if not _is_below(path, covered):
            covered.append(path)
    covered += [path for path in sorted(_ours()) if not _is_below(path, [*_SHARED, *covered])]
    folders += [Mount(kind="tmpfs", target=path, options={"mode": "700", **owner}) for path in covered]
    return folders


def _device(text: str) -> str:
    path = os.path.abspath(text.partition(":")[0])
    try:
        mode = os.stat(path).st_mode & 0o170000
    except OSError as error:
        raise SbxError("device-missing", f"add device {path}: {error.strerror}") from None
    if mode not in (0o020000, 0o060000) or not path.startswith("/dev/"):
        raise SbxError("device-invalid", f"add device {path}: it is not a device below /dev")
    return path


# ── the command and its surroundings ──────────────────────────────────────────────────────────────────────────────────


def _argv(request: Request, image: Image) -> list[bytes]:
    if request.command == "shell":
        return [b"bash", b"-l"]
    entrypoint = [request.entrypoint] if request.entrypoint else image.entrypoint
    words = [*entrypoint, *(request.arguments or ([] if request.entrypoint else image.cmd))]
    if not words:
        raise SbxError("command-missing", f"run {image.reference}: no command, and the image names none",
                       "write it after the image; for a shell: sbx shell IMAGE", 125)  # fmt: skip
    return [os.fsencode(word) for word in words]


def _environment(request: Request, image: Image, hostname: str) -> dict[bytes, bytes]:
    """Fixed values, the image's over them, the caller's words over those: nothing comes along unasked."""
    env = {
        "PATH": os.environ.get("PATH", PATH) if image.reference == HOST else PATH,
        "HOSTNAME": hostname,
        "container": "sbx",
    }
    env.update(entry.partition("=")[::2] for entry in image.env)
    return {**{os.fsencode(key): os.fsencode(value) for key, value in env.items()}, **_asked(request)}


def _asked(request: Request) -> dict[bytes, bytes]:
    """The variables of --env-file and --env, the later ones winning."""
    entries = [line for file in request.env_file for line in _lines(file, "environment")] + request.env
    env: dict[bytes, bytes] = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not name or "\0" in entry:
            raise SbxError("env-invalid", f"set variable {printable(entry)!r}: it has no name")
        if equals:
            env[os.fsencode(name)] = os.fsencode(value)
        elif name in os.environ:
            env[os.fsencode(name)] = os.fsencode(os.environ[name])
    return env


def _lines(file: str, what: str) -> list[str]:
    """The lines of docker's files of variables or labels: no quoting, ``#`` starts a comment line."""
    try:
        with open(file, encoding="utf-8", errors="surrogateescape") as stream:
            lines = stream.read().split("\n")
    except OSError as error:
        raise SbxError("env-file-unreadable", f"read {what} file {printable(file)}: {error.strerror}") from None
    return [line.strip("\r").lstrip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _labels(request: Request) -> dict[str, str]:
    """What --label-file and --label note, the later ones winning."""
    labels: dict[str, str] = {}
    for text in [line for file in request.label_file for line in _lines(file, "label")] + request.label:
        name, _, value = text.partition("=")
        if not name:
            raise SbxError("label-invalid", f"set label {printable(text)!r}: it has no name", "it is KEY[=VALUE]")
        labels[name] = value
    return labels


def _stop_signal(request: Request, image: Image, notices: list[str]) -> int:
    """The caller's, or else the image's; one that is none is the caller's mistake, but only told of an image."""
    if request.stop_signal or not image.stop_signal:
        return signal_number(request.stop_signal or "TERM")
    try:
        return signal_number(image.stop_signal)
    except SbxError:
        notices.append(f"the image's stop signal {image.stop_signal!r} is none, so it is SIGTERM")
        return signal_number("TERM")


def signal_number(text: str) -> int:
    """Return the signal that `text` names: TERM, SIGTERM, 15, RTMIN+3. Raises SbxError ``signal-unknown``."""
    name = text.upper().removeprefix("SIG")
    base, sign, distance = name.partition("-" if name.startswith("RTMAX-") else "+")
    number = int(name) if name.isdecimal() and len(name) < 3 else 0
    if base.isalnum():
        number = getattr(_signal, "SIG" + base, number)
    if sign and base in ("RTMIN", "RTMAX") and distance.isdecimal() and len(distance) < 3:
        number += -int(distance) if sign == "-" else int(distance)
        number = number if _signal.SIGRTMIN <= number <= _signal.SIGRTMAX else 0
    elif sign:
        number = 0
    if not 0 < number < _signal.NSIG:
        raise SbxError("signal-unknown", f"read signal {printable(text)!r}: no such signal", "names are as in: kill -l")
    return number


def _default_user(ids: IdMap) -> str:
    """Root, or the caller's own id where the map keeps it."""
    kept = next((m.container_id for m in ids.uids if m.host_id == os.geteuid()), 0)
    group = next((m.container_id for m in ids.gids if m.host_id == os.getegid()), 0)
    return f"{kept}:{group}" if kept else "0"


def _check_user(text: str, what: str) -> str:
    """A name, or a number that is an id: -1 and what wraps around to 0 are not (crun CVE-2026-30892)."""
    if (text.lstrip("+-").isdigit() and not (text.isdecimal() and text.isascii())) or (
        text.isdigit() and (len(text) > 10 or int(text) > idmap.LAST_ID)
    ):
        raise SbxError("user-invalid", f"read {what} {printable(text)!r}: an id is a number from 0 to {idmap.LAST_ID}")
    if any(char in text for char in ":\0\n/"):
        raise SbxError("user-invalid", f"read {what} {printable(text)!r}: it is NAME|UID[:GROUP|GID]")
    return text


def _host_name(text: str) -> str:
    """hostname(7), and the underscore that people use; the kernel takes 64 bytes."""
    if len(text) > 64 or text.startswith("-") or set(text) - _HOST_NAME:
        raise SbxError(
            "hostname-invalid", f"set host name {printable(text)!r}: it is at most 64 letters, digits, '-' and '.'"
        )
    return text


_HOST_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._")


def _files(spec: SandboxSpec, request: Request, on_host: bool, peer: Peer | Member | None) -> dict[str, str]:
    """/etc/hosts, /etc/hostname and /etc/resolv.conf, unless the host's own are to be seen."""
    if on_host and "net" not in (*spec.namespaces, *spec.joined):
        return {}
    if peer and "net" in peer.names:
        # The same network, so the same names and resolver, whatever comes to be asked there.
        return {name: content for name, content in peer.spec.files.items() if name != "/etc/hostname"}
    files = {
        "/etc/hosts": names.hosts(spec.network, spec.hostname, request.add_host),
        "/etc/resolv.conf": names.resolv_conf(spec.network, request.dns, request.dns_search, _host_resolv_conf()),
    }
    return files if on_host else {**files, "/etc/hostname": spec.hostname + "\n"}


def _host_resolv_conf() -> str:
    try:
        fd = os.open("/etc/resolv.conf", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(fd, 65536).decode("utf-8", "replace")
    except OSError:
        return ""
    finally:
        os.close(fd)


# ── namespaces, privileges, limits ────────────────────────────────────────────────────────────────────────────────────


def _namespaces(request: Request, peer: Peer | Member | None) -> list[str]:
    """Return those that the sandbox gets for itself."""
    share = [] if request.join else [name for words in request.share for name in words.split(",")]
    for name in share:
        if name not in SHAREABLE:
            raise SbxError(
                "namespace-unknown", f"share namespace {printable(name)!r}: there are {', '.join(SHAREABLE)}"
            )
    for name in request.unshare:
        if name not in ("time", *DEFAULT):
            raise SbxError(
                "namespace-unknown", f"unshare namespace {printable(name)!r}: time is the one that can be added"
            )
    shared = [*share, *(peer.names if peer else []), *(["net"] if request.net == "host" else [])]
    names = [name for name in DEFAULT if name not in shared]
    return [*names, "time"] if "time" in request.unshare or request.clock_offset else names


def _clock_offsets(request: Request) -> dict[str, int]:
    offsets = {}
    for text in request.clock_offset:
        clock, _, seconds = text.partition("=")
        if clock not in ("monotonic", "boottime") or not seconds.lstrip("+-").isdecimal() or len(seconds) > 11:
            raise SbxError(
                "clock-invalid", f"shift clock {printable(text)!r}: it is monotonic=SECONDS or boottime=SECONDS"
            )
        offsets[clock] = int(seconds)
    return offsets


def _throttles() -> list[str]:
    """The counters of processors that were too hot, which tell one sandbox what another computes."""
    folder = "/sys/devices/system/cpu/cpu{}/thermal_throttle"
    return [folder.format(number) for number in range(os.cpu_count() or 1)] if os.path.isdir(folder.format(0)) else []


def _protect(spec: SandboxSpec, request: Request) -> None:
    """Fill in the protections, less what the request widens."""
    nested = request.nested or request.privileged
    # A nested sandbox wants a fresh /proc, which the kernel refuses where parts of this one are hidden. But root inside
    # that is root outside could write to /proc/sys.
    bare = nested and os.geteuid() != 0
    spec.capabilities = capabilities.EVERY if request.privileged else capabilities.adjust(
        capabilities.DEFAULT, request.cap_add, request.cap_drop)  # fmt: skip
    spec.no_new_privileges = not (request.allow_new_privs or request.privileged)
    spec.landlock = spec.no_new_privileges and not nested
    if request.setgroups not in ("", "fake", "allow", "deny"):
        raise SbxError(
            "setgroups-invalid", f"read --setgroups {printable(request.setgroups)!r}: it is fake, allow or deny"
        )
    spec.deny_groups = request.setgroups != "allow"
    if warning := _root_notice(spec, request):
        spec.notices.append(warning)
    unmask = (
        [*MASKED, *_throttles(), *READ_ONLY]
        if "ALL" in request.unmask
        else [_inside(path, "--unmask") for path in request.unmask]
    )
    spec.masked = [] if bare else [path for path in [*MASKED, *_throttles()] if path not in unmask]
    spec.read_only = [] if bare else [path for path in READ_ONLY if path not in unmask]
    spec.sysctls = _sysctls(request, spec, nested)


def _root_notice(spec: SandboxSpec, request: Request) -> str:
    """What root has to know who lets root inside mount or write to /proc/sys: to the kernel it is the same root there.

    Many files of /proc/sys ask for no capability, only for user 0 of the host; what covers them can be unmounted.
    """
    mounts = spec.capabilities >> capabilities.NUMBERS["CAP_SYS_ADMIN"] & 1
    shown = "ALL" in request.unmask or any(path in ("/proc", "/proc/sys") for path in request.unmask)
    if not (mounts or shown) or not idmap.is_root_of_host():
        return ""
    return "you are root, and so is root in this sandbox: with these options it can take over the host"


def _sysctls(request: Request, spec: SandboxSpec, nested: bool) -> dict[str, str]:
    sysctls = {}
    if "net" in spec.namespaces:
        # ping without CAP_NET_RAW, for all groups that there are: the kernel wants both ends to be groups of the map
        first = min(m.container_id for m in spec.idmap.gids)
        last = max(m.container_id + m.size - 1 for m in spec.idmap.gids)
        sysctls["net.ipv4.ping_group_range"] = f"{first} {last}"
        sysctls.update(network.sysctls(spec.network))
    if not nested and not spec.joined:
        sysctls["user.max_user_namespaces"] = "0"
    for text in request.sysctl:
        name, equals, value = text.partition("=")
        if (
            not equals
            or ".." in name
            or "/" in name
            or not name.replace(".", "").replace("_", "").replace("-", "").isalnum()
        ):
            raise SbxError("sysctl-invalid", f"set sysctl {printable(text)!r}: it is NAME=VALUE")
        sysctls[name] = value
    return sysctls


def _limits(words: list[str]) -> dict[str, tuple[int, int]]:
    limits = {"core": (0, 0)}
    for text in words:
        name, _, values = text.partition("=")
        soft, _, hard = values.partition(":")
        numbers = [
            -1 if value in ("-1", "unlimited") else int(value) if value.isdecimal() else None
            for value in (soft, hard or soft)
        ]
        if name not in privileges.RLIMITS or None in numbers:
            raise SbxError("ulimit-invalid", f"set limit {printable(text)!r}: it is NAME=SOFT[:HARD]",
                           "names are " + ", ".join(privileges.RLIMITS))  # fmt: skip
        limits[name] = (numbers[0], numbers[1])  # type: ignore[assignment]
        lower, upper = (number % (1 << 64) for number in limits[name])  # as the kernel has it: -1 is the largest
        if lower > upper:
            raise SbxError("ulimit-invalid", f"set limit {printable(text)!r}: the soft limit is above the hard one")
    return limits


def _check(request: Request) -> None:
    if request.stats_json == "-":  # we let go of stdout when the command runs, so that its end is the pipe's end
        raise SbxError("option-invalid", "write what was used to stdout: that is the command's", "name a file")
    for name in ("timeout", "cpu_time"):
        seconds = getattr(request, name)
        if seconds is not None and not seconds > 0:  # not a number is none either
            flag = name.replace("_", "-")
            raise SbxError("seconds-invalid", f"read --{flag} {seconds:g}: it is a number of seconds, more than 0")


def _umask(text: str) -> int:
    if not text:
        return 0o022
    if len(text) > 4 or set(text) - set("01234567"):
        raise SbxError("umask-invalid", f"set umask {printable(text)!r}: it is octal, such as 0022")
    return int(text, 8)


def check_descriptors(request: Request) -> None:
    """Raise SbxError ``fd-invalid`` unless the descriptors that are to be passed on are open.

    To be called before anything of ours is opened: that would be taken for the caller's.
    """
    for text in request.pass_fd:
        _check_descriptor(text)


def _check_descriptor(text: str) -> None:
    if not (text.isdecimal() and text.isascii()) or len(text) > 9:
        raise SbxError("fd-invalid", f"pass descriptor {printable(text)!r}: it is a number")
    try:
        os.fstat(int(text))
    except OSError:
        raise SbxError(
            "fd-invalid", f"pass descriptor {text}: it is not open", f"open it in your shell, as in: {text}<file"
        ) from None
