#!/usr/bin/env python3
"""Time pulls of whole images from a registry on loopback: sbx against podman, against skopeo with umoci, and the floor.

    python3 helpers/bench_pull.py [--rounds 5] [--folder DIR] [--sbx COMMAND] [--only minimal,many] [--codec gzip,zstd]

Two images: `minimal` is a minimal Debian in one layer, `many` the same with python3 and some layers of many small
files. Needs docker-registry, skopeo and mmdebstrap, and an ordinary user with subordinate ids; a contender that is
missing is left out. The images are kept in the folder, and used again. The floor is what nobody can do without: fetch
(curl), igzip, both hashes, and GNU tar writing the files; layers one after the other, each step a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

LAYERS = 6  #: of small files in the image `many`
SMALL = 128 << 10  #: bytes of the largest file that counts as small
MEDIA_TYPES = {
    "gzip": "application/vnd.oci.image.layer.v1.tar+gzip",
    "zstd": "application/vnd.oci.image.layer.v1.tar+zstd",
}
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"


# ── images ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def debian(folder: Path, packages: str) -> Path:
    """Return a tar of a minimal Debian, made by mmdebstrap unless it is there."""
    target = folder / f"debian{'-' + packages if packages else ''}.tar"
    if not target.exists():
        include = [f"--include={packages}"] if packages else []
        draft = target.with_suffix(".part.tar")
        subprocess.run(["mmdebstrap", "--quiet", "--variant=minbase", *include, "trixie", draft], check=True)
        draft.rename(target)
    return target


def small_files(folder: Path, place: int) -> Path:
    """Return a tar of this Python's installed packages, without their large files, below a folder of its own."""
    target = folder / f"files{place}.tar"
    if target.exists():
        return target
    source = Path(sysconfig.get_path("purelib"))
    prefix = f"opt/app{place}/lib/python3/site-packages"

    def keep(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        member.uid = member.gid = place
        member.uname = member.gname = ""
        return None if member.size > SMALL else member

    with tarfile.open(target, "w", format=tarfile.GNU_FORMAT) as archive:
        archive.add(source, prefix, filter=keep)
    return target


def layout(folder: Path, name: str, tars: list[Path], codec: str) -> Path:
    """Return an OCI image layout of the tars, made unless it is there."""
    target = folder / f"{name}-{codec}"
    if (target / "index.json").exists():
        return target
    blobs = target / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    layers, diff_ids = [], []
    for tar in tars:
        data = tar.read_bytes()
        diff_ids.append(digest(data))
        packed = gzip.compress(data, 6, mtime=0) if codec == "gzip" else zstd(tar)
        layers.append(put(blobs, packed, MEDIA_TYPES[codec]))
    config = {"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    config_entry = put(blobs, json.dumps(config).encode(), CONFIG)
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "layers": layers, "config": config_entry}
    entry = put(blobs, json.dumps(manifest).encode(), MANIFEST)
    entry["annotations"] = {"org.opencontainers.image.ref.name": "latest"}
    (target / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (target / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    return target


def zstd(tar: Path) -> bytes:
    return subprocess.run(["zstd", "-q", "-3", "-c", tar], check=True, stdout=subprocess.PIPE).stdout


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def put(blobs: Path, data: bytes, media_type: str) -> dict[str, Any]:
    (blobs / digest(data)[7:]).write_bytes(data)
    return {"mediaType": media_type, "digest": digest(data), "size": len(data)}


# ── the registry ──────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def registry(folder: Path) -> Iterator[str]:
    """Run docker-registry on loopback and give its host:port."""
    config = folder / "registry.yml"
    config.write_text(json.dumps({
        "version": 0.1, "log": {"level": "info", "accesslog": {"disabled": True}}, "http": {"addr": "127.0.0.1:0"},
        "storage": {"filesystem": {"rootdirectory": str(folder / "registry")}},
    }))  # fmt: skip
    process = subprocess.Popen(["docker-registry", "serve", config], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        assert process.stderr
        port = next(found[1] for line in process.stderr if (found := re.search(rb"listening on \S*?:(\d+)", line)))
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield f"127.0.0.1:{int(port)}"
    finally:
        process.terminate()
        process.wait()


# ── contenders ────────────────────────────────────────────────────────────────────────────────────────────────────────


def contenders(sbx: list[str], host: str, name: str, layers: list[dict[str, Any]]) -> dict[str, Callable[[Path], None]]:
    """Return what is timed: name → a function that gets the image into an empty folder."""
    source = f"docker://{host}/{name}"

    def with_sbx(folder: Path) -> None:
        run([*sbx, "pull", "--quiet", f"{host}/{name}"], SBX_HOME=str(folder))

    def with_podman(folder: Path) -> None:
        run(["podman", f"--root={folder}/root", f"--runroot={folder}/run", "--log-level=error", "pull", "--quiet",
             "--tls-verify=false", f"{host}/{name}"])  # fmt: skip

    def with_umoci(folder: Path) -> None:
        run(["skopeo", "--insecure-policy", "copy", "--quiet", "--src-tls-verify=false", source, f"oci:{folder}/oci:x"])
        run(["umoci", "unpack", "--rootless", "--image", f"{folder}/oci:x", f"{folder}/bundle"])

    def floor(folder: Path) -> None:
        (folder / "rootfs").mkdir()
        for layer in layers:
            url = f"http://{host}/v2/{name}/blobs/{layer['digest']}"
            unpack = "igzip -dc" if layer["mediaType"].endswith("gzip") else "zstd -dcq"
            script = (
                f"cd {folder} && rm -f 1 2 && mkfifo 1 2 && {{ sha256sum <1 & sha256sum <2 & }} && set -o pipefail &&"
                f" curl -sf {url} | tee 1 | {unpack} | tee 2 |"
                f" tar -x -C rootfs --no-same-owner --delay-directory-restore --exclude='dev/*' && wait"
            )
            run(["bash", "-c", script])

    able = {
        "sbx": (with_sbx, []),
        "podman": (with_podman, ["podman"]),
        "skopeo + umoci": (with_umoci, ["skopeo", "umoci"]),
        "floor": (floor, ["curl", "igzip" if "gzip" in layers[0]["mediaType"] else "zstd", "tar"]),
    }
    for label, (_, needed) in able.items():
        if missing := [program for program in needed if not shutil.which(program)]:
            print(f"  {label} is left out: no {', '.join(missing)}", file=sys.stderr)
    return {label: act for label, (act, needed) in able.items() if all(map(shutil.which, needed))}


class Time(NamedTuple):
    """Seconds by the clock, and of processor time."""

    clock: float
    cpu: float


class Failed(Exception):
    """A program that ended badly."""


def run(command: list[str], **environment: str) -> None:
    done = subprocess.run(command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode:
        raise Failed(f"{command[0]}: status {done.returncode}: {done.stderr.decode(errors='replace').strip()[-300:]}")


def remove(folder: Path) -> None:
    """Remove what a contender has written, with files of subordinate ids."""
    if subprocess.run(["rm", "-rf", folder], stderr=subprocess.DEVNULL).returncode:
        map_root = ["unshare", "--map-root-user", "--map-auto"] if not shutil.which("podman") else ["podman", "unshare"]
        subprocess.run([*map_root, "rm", "-rf", folder], stderr=subprocess.DEVNULL)


def cpu() -> float:
    """Return the seconds of processor time that all ended children have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(able: dict[str, Callable[[Path], None]], folder: Path, rounds: int) -> dict[str, list[Time]]:
    """Return the times of each contender's rounds; they take turns, so that a busy moment hits all."""
    times: dict[str, list[Time]] = {label: [] for label in able}
    places = []
    for _ in range(rounds):
        for label, act in list(able.items()):
            places.append(Path(tempfile.mkdtemp(prefix="pull-", dir=folder)))
            # what the one before has left to write is not this one's time
            os.sync()
            start, before = time.perf_counter(), cpu()
            try:
                act(places[-1])
            except Failed as error:
                if label == "sbx":
                    raise
                print(f"  {label} cannot: {error}", file=sys.stderr)  # not all of them know zstd
                del able[label], times[label]
                continue
            times[label].append(Time(time.perf_counter() - start, cpu() - before))
    for place in places:
        remove(place)
    # ext4 searches long for inodes that were not deleted in the last 5 s; removing between the rounds costs 3 s each
    os.sync()
    time.sleep(6)
    return times


def report(times: dict[str, list[Time]]) -> None:
    """Print medians; the processor time says more than the clock where others use the machine as well."""
    ours = [statistics.median(column) for column in zip(*times["sbx"], strict=True)]
    print(f"  {'':<16}{'median':>8}{'least':>8}{'most':>8}{'CPU':>8}   / sbx")
    for label, values in times.items():
        clock, used = (statistics.median(column) for column in zip(*values, strict=True))
        ratios = f"{clock / ours[0]:5.2f}, CPU {used / ours[1]:5.2f}"
        print(f"  {label:<16}{clock:8.2f}{min(values)[0]:8.2f}{max(values)[0]:8.2f}{used:8.2f}   {ratios}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "rootless-bench")
    parser.add_argument("--sbx", default=f"{sys.executable} -I -S -E {Path(__file__).parents[1]}/rootless/__main__.py")
    parser.add_argument("--only", default="minimal,many")
    parser.add_argument("--codec", default="gzip,zstd")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    with registry(folder) as host:
        for name in options.only.split(","):
            tars = [debian(folder, "")] if name == "minimal" else [
                debian(folder, "python3"), *(small_files(folder, place) for place in range(1, LAYERS + 1))
            ]  # fmt: skip
            for codec in options.codec.split(","):
                image = layout(folder, name, tars, codec)
                label = f"{name}-{codec}"
                run(["skopeo", "--insecure-policy", "copy", "--quiet", "--preserve-digests", "--dest-tls-verify=false",
                     f"oci:{image}:latest", f"docker://{host}/{label}"])  # fmt: skip
                entry = json.loads((image / "index.json").read_text())["manifests"][0]["digest"]
                layers = json.loads((image / "blobs" / "sha256" / entry[7:]).read_text())["layers"]
                print(f"{label}: {len(layers)} layers, {sum(layer['size'] for layer in layers) / 1e6:.0f} MB")
                report(measure(contenders(options.sbx.split(), host, label, layers), folder, options.rounds))
    print(f"largest resident set of one process: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10} MB")


if __name__ == "__main__":
    main()
