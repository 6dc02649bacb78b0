"""Who is compared, and how each is told to do the same: `true` in a fresh sandbox, no network, on the same files.

All get new user, mount, pid, net, uts, ipc and (but bwrap) cgroup namespaces, a /proc, /dev, /sys; all but bwrap map
the caller and its subordinate ids, have no capability beyond sbx's default set and hide the same files of /proc.

    sbx        a fresh overlay over the folder or the image, an init, the default filter
    crun, runc the same mounts on the folder itself, the same filter, which they compile at each launch; no init
    crun-      crun without a filter: what is left when compiling it is taken away
    bwrap      the folder itself, one id, no filter, no hidden files: the least that a sandbox can be
    podman     as people use it: its own image store, overlay, its default profile
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench_measure import UNIQUE, Command

CHECKOUT = Path(__file__).resolve().parent.parent
IMAGE = "bench"
PODMAN_IMAGE = "localhost/sbx-bench"


class World:
    """A scratch folder with the root filesystem, bundles and stores; made and removed by the user who launches."""

    def __init__(self, scratch: Path, checkout: Path, environment: dict[str, str]) -> None:
        self.scratch = scratch
        self.checkout = checkout
        self.rootfs = scratch / "rootfs"
        self.tarball = scratch / "rootfs.tar"
        self.compressed = scratch / "rootfs.tar.gz"
        # podman keeps a process and its files there, which must not be mixed with those of the user's own
        self.runtime = scratch / "run"
        self.environment = environment | {"XDG_RUNTIME_DIR": str(self.runtime)}
        self.left_out: dict[str, str] = {}

    # ── what they run on ──────────────────────────────────────────────────────────────────────────────────────────

    def prepare(self) -> None:
        """Unpack the root filesystem."""
        self.rootfs.mkdir()
        self.runtime.mkdir(mode=0o700)
        if alpine := alpine_tarball():
            shutil.copy(alpine, self.compressed)
            subprocess.run(["gzip", "-dk", self.compressed], check=True)
        else:
            subprocess.run([sys.executable, self.checkout / "images" / "offline", self.tarball], check=True)
            subprocess.run(["gzip", "-k", self.tarball], check=True)
        subprocess.run(["tar", "-xf", self.tarball, "-C", self.rootfs, "--no-same-owner"], check=True)

    def sbx(self, checkout: Path) -> str:
        """Return the command of a copy of `checkout`, installed as `helpers/start` does it, with compiled modules."""
        copy = self.scratch / f"sbx{len(list(self.scratch.glob('sbx*')))}"
        for part in ("rootless", "helpers", "images"):
            shutil.copytree(checkout / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", copy / ".venv"], check=True)
        shutil.copy(copy / "helpers" / "sbx", copy / ".venv" / "bin" / "sbx")
        quicken = [copy / ".venv" / "bin" / "python3", "-ISE", copy / "helpers" / "quicken.py"]
        subprocess.run([*quicken, copy / ".venv", copy / "rootless"], check=True)
        self._share_packages(copy)
        subprocess.run([sys.executable, "-m", "compileall", "-q", copy / "rootless"], check=True)
        return str(copy / ".venv" / "bin" / "sbx")

    def _share_packages(self, copy: Path) -> None:
        """Let the environment find the packages of the interpreter that runs this (the filter's compiler)."""
        (target,) = (copy / ".venv" / "lib").glob("python3*/site-packages")
        packages = [path for path in sys.path if path.endswith("-packages")]
        (target / "bench.pth").write_text("".join(f"{path}\n" for path in packages))

    def try_out(self, name: str, *argv: str | Path) -> bool:
        """Run `argv` once; where it fails, `name` is left out, with the last line that it said."""
        done = subprocess.run(argv, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            self.left_out[name] = next((line for line in said if line.startswith("sbx:")), said[-1])[:160]
        return done.returncode == 0

    # ── the commands ──────────────────────────────────────────────────────────────────────────────────────────────

    def own(self, name: str, sbx: str, image: bool = True) -> Iterator[tuple[str, Command]]:
        """Yield sbx on the folder, and on the image where importing it works."""
        run = [sbx, "run", "--net", "none"]
        if self.try_out(name, *run, "--rootfs", self.rootfs, "true"):
            yield name, [*run, "--rootfs", str(self.rootfs), "true"]
        if image and self.try_out(f"{name} image", sbx, "import", IMAGE, self.tarball):
            yield f"{name} image", [*run, IMAGE, "true"]

    def peers(self, only: Sequence[str] = ()) -> Iterator[tuple[str, Command]]:
        """Yield each peer (of `only`, if any) that is installed and runs here."""
        for name, make in (
            ("bwrap", self._bwrap), ("crun", self._crun), ("crun-", self._crun_unfiltered),
            ("runc", self._runc), ("podman", self._podman),
        ):  # fmt: skip
            if only and name not in only:
                continue
            program = name.rstrip("-")
            if not shutil.which(program, path=self.environment["PATH"]):
                self.left_out[name] = "not installed"
                continue
            command = make()
            if self.try_out(name, *(word.replace(UNIQUE, f"try-{os.getpid()}") for word in command)):
                yield name, command

    def _bwrap(self) -> Command:
        words = ["bwrap", "--unshare-all", "--die-with-parent", "--bind", str(self.rootfs), "/", "--proc", "/proc"]
        return [*words, "--dev", "/dev", "/bin/true"]

    def _crun(self) -> Command:
        bundle = self._bundle("bundle", filtered=True)
        # without limits sbx makes no cgroup, so neither need crun
        return ["crun", "--cgroup-manager=disabled", "run", "--bundle", bundle, UNIQUE]

    def _crun_unfiltered(self) -> Command:
        bundle = self._bundle("bundle-unfiltered", filtered=False)
        return ["crun", "--cgroup-manager=disabled", "run", "--bundle", bundle, UNIQUE]

    def _runc(self) -> Command:
        bundle = self._bundle("bundle-runc", filtered=True)
        return ["runc", "run", "--bundle", bundle, UNIQUE]

    def _podman(self) -> Command:
        # its folders' names may not be longer than 50 characters
        words = ["podman", "--root", str(self.scratch / "podman"), "--runroot", str(self.runtime / "r")]
        words += ["--tmpdir", str(self.runtime / "t"), "--storage-driver", "overlay"]
        if self.try_out("podman", *words, "import", "-q", self.tarball, PODMAN_IMAGE):
            return [*words, "run", "--rm", "--network", "none", PODMAN_IMAGE, "true"]
        return ["false"]

    # ── bundles ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _bundle(self, name: str, filtered: bool) -> str:
        folder = self.scratch / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self._config(filtered)))
        return str(folder)

    def _config(self, filtered: bool) -> dict[str, Any]:
        sys.path.insert(0, str(self.checkout))
        from rootless import build, capabilities, idmap

        ids, _ = idmap.for_caller("auto")
        maps = [
            [{"containerID": m.container_id, "hostID": m.host_id, "size": m.size} for m in mappings]
            for mappings in (ids.uids, ids.gids)
        ]
        held = [f"CAP_{name}" for name in capabilities.names(capabilities.DEFAULT)]
        linux: dict[str, Any] = {
            "namespaces": [{"type": kind} for kind in ("user", "mount", "pid", "network", "uts", "ipc", "cgroup")],
            "uidMappings": maps[0],
            "gidMappings": maps[1],
            "maskedPaths": build.MASKED,
            "readonlyPaths": build.READ_ONLY,
        }
        if filtered:
            linux["seccomp"] = _filter(self.checkout / "helpers" / "seccomp.json", set(held))
        return {
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": 0, "gid": 0}, "args": ["true"], "cwd": "/", "env": [f"PATH={build.PATH}"],
                "capabilities": {kind: held for kind in ("bounding", "effective", "permitted")},
                "noNewPrivileges": True,
            },
            "root": {"path": str(self.rootfs), "readonly": False},
            "hostname": "bench",
            "mounts": [_mount(*row) for row in _MOUNTS],
            "linux": linux,
        }  # fmt: skip

    def remove(self) -> None:
        """Delete everything; what subordinate ids own needs the help of those who made it."""
        podman = self.scratch / "podman"
        if podman.exists():
            subprocess.run(["podman", "unshare", "rm", "-rf", podman], env=self.environment, capture_output=True)
        for sbx in self.scratch.glob("sbx*/.venv/bin/sbx"):
            subprocess.run(
                [sbx, "unshare", "rm", "-rf", *self.scratch.glob("home*")], env=self.environment, capture_output=True
            )
        for file in self.runtime.rglob("pause.pid"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(file.read_text()), signal.SIGKILL)
        shutil.rmtree(self.scratch, ignore_errors=True)


def alpine_tarball() -> Path | None:
    """Return a real Alpine's root filesystem, from SBX_TEST_ALPINE or the folder beside the checkout."""
    if path := os.environ.get("SBX_TEST_ALPINE"):
        return Path(path)
    found = sorted(CHECKOUT.parent.glob("shared/images/alpine-minirootfs-*.tar.gz"))
    return found[-1] if found else None


_MOUNTS = [
    ("/proc", "proc", "nosuid,nodev,noexec"),
    ("/sys", "sysfs", "nosuid,nodev,noexec,ro"),
    ("/dev", "tmpfs", "nosuid,noexec,mode=755,size=64k"),
    ("/dev/pts", "devpts", "nosuid,noexec,newinstance,ptmxmode=0666,mode=0620"),
    ("/dev/shm", "tmpfs", "nosuid,nodev,noexec,mode=1777,size=65536k"),
    ("/dev/mqueue", "mqueue", "nosuid,nodev,noexec"),
]


def _mount(target: str, kind: str, options: str) -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": kind, "options": options.split(",")}


def _filter(path: Path, held: set[str]) -> dict[str, Any]:
    """Return sbx's own profile as OCI runtimes take it, as near as it goes: there is no order among a call's rules."""
    profile = json.loads(path.read_text())
    rules = []
    decided: set[str] = set()
    for rule in profile["syscalls"]:
        includes, excludes = rule.get("includes", {}), rule.get("excludes", {})
        wanted = includes.get("caps", [])
        if "variant" in includes or set(wanted) - held or set(excludes.get("caps", [])) & held:
            continue
        # "arches" names calls of one machine only; libseccomp passes over those that it doesn't know
        names = [name for name in rule["names"] if name not in decided]
        if not names:
            continue
        decided.update(names)
        entry = {"names": names, "action": rule["action"]}
        entry |= {key: rule[key] for key in ("args", "errnoRet") if key in rule}
        rules.append(entry)
    return {"defaultAction": profile["defaultAction"], "defaultErrnoRet": profile["defaultErrnoRet"], "syscalls": rules}
