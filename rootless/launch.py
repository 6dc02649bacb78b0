"""The straight line: request → image → spec → plan → sandbox → exit status. Outside."""

from __future__ import annotations

import _signal
import os
import time

from rootless import (
    build,
    errors,
    filters,
    idmap,
    network,
    parent,
    paths,
    plan,
    processes,
    reference,
    resources,
    spec,
    state,
    store,
    syscalls,
    terminal,
    trees,
)
from rootless.errors import SbxError
from rootless.options import Request

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from rootless.accounting import Meter
    from rootless.joining import Peer
    from rootless.networks.member import Member
    from rootless.observe import Observed
    from rootless.parent import Sandbox
    from rootless.relay import SavedMode
    from rootless.spec import IdMap, Image, SandboxSpec
    from rootless.state import Folder
    from rootless.steps import Plan


def run(request: Request) -> int:
    """Run a command, or a shell, in a new sandbox, and return its exit status. Raises SbxError when it never ran."""
    _prepare_process()
    build.check_descriptors(request)
    if not request.cidfile or request.dry_run:
        return _run(request)
    from rootless import idfile  # few ask for one

    return idfile.holding(request.cidfile, lambda: _run(request))


def _run(request: Request) -> int:
    peer = _peer(request)
    ids, notice = (peer.spec.idmap, "") if peer else idmap.for_caller(request.idmap or _usual_map(request))
    if not request.quiet:
        say(notice)
    image = find_image(request, ids)
    identity = state.new_id()
    name = state.check_name(request.name) if request.name else identity
    if request.dry_run:
        wanted = _spec(request, image, ids, name, identity, f"{state.sandboxes()}/{name}", peer)
        print("\n".join(plan.for_sandbox(wanted, peer).describe()))
        return 0
    folder = state.create(name)
    try:
        folder.use_layers(image.layers)
        if image.layers and not store.is_current(image, ids):
            # It was just pulled; or removed, or replaced, before its layers were marked as used
            before, image = image, find_image(request, ids)
            if image.layers != before.layers:
                folder.use_layers(image.layers)
        wanted = _spec(request, image, ids, name, identity, folder.path, peer)
        steps = plan.for_sandbox(wanted, peer)
    except BaseException:
        state.discard(folder)
        raise
    return _start(steps, wanted, folder, request)


def execute(request: Request) -> int:
    """Run one more command in a running sandbox and return its exit status. Raises SbxError when it never ran."""
    from rootless import joining

    _prepare_process()
    build.check_descriptors(request)
    record = state.find(request.subject)
    wanted = build.command_in(request, spec.unpack(record["spec"]))
    _choose_terminal(request, wanted)
    mode = _saved_mode(wanted)
    outer, joined = joining.open_namespaces(record, ["user", *wanted.namespaces, *wanted.joined])
    wanted.inspected = False  # that was for the first command
    cgroup = record.get("cgroup", "")
    if cgroup:
        from rootless import cgroups  # only a sandbox with limits has one

        if cgroups.is_frozen(cgroup):
            raise SbxError("sandbox-paused", f"run a command in {record['name']}: it is paused", "see: sbx unpause")
    steps = plan.for_exec(wanted, outer, joined, cgroup)
    for step in steps.inside:
        if isinstance(step, processes.StartProcess):
            step.mode = mode
    try:
        sandbox = parent.start(steps, wanted.terminal, request.debug)
    except SbxError as error:
        if error.code != "interrupted":
            os.close(state.open_process(record))  # if it has just ended, that is the reason
        raise
    for fd in (outer, *joined.values()):
        if fd >= 0:
            os.close(fd)
    return _serve(sandbox, wanted, mode)


def _prepare_process() -> None:
    """Make this process one that a sandbox can be started from, whatever the caller left it with."""
    os.umask(0o077)  # what we write is nobody else's business
    # A caller that ignores its children's end, or blocks signals, hands that on. We wait for ours, and hear all.
    _signal.signal(17, _signal.SIG_DFL)  # SIGCHLD
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
    # The lowest free numbers go to the next descriptors: without this a pipe of ours would be taken for stdin.
    while (fd := os.open("/dev/null", os.O_RDWR)) < 3:
        os.set_inheritable(fd, True)
    os.close(fd)
    # What the caller left open is for nobody but the command, and for that only where it was asked for.
    syscalls.close_on_exec_from(3)


# ── the parts of run ──────────────────────────────────────────────────────────────────────────────────────────────────


def _peer(request: Request) -> Peer | Member | None:
    """Return the sandbox, or the network, whose namespaces are joined."""
    if network.is_shared(request.net):
        from rootless.networks import member

        return member.Member(request.net)
    if request.join or request.net.startswith("sandbox:"):
        from rootless import joining  # few do

        return joining.peer(request)
    return None


def _usual_map(request: Request) -> str:
    """Who is who where nothing is said: on the host's own tree you are yourself."""
    return "keep" if request.subject == build.HOST else ""


def find_image(request: Request, ids: IdMap) -> Image:
    """Return the image that `request` names, unpacked for `ids`; pulled when it is missing and that is allowed."""
    if request.rootfs:
        return _folder_image(request.subject)
    if request.subject == build.HOST:
        return spec.Image(reference=build.HOST, cmd=[os.environ.get("SHELL", "/bin/sh")])
    named = reference.parse(request.subject)
    # A launch record is of this machine's platform.
    recorded = request.pull in ("", "missing", "never") and not request.platform
    image = (store.find(named, ids) or store.find_alias(request.subject, ids)) if recorded else None
    if image is None:
        paths.allow_packages()
        from rootless.oci import pull  # the slow way; what follows takes seconds

        # The words themselves: a name without a registry may be an alias.
        image = pull.obtain(request.subject, ids, request.pull or "missing", request.platform, request.quiet)
    return image


def _folder_image(path: str) -> Image:
    absolute = os.path.abspath(path)
    if not os.path.isdir(absolute):
        raise SbxError("rootfs-missing", f"open root filesystem {errors.printable(absolute)}: not a folder")
    return spec.Image(reference=absolute, digest=absolute, cmd=["/bin/sh"])


def _spec(
    request: Request, image: Image, ids: IdMap, name: str, identity: str, folder: str, peer: Peer | Member | None = None
) -> SandboxSpec:
    """Return the spec, completed by what depends on this host: network, filter, whether /proc can be fresh."""
    wanted = build.sandbox(request, image, ids, name, identity, folder, peer)
    wanted.filter_name, wanted.filter = _filter(request, wanted)
    wanted.fresh_proc, wanted.fresh_sys = _fresh(request, wanted)
    _choose_terminal(request, wanted)
    if any(getattr(request, option) for option in resources.OPTIONS):
        wanted.resources = resources.asked(request)
    wanted.best_effort = request.best_effort
    wanted.accounted = request.stats or bool(request.stats_json)
    wanted.inspected = bool(request.receipt or request.require)
    for notice in wanted.notices if not request.quiet else ():
        say(notice)
    return wanted


def _filter(request: Request, wanted: SandboxSpec) -> tuple[str, bytes]:
    profile = request.seccomp or (filters.UNCONFINED if request.privileged else "")
    variant = filters.variant(
        profile=os.path.abspath(profile) if profile and profile != filters.UNCONFINED else profile,
        nested=request.nested or request.privileged,
        setgroups="fake" if request.setgroups in ("", "fake") else "real",
        chown="fake" if wanted.idmap.mode == "single" else "real",
        caps=wanted.capabilities,
    )
    if filters.needs_none(variant):
        return "", b""
    program = filters.cached(variant)
    if program is None:
        paths.allow_packages()
        from rootless import seccomp  # libseccomp compiles it once for this kernel and version

        program = seccomp.build(variant)
    return profile or "default", program


def _fresh(request: Request, wanted: SandboxSpec) -> tuple[bool, bool]:
    """Whether the kernel will mount a fresh /proc and /sys: only where nothing of the visible ones is covered."""
    fresh_proc = "pid" in (*wanted.namespaces, *wanted.joined)
    fresh_sys = "net" in (*wanted.namespaces, *wanted.joined)
    with open("/proc/self/mountinfo", "rb", 0) as stream:
        points = {line.split(b" ", 5)[4] for line in stream.read().splitlines()}
    if fresh_sys and _is_covered(b"/sys/", points):
        fresh_sys = False
    if fresh_proc and _is_covered(b"/proc/", points):
        wanted.notices.append(
            "/proc of this host is partly covered, so the sandbox sees it as it is, with the host's processes"
        )
        fresh_proc = False
        # Its /proc/sys is write-protected then. What is set unasked can be done without: the filter refuses user
        # namespaces too.
        asked = {text.partition("=")[0] for text in request.sysctl}
        wanted.sysctls = {name: value for name, value in wanted.sysctls.items() if name in asked}
    return fresh_proc, fresh_sys


#: Folders that the kernel made to be mounted on: empty for good, so nothing is hidden there.
_MADE_FOR_MOUNTS = frozenset(
    b"/proc/sys/fs/binfmt_misc /proc/fs/nfsd /sys/fs/cgroup /sys/fs/bpf /sys/fs/pstore /sys/fs/fuse/connections"
    b" /sys/fs/selinux /sys/fs/smackfs /sys/fs/resctrl /sys/kernel/debug /sys/kernel/tracing /sys/kernel/security"
    b" /sys/kernel/config /sys/firmware/efi/efivars".split()
)


def _is_covered(tree: bytes, points: set[bytes]) -> bool:
    """Whether mounts at `points` lie over parts of `tree` that have content, as in a container."""
    return any(
        point.startswith(tree)
        and not any(point == place or point.startswith(place + b"/") for place in _MADE_FOR_MOUNTS)
        for point in points
    )


def _choose_terminal(request: Request, wanted: SandboxSpec) -> None:
    """Decide whether the command gets a terminal."""
    ours = os.isatty(0) and os.isatty(1)
    if ours and not request.tty and terminal.is_in_background(0):
        # `sbx run … &`: a job that took the terminal over would be stopped, and one that read from it would steal.
        ours = False
        processes.read_nothing()
    wanted.terminal = request.tty or (ours and not request.no_tty)
    wanted.redirect_stderr = os.isatty(2) or not ours
    if wanted.terminal and os.environ.get("TERM"):
        wanted.env.setdefault(b"TERM", os.fsencode(os.environ["TERM"]))


def _saved_mode(wanted: SandboxSpec) -> SavedMode | None:
    """Return the mode that our terminal has to be given back, if the command gets one and we have one."""
    if not (wanted.terminal and os.isatty(0)):
        return None
    from rootless import relay  # 0.3 ms that only they pay for

    return relay.SavedMode(0)


def _start(steps: Plan, wanted: SandboxSpec, folder: Folder, request: Request) -> int:
    mode = _saved_mode(wanted)
    for step in steps.inside:
        if isinstance(step, processes.StartProcess):
            step.mode, step.debris, step.lock = mode, state.debris(), folder.lock
            # What it wrote as root is ours, outside; the rest is for root of the same ids, below.
            by_parent = not (mode or wanted.resources or wanted.accounted)  # a cgroup is removed by Python
            step.parent_removes = by_parent and wanted.idmap.mode != "keep"

    known = _record(wanted)

    def started(sandbox: Sandbox) -> Callable[[], None]:
        cgroup = observed.follow(sandbox) if observed else ""
        found = {"pid": sandbox.pid, "start_time": state.start_time(sandbox.pid), "cgroup": cgroup}
        folder.write_record({**known, **found, "namespaces": dict(sandbox.namespaces)})
        return runs

    def runs() -> None:
        folder.publish_record()
        if request.cidfile:
            from rootless import idfile

            idfile.write(request.cidfile, wanted.id)

    try:
        observed = _observed(steps, wanted, request)
        if not observed:
            # The file would outlive a parent that lost its memory
            lends = not request.cidfile
            sandbox = parent.start(steps, wanted.terminal, request.debug, started, last=True, lends=lends)
            return _serve(sandbox, wanted, mode, request.timeout)
        with observed:
            sandbox = parent.start(steps, wanted.terminal, request.debug, started, observed.ours(), last=True)
        status = _serve(sandbox, wanted, mode, request.timeout, observed.meters)
        return observed.close(status, sandbox)
    finally:
        # Only if the supervisor was killed is there anything left; root of the same ids may delete it.
        if left := state.discard(folder):
            parent.call_inside(wanted.idmap, lambda: trees.remove(left))


def _observed(steps: Plan, wanted: SandboxSpec, request: Request) -> Observed | None:
    """Return what watches the limits and keeps the account of this launch; None for one that asked for neither."""
    asked = request.cpu_time is not None or request.output_limit
    if not (asked or wanted.resources or wanted.accounted or wanted.inspected):
        return None
    from rootless.observe import Observed  # 1 ms that only they pay for

    return Observed(steps, wanted, request)


def _serve(
    sandbox: Sandbox,
    wanted: SandboxSpec,
    mode: SavedMode | None,
    timeout: float | None = None,
    meters: Sequence[Meter] | None = None,
) -> int:
    if not wanted.terminal:
        # A pipe's other end sees what the command does to it: we don't hold it any longer.
        keep_stderr = os.dup(2)
        processes.release_stdio()
        os.dup2(keep_stderr, 2)
        os.close(keep_stderr)
    return sandbox.wait(timeout, wanted.stop_timeout, mode, meters, wanted.stop_signal)


def _record(wanted: SandboxSpec) -> dict[str, Any]:
    """Return what the sandbox's record says, as far as it is known before there are processes.

    The more of it, the better: from the moment that pid 1 has a copy of our memory, all that we touch is copied.
    """
    return {
        "name": wanted.name, "id": wanted.id, "image": wanted.image, "created": time.time(),
        "command": [os.fsdecode(word) for word in wanted.argv], "parent": os.getpid(),
        "parent_start_time": state.start_time(os.getpid()), "spec": spec.pack(wanted),
    }  # fmt: skip


def say(notice: str) -> None:
    """Tell the user something on stderr; nothing for an empty text."""
    if notice:
        os.write(2, f"sbx: {errors.printable(notice)}\n".encode("utf-8", "replace"))
