"""SandboxSpec → Plan: what is done, by whom, in which order, and why in that order. Outside; pure, nothing is done.

The one place that knows the order. Read `for_sandbox` from top to bottom: it is the launch.
"""

from __future__ import annotations

from rootless import mounts as m
from rootless import namespaces as n
from rootless import network, paths, state
from rootless import privileges as p
from rootless import processes as x
from rootless.idmap import WriteMaps
from rootless.steps import Call, Plan, Step
from rootless.terminal import NewSession, OpenTerminal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from rootless.joining import Peer
    from rootless.networks.member import Member
    from rootless.spec import IdMap, SandboxSpec

_SECURE = m.NOSUID | m.NODEV | m.NOEXEC


def for_sandbox(spec: SandboxSpec, peer: Peer | Member | None = None) -> Plan:
    """Return the plan of a new sandbox; `peer` is the one whose namespaces it joins."""
    plan = Plan()
    terminal = OpenTerminal() if spec.terminal else None

    # A user namespace comes first: only in one of its own may an ordinary user make the others. Its maps are written
    # from outside, and the caller's groups dropped in it, for the sandbox's own will deny setgroups(2) for good.
    # Namespaces of another sandbox's are its user namespace's, so with those that one is joined.
    plan.before_go = [] if peer else [WriteMaps(spec.idmap)]
    plan.inside = _joined(peer.outer, peer.fds, spec.idmap) if peer else _user_namespace(spec.idmap)

    # Pid 1 is made in all namespaces with one clone(2), so that the sandbox's user namespace owns the others.
    pid_1 = x.StartProcess(_own(spec), spec.idmap if spec.nested_users and not spec.joined else None, spec.deny_groups)
    pid_1.remove = [(spec.folder, state.aside(spec.id))]
    plan.inside += [pid_1, p.SetUmask(0)]
    plan.attach = network.steps(spec, peer)
    if spec.resources or spec.accounted:
        _limit(plan, spec)

    # The host's files are opened while they can still be named; the root is switched; then everything finds its place
    # by names that cannot lead out.
    sources = _Sources(spec)
    plan.inside += [*_clocks(spec), m.StopPropagation(), *sources.steps(), *_root(spec), m.PivotRoot()]
    plan.inside += [*sources.placed(), *_settings(spec), *_protected(spec)]
    plan.inside += [terminal] if terminal else []

    # From here on processes of the sandbox can see pid 1, and must learn nothing from it. The network helper still
    # could, through /proc/PID/ns, so it comes first.
    plan.inside += [x.AwaitAttached(), *network.inside(spec), *_oom_score(spec), x.HideMemory(b"sbx-init")]
    plan.inside += [x.StartCommand()] if spec.init else []
    plan.inside += _command(spec, terminal)
    return plan


def for_exec(spec: SandboxSpec, outer: int, joined: dict[str, int], cgroup: str = "") -> Plan:
    """Return the plan of one more command in a running sandbox.

    `outer` is a descriptor of the user namespace in which it was made, `joined` those of its own, by name; `cgroup` is
    its cgroup's folder, or "".
    """
    plan = Plan()
    if cgroup:
        from rootless import cgroups  # only a sandbox with limits has one

        plan.attach.append(cgroups.Join(cgroup))
    terminal = OpenTerminal(console=False) if spec.terminal else None
    # The outer user namespace is where the caller's groups can still be dropped. Memory is hidden after that (becoming
    # root makes it visible) and before the first namespace whose processes might look.
    plan.inside = [n.Join("user", outer), x.BecomeRoot(spec.idmap)] if outer >= 0 else []
    plan.inside += [*_oom_score(spec), x.HideMemory(b"sbx-exec"), n.Join("user", joined["user"])]
    plan.inside += [n.Join(name, fd) for name, fd in joined.items() if name != "user"]
    # The pid namespace is for children, so the command is one; this process stays to see it end.
    plan.inside += [x.StartProcess([]), x.AwaitAttached()]
    plan.inside += [terminal] if terminal else []
    plan.inside += _command(spec, terminal, entering=True)
    return plan


def for_call(idmap: IdMap, function: Callable[[], None], root: str | None, landlock: bool) -> Plan:
    """Return the plan of work of our own as root of a user namespace: unpacking a layer, deleting a tree."""
    plan = Plan()
    plan.before_go = [WriteMaps(idmap)]
    plan.inside = _user_namespace(idmap)
    if root is not None:
        plan.inside += [n.Unshare("mnt"), m.StopPropagation(), m.BindRoot(root), m.PivotRoot()]
        plan.inside += [p.Confine("/")] if landlock else []
    plan.inside.append(Call("do the work", function))
    return plan


def for_look_around(idmap: IdMap, command: p.Exec) -> Plan:
    """Return the plan of `sbx unshare`: a command on the host as it is, but as root of the mapped user namespace."""
    plan = Plan()
    plan.before_go = [WriteMaps(idmap)]
    plan.inside = [*_user_namespace(idmap), n.Unshare("mnt"), m.StopPropagation()]
    plan.inside += [p.OrdinarySignals(), command]
    return plan


# ── the parts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _user_namespace(idmap: IdMap) -> list[Step]:
    return [n.Unshare("user"), x.Ready(), x.BecomeRoot(idmap)]


def _oom_score(spec: SandboxSpec) -> list[Step]:
    """While /proc/self still belongs to us: hidden processes' files are the host's root's."""
    return [p.RaiseOomScore(spec.oom_score)] if spec.oom_score else []


def _landlock(spec: SandboxSpec, entering: bool) -> list[Step]:
    """What comes in by `exec` gets a domain of its own, with the same rules: the kernel lets nobody join one."""
    files, scoped = p.confinement(spec, entering)
    return [p.ConfineCommand(spec.pass_fds, scoped, spec.network.tcp_ports, files)] if files or scoped else []


def _limit(plan: Plan, spec: SandboxSpec) -> None:
    """Add the cgroup: before the go, so that pid 1 is born in it, and its cgroup namespace rooted there."""
    from rootless import cgroups  # only those who ask for limits pay for them

    if not any(isinstance(step, x.Ready) for step in plan.inside):
        plan.inside.insert(0, x.Ready())  # there is something to wait for, now
    enter = cgroups.Enter(spec.id, spec.resources, spec.best_effort)
    plan.before_go.append(enter)
    plan.attach.insert(0, cgroups.Leave(enter))


def _joined(outer: int, fds: dict[str, int], idmap: IdMap) -> list[Step]:
    # The outer user namespace is where the caller's groups can still be dropped.
    steps: list[Step] = [n.Join("user", outer), x.BecomeRoot(idmap)] if outer >= 0 else []
    steps += [x.HideWords()] if "pid" in fds else []  # the memory has to wait until the network is attached
    return steps + [n.Join(name, fd) for name, fd in fds.items()]


def _own(spec: SandboxSpec) -> list[str]:
    return (["user"] if spec.nested_users and not spec.joined else []) + [
        name for name in spec.namespaces if name != "time"
    ]


def _clocks(spec: SandboxSpec) -> list[Step]:
    """The time namespace: its clocks are set after it is made, and before anything is in it."""
    if "time" not in spec.namespaces:
        return []
    return [n.Unshare("time"), *(n.ClockOffset(*offset) for offset in spec.clock_offsets.items()), n.EnterTime()]


def _root(spec: SandboxSpec) -> list[Step]:
    attributes = m.NODEV | (m.NOSUID if spec.no_new_privileges else 0)
    if spec.rootfs.kind == "host":
        return [m.ReadOnlyTree("/", spec.folder, attributes)]
    if spec.rootfs.kind == "folder":
        return [m.BindLower(spec.rootfs.path, spec.folder), m.Overlay(spec.folder, ["lower"], spec.folder, attributes)]
    return [m.Overlay(paths.data() + "/layers", spec.rootfs.layers, spec.folder, attributes)]


class _Sources:
    """What is opened before the switch of root, each with the place that it goes to afterwards, in that order."""

    def __init__(self, spec: SandboxSpec) -> None:
        self._spec = spec
        self._devices = m.Devices(list(m.DEVICES))
        self._pairs: list[tuple[m.Source, str]] = []
        # A fresh procfs shows the sandbox's own processes alone. It and sysfs belong to namespaces of the sandbox's;
        # where the kernel won't have a fresh one (nested containers), the host's is bound.
        self._add(m.Filesystem("proc", _SECURE) if spec.fresh_proc else m.Tree("/proc", _SECURE), "/proc")
        self._add(
            m.Filesystem("sysfs", _SECURE | m.RDONLY) if spec.fresh_sys else m.Tree("/sys", _SECURE | m.RDONLY), "/sys"
        )
        self._add(m.Filesystem("tmpfs", m.NOSUID | m.NOEXEC, {"mode": "755", "size": "64k"}), "/dev")
        self._in_dev = len(self._pairs)
        self._add(
            m.Filesystem("devpts", m.NOSUID | m.NOEXEC, {"newinstance": "", "ptmxmode": "0666", "mode": "0620"}),
            "/dev/pts",
        )
        self._add(m.Filesystem("tmpfs", _SECURE, {"mode": "1777", "size": str(spec.shm_size)}), "/dev/shm")
        if "ipc" in spec.namespaces:
            self._add(m.Filesystem("mqueue", _SECURE), "/dev/mqueue")
        for device in spec.devices:
            self._add(m.Tree(device, m.NOSUID), device)
        for mount in spec.mounts:
            attributes = (m.RDONLY if mount.read_only else 0) | (m.NOEXEC if mount.noexec else 0) | m.NODEV
            attributes |= m.NOSUID if spec.no_new_privileges or mount.kind == "tmpfs" else 0
            if mount.kind == "tmpfs":
                self._add(m.Filesystem("tmpfs", attributes, mount.options), mount.target)
            else:
                self._add(m.Tree(mount.source, attributes), mount.target)

    def _add(self, source: m.Source, target: str) -> None:
        self._pairs.append((source, target))

    def steps(self) -> list[Step]:
        """Return the steps that open them."""
        return [self._devices, *(source for source, _ in self._pairs)]

    def placed(self) -> list[Step]:
        """Return the steps that put them where they belong; /dev is filled before anything goes into it."""
        # /proc, /sys and /dev must be what they say: a link there would put the masks somewhere else.
        attached: list[Step] = [
            m.Attach(source, target, strict=place < self._in_dev) for place, (source, target) in enumerate(self._pairs)
        ]
        return [*attached[: self._in_dev], m.PopulateDev(self._devices), *attached[self._in_dev :]]


def _settings(spec: SandboxSpec) -> list[Step]:
    """What is written into the sandbox's own namespaces, while /proc/sys can be written."""
    steps: list[Step] = [m.WriteFiles(spec.files)] if spec.files else []
    steps += [n.HostName(spec.hostname)] if spec.hostname and "uts" in spec.namespaces else []
    steps += [n.LoopbackUp()] if "net" in spec.namespaces else []
    steps += [n.Sysctl(name, value) for name, value in spec.sysctls.items()]
    steps += [m.MakeFolder(spec.workdir)] if spec.rootfs.kind != "host" and spec.workdir != "/" else []
    return steps


def _protected(spec: SandboxSpec) -> list[Step]:
    """What hides and write-protects parts of the tree, when all mounts are in place."""
    steps: list[Step] = []
    steps += [m.ReadOnly(spec.read_only)] if spec.read_only else []
    steps += [m.Mask(spec.masked)] if spec.masked else []
    steps += [m.ReadOnlyRoot()] if spec.rootfs.read_only and spec.rootfs.kind != "host" else []
    return steps


def _command(spec: SandboxSpec, terminal: OpenTerminal | None, entering: bool = False) -> list[Step]:
    """The process that becomes the command: it gives up what it has, from the most to the least, the filter last."""
    steps: list[Step] = [NewSession(terminal, spec.redirect_stderr)]
    steps += [p.NewKeyring()] if spec.keyring else []
    steps += [p.SetLimits(spec.limits)] if spec.limits else []
    steps += [p.SetUmask(spec.umask), p.ChangeFolder(spec.workdir)]
    filtered = [p.LoadFilter(spec.filter_name, spec.filter)] if spec.filter else []
    # Without no_new_privs a filter needs CAP_SYS_ADMIN, which the next steps take away.
    steps += [p.NoNewPrivileges()] if spec.no_new_privileges else filtered
    steps += [
        p.BoundCapabilities(spec.capabilities),
        p.SwitchUser(spec.user, spec.group, spec.env, terminal is not None),
    ]
    steps += [*_landlock(spec, entering), *network.hold_sockets(spec)]
    steps += [p.SetCapabilities(spec.capabilities), x.ArmDeathSignal()]
    steps += [p.OrdinarySignals(), p.CloseDescriptors(spec.pass_fds)]
    steps += filtered if spec.no_new_privileges else []
    steps += [x.AwaitInspected()] if spec.inspected else []
    return [*steps, p.Exec(spec.argv, spec.env, spec.otherwise, exposed=not p.confinement(spec, entering)[0])]
