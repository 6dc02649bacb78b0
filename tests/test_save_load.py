"""Images to and from files: layouts, archives, docker's, folders, programs of the host; and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import archives
import needs
import pytest
from archives import archive, folder, member, pax, symlink
from conftest import Sbx

LOWER = archive(
    folder(b"etc"),
    member(b"etc/a", b"lower", uid=7),
    member(b"etc/gone", b"x"),
    folder(b"opaque"),
    member(b"opaque/old"),
)
UPPER = archive(
    member(b"etc/.wh.gone"),
    member(b"etc/b", b"upper"),
    archives.hardlink(b"etc/c", b"etc/b"),
    folder(b"opaque"),
    member(b"opaque/.wh..wh..opq"),
    member(b"opaque/new"),
    symlink(b"link", b"etc/a"),
)


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class Layout:
    """An OCI image layout in memory, to be written as a folder or an archive, right or wrong."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}'}
        self.entries: list[dict[str, Any]] = []

    def blob(self, data: bytes, media_type: str) -> dict[str, Any]:
        self.files[f"blobs/sha256/{digest(data)[7:]}"] = data
        return {"mediaType": media_type, "digest": digest(data), "size": len(data)}

    def image(self, name: str | None, *layers: bytes, change: Callable[[dict[str, Any]], None] | None = None) -> Layout:
        """Add an image of gzip layers; `change` may spoil its manifest."""
        parts = [
            self.blob(gzip.compress(layer, mtime=0), "application/vnd.oci.image.layer.v1.tar+gzip") for layer in layers
        ]
        config = {
            "os": "linux",
            "architecture": "amd64",
            "rootfs": {"type": "layers", "diff_ids": [digest(layer) for layer in layers]},
        }
        document = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": self.blob(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json"),
            "layers": parts,
        }
        if change:
            change(document)
        entry = self.blob(json.dumps(document).encode(), "application/vnd.oci.image.manifest.v1+json")
        self.entries.append(entry | ({"annotations": {"org.opencontainers.image.ref.name": name}} if name else {}))
        return self

    def index(self) -> bytes:
        return json.dumps({"schemaVersion": 2, "manifests": self.entries}).encode()

    def write(self, path: Path) -> Path:
        for name, data in {**self.files, "index.json": self.index()}.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
        return path

    def tar(self) -> bytes:
        return archive(
            *(member(name.encode(), data) for name, data in {**self.files, "index.json": self.index()}.items())
        )


@pytest.fixture
def layered(fresh_sbx: Sbx, tmp_path: Path) -> str:
    fresh_sbx.ok("load", "-i", f"oci:{Layout().image('layered:1', LOWER, UPPER).write(tmp_path / 'layout')}")
    return "layered:1"


def images(sbx: Sbx) -> dict[str, dict[str, Any]]:
    return {image["reference"]: image for image in json.loads(sbx.ok("images", "--json"))}


# ── there and back ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("through", ["file", "stdin"])
def test_an_oci_archive_keeps_digests(
    fresh_sbx: Sbx, layered: str, tmp_path: Path, compress: Callable[[bytes], bytes], through: str
) -> None:
    before = images(fresh_sbx)
    path = tmp_path / "saved"
    fresh_sbx.ok("save", "-o", path, layered)
    path.write_bytes(compress(path.read_bytes()))
    fresh_sbx.ok("rmi", layered)
    assert images(fresh_sbx) == {}
    if through == "file":
        assert fresh_sbx.ok("load", "-i", path) == "docker.io/library/layered:1"
    else:
        assert fresh_sbx.ok("load", input=path.read_bytes()) == "docker.io/library/layered:1"
    assert images(fresh_sbx) == before


def test_a_docker_archive_keeps_ids(fresh_sbx: Sbx, layered: str, tmp_path: Path) -> None:
    before = images(fresh_sbx)["docker.io/library/layered:1"]["id"]
    fresh_sbx.ok("tag", layered, "again")
    saved = tmp_path / "saved"
    fresh_sbx.ok("save", "--format", "docker-archive", "-o", saved, layered, "again")
    with tarfile.open(saved) as tar:
        listed = json.loads(tar.extractfile("manifest.json").read())  # type: ignore[union-attr]
    assert [entry["RepoTags"] for entry in listed] == [["layered:1", "again:latest"]]
    fresh_sbx.ok("rmi", layered, "again")
    assert fresh_sbx.ok("load", "-i", saved) == "docker.io/library/layered:1"
    assert {image["id"] for image in images(fresh_sbx).values()} == {before}
    assert set(images(fresh_sbx)) == {"docker.io/library/again:latest", "docker.io/library/layered:1"}


def test_a_folder_takes_several_images(fresh_sbx: Sbx, layered: str, tmp_path: Path) -> None:
    fresh_sbx.ok("import", "other", "-", input=LOWER)
    fresh_sbx.ok("save", "--format", "oci", "-o", f"{tmp_path}/out:one", layered)
    fresh_sbx.ok("save", "--format", "oci", "-o", f"{tmp_path}/out:two", "other")
    fresh_sbx.ok("save", "--format", "oci", "-o", f"{tmp_path}/out:two", "other")
    names = [
        entry["annotations"]["org.opencontainers.image.ref.name"]
        for entry in json.loads((tmp_path / "out" / "index.json").read_text())["manifests"]
    ]
    assert names == ["one", "two"]
    assert (
        fresh_sbx.ok("import", "copy", f"oci:{tmp_path}/out:one")
        == images(fresh_sbx)["docker.io/library/layered:1"]["id"]
    )
    assert "it has 2 images" in fresh_sbx("import", "copy", f"oci:{tmp_path}/out", check=125).stderr


@pytest.mark.parametrize(
    "tool", [pytest.param(name, marks=needs.program(name)) for name in ("skopeo", "umoci", "podman")]
)
def test_others_read_what_we_write(fresh_sbx: Sbx, layered: str, tmp_path: Path, tool: str) -> None:
    ours = images(fresh_sbx)["docker.io/library/layered:1"]
    fresh_sbx.ok("save", "--format", "oci", "-o", f"{tmp_path}/out:one", layered)
    fresh_sbx.ok("save", "-o", tmp_path / "saved", layered)
    if tool == "skopeo":
        for source in (f"oci:{tmp_path}/out:one", f"oci-archive:{tmp_path}/saved"):
            raw = subprocess.run(["skopeo", "inspect", "--raw", source], check=True, capture_output=True).stdout
            assert digest(raw) == ours["digest"]
    elif tool == "umoci":
        command = ["umoci", "unpack", "--rootless", "--image", f"{tmp_path}/out:one", f"{tmp_path}/bundle"]
        subprocess.run(command, check=True, capture_output=True)
        assert sorted(os.listdir(tmp_path / "bundle" / "rootfs" / "etc")) == ["a", "b", "c"]
    else:
        with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as root:  # podman wants short paths
            podman = ["podman", "--root", f"{root}/root", "--runroot", f"{root}/run", "--storage-driver", "vfs"]
            done = subprocess.run([*podman, "load", "-q", "-i", f"{tmp_path}/saved"], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"podman does not run here: {done.stderr.splitlines()[-1]}")
            command = [*podman, "images", "-q", "--no-trunc"]
            found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            subprocess.run([*podman, "rmi", "-a"], check=True, capture_output=True)
            subprocess.run(["podman", "unshare", "rm", "-rf", f"{root}/root"], check=True)
        assert found.strip() == ours["id"]


@needs.program("skopeo")
def test_we_read_what_others_write(fresh_sbx: Sbx, layered: str, tmp_path: Path) -> None:
    before = images(fresh_sbx)["docker.io/library/layered:1"]
    fresh_sbx.ok("save", "--format", "oci", "-o", f"{tmp_path}/out:one", layered)
    for target in (
        "oci-archive:{}/o:example.com/a:2",
        "docker-archive:{}/d:example.com/b:2",
        "oci:{}/l:example.com/c:2",
    ):
        place = target.format(tmp_path)
        subprocess.run(["skopeo", "--insecure-policy", "copy", "-q", f"oci:{tmp_path}/out:one", place], check=True)
    assert fresh_sbx.ok("load", "-i", tmp_path / "o") == "example.com/a:2"
    assert fresh_sbx.ok("load", "-i", tmp_path / "d") == "example.com/b:2"
    assert fresh_sbx.ok("load", "-i", f"oci:{tmp_path}/l") == "example.com/c:2"
    found = images(fresh_sbx)
    assert found["example.com/a:2"]["digest"] == found["example.com/c:2"]["digest"] == before["digest"]
    assert {found[f"example.com/{name}:2"]["id"] for name in "abc"} == {before["id"]}


def test_an_image_of_an_index_by_platform(fresh_sbx: Sbx, tmp_path: Path) -> None:
    layout = Layout().image(None, LOWER).image(None, UPPER)
    for entry, machine in zip(layout.entries, ("amd64", "riscv64"), strict=True):
        entry["platform"] = {"os": "linux", "architecture": machine}
    listed = layout.blob(layout.index(), "application/vnd.oci.image.index.v1+json")
    layout.entries = [listed | {"annotations": {"org.opencontainers.image.ref.name": "multi:1"}}]
    path = layout.write(tmp_path / "layout")
    fresh_sbx.ok("load", "--platform", "riscv64", "-i", f"oci:{path}")
    assert len(json.loads(fresh_sbx.ok("inspect", "multi:1"))[0]["layers"]) == 1
    assert fresh_sbx.ok("export", "multi:1", "-o", tmp_path / "out") == ""
    with tarfile.open(tmp_path / "out") as tar:
        assert "etc/b" in tar.getnames()
    result = fresh_sbx("load", "--platform", "s390x", "-i", f"oci:{path}")
    assert result.status == 125
    assert "for linux/s390x: there are only linux/amd64, linux/riscv64" in result.stderr


@needs.userns
def test_as_many_layers_as_there_may_be(fresh_sbx: Sbx, offline_tarball: Path, tmp_path: Path) -> None:
    """Their names fit the page of options that mount(2) takes; the same layer twice and empty ones are no trouble."""
    once = archive(member(b"once", b"x"), member(b"twice", b"first"))
    middle = [
        archive(member(b"n/%d" % number, b"%d" % number), member(b"last", b"%d" % number)) for number in range(122)
    ]
    layers = [offline_tarball.read_bytes(), once, archive(member(b"twice", b"second")), *middle, once, archive()]
    assert len(layers) == 127
    path = Layout().image("many:1", *layers).write(tmp_path / "layout")
    fresh_sbx.ok("load", "-i", f"oci:{path}")
    shown = fresh_sbx.ok("run", "--net", "none", "many:1", "sh", "-c", "ls /n | wc -l; cat /last /once /twice")
    assert shown.split("\n") == ["122", "121xfirst"]
    listed = fresh_sbx.ok("export", "many:1", "-o", tmp_path / "out")
    assert listed == ""
    with tarfile.open(tmp_path / "out") as tar:
        assert sum(name.startswith("n/") for name in tar.getnames()) == 122


@needs.userns
def test_an_opaque_root_hides_all_below(fresh_sbx: Sbx, offline_tarball: Path, tmp_path: Path) -> None:
    hidden = archive(member(b"hidden", b"x"))
    top = archive(member(b".wh..wh..opq"))[:-1024] + offline_tarball.read_bytes()
    fresh_sbx.ok("load", "-i", f"oci:{Layout().image('opaque:1', hidden, top).write(tmp_path / 'layout')}")
    assert fresh_sbx.ok("run", "--net", "none", "opaque:1", "sh", "-c", "test -e /hidden || echo gone") == "gone"


def test_an_image_without_layers(fresh_sbx: Sbx, tmp_path: Path) -> None:
    result = fresh_sbx("load", "-i", f"oci:{Layout().image('empty:1').write(tmp_path / 'layout')}")
    assert result.status == 125
    assert "the image has no layers" in result.stderr
    assert images(fresh_sbx) == {}


# ── export ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ["single", pytest.param("auto", marks=needs.subids)])
def test_export_merges_layers(fresh_sbx: Sbx, layered: str, tmp_path: Path, mode: str) -> None:
    data = tmp_path / "tar"
    fresh_sbx.ok("export", "--idmap", mode, "-o", data, layered)
    with tarfile.open(data) as tar:
        found = {info.name: info for info in tar}
        assert set(found) == {".", "etc", "etc/a", "etc/b", "etc/c", "link", "opaque", "opaque/new"}
        assert found["etc/a"].uid == 7, "the image's owner, whatever the disk says"
        assert (found["etc/c"].type, found["etc/c"].linkname) == (tarfile.LNKTYPE, "etc/b")
        assert tar.extractfile("etc/b").read() == b"upper"  # type: ignore[union-attr]
        assert found["link"].linkname == "etc/a"


def test_export_and_import_are_inverse(fresh_sbx: Sbx, layered: str) -> None:
    def exported(name: str) -> bytes:
        path = fresh_sbx.home.parent / "exported"
        fresh_sbx.ok("export", "-o", path, name)
        return path.read_bytes()

    first = exported(layered)
    fresh_sbx.ok("import", "flat", "-", input=first)
    assert exported("flat") == first


def test_odd_files_survive_the_trip(fresh_sbx: Sbx, tmp_path: Path) -> None:
    name = b"\xff" * 90 + b"/" + b"n" * 150
    data = archive(
        folder(b"\xff" * 90, uid=3_000),
        pax((b"path", name), (b"mtime", b"-1.5"), (b"SCHILY.xattr.user.a", b"\0\n=")),
        member(b"x", b"odd", mode=0o4750, gid=9),
        pax((b"linkpath", b"t" * 300)),
        symlink(b"link", b"x"),
        member(b"fifo", kind=archives.FIFO, mode=0o600),
    )
    fresh_sbx.ok("import", "odd", "-", input=data)
    fresh_sbx.ok("export", "-o", tmp_path / "tar", "odd")
    with tarfile.open(tmp_path / "tar", errors="surrogateescape") as tar:
        found = {os.fsencode(info.name): info for info in tar}
    odd = found[name]
    assert (odd.mode, odd.gid, odd.mtime, odd.pax_headers["SCHILY.xattr.user.a"]) == (0o4750, 9, -1.5, "\0\n=")
    assert found[b"\xff" * 90].uid == 3_000
    assert found[b"link"].linkname == "t" * 300
    assert found[b"fifo"].type == tarfile.FIFOTYPE


# ── folders and programs ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_as_root(fresh_sbx: Sbx, tmp_path: Path) -> None:
    top = tmp_path / "top"
    (top / "etc").mkdir(parents=True)
    (top / "etc" / "a").write_text("x")
    (top / "etc" / "a").chmod(0o604)
    os.link(top / "etc" / "a", top / "etc" / "b")
    (top / "out").symlink_to("/etc/passwd")
    fresh_sbx.ok("import", "f", f"dir:{top}")
    fresh_sbx.ok("export", "-o", tmp_path / "tar", "f")
    with tarfile.open(tmp_path / "tar") as tar:
        found = {info.name: (info.type, info.uid, info.mode, info.linkname) for info in tar}
    assert found["etc/a"] == (tarfile.REGTYPE, 0, 0o604, "")
    assert found["etc/b"][::3] == (tarfile.LNKTYPE, "etc/a")
    assert found["out"][::3] == (tarfile.SYMTYPE, "/etc/passwd")
    assert "there is no such folder" in fresh_sbx("import", "g", f"dir:{tmp_path}/nothing", check=125).stderr


def test_a_folder_that_cannot_be_read(fresh_sbx: Sbx) -> None:
    if os.geteuid() == 0:
        pytest.skip("the superuser reads everything")
    result = fresh_sbx("import", "g", "dir:/etc")
    assert result.status == 125
    assert "sbx: pack " in result.stderr
    assert "Permission denied" in result.stderr
    assert images(fresh_sbx) == {}


@needs.userns
def test_programs_with_their_libraries(fresh_sbx: Sbx) -> None:
    fresh_sbx.ok("import", "tools", "bin:/bin/sh,ls,/usr/bin/env")
    assert (
        fresh_sbx.ok("run", "--net", "none", "tools", "sh", "-c", "ls /etc/passwd && /usr/bin/env A=1 ls /bin/sh")
        == "/etc/passwd\n/bin/sh"
    )


def test_programs_that_are_none(fresh_sbx: Sbx, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("no program")
    script = tmp_path / "script"
    script.write_text("#!/nothing/here\n")
    for source, message in (
        (f"bin:{text}", "neither an ELF program nor a script"),
        ("bin:", "no program is named"),
        ("bin:no-such-program", "there is no such file"),
        (f"bin:{script}", "find the program /nothing/here"),
    ):
        assert message in fresh_sbx("import", "t", source, check=125).stderr


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────────────────────


def spoil(name: str) -> tuple[Layout, str]:
    """Return a layout with one fault, and what the error must say."""
    layout = Layout()

    def change(**fields: Any) -> Callable[[dict[str, Any]], None]:
        return lambda document: document["layers"][0].update(fields)

    match name:
        case "layer digest":
            layout.image("a", LOWER, change=change(digest="sha256:" + "0" * 64))
            layout.files["blobs/sha256/" + "0" * 64] = gzip.compress(LOWER, mtime=0)
            return layout, "its digest is sha256:"
        case "layer size":
            return layout.image("a", LOWER, change=change(size=7)), "it is longer than the 7 bytes announced"
        case "diff-id":
            layout.image("a", LOWER)
            layout.files = {
                name: data.replace(digest(LOWER).encode(), b"sha256:" + b"0" * 64)
                for name, data in layout.files.items()
            }
            return layout, "digest"
        case "path for a digest":
            return layout.image(
                "a", LOWER, change=change(digest="sha256:../../../../etc/passwd")
            ), "is not a lower-case hex digit"
        case "foreign layer":
            layout.image(
                "a", LOWER, change=change(mediaType="application/vnd.docker.image.rootfs.foreign.diff.tar.gzip")
            )
            return layout, "foreign layer"
        case "unknown layer":
            return layout.image("a", LOWER, change=change(mediaType="text/plain")), "a layer of type"
        case "manifest and index":
            return layout.image(
                "a", LOWER, change=lambda document: document.update(manifests=[])
            ), "an index and a manifest at once"
        case "another spelling":
            return layout.image("a", LOWER, change=lambda document: document.update(Layers=[])), "is spelt"
        case "negative size":
            return layout.image("a", LOWER, change=change(size=-1)), "size is not a size"
        case "too many layers":
            return layout.image(
                "a", LOWER, change=lambda document: document.update(layers=document["layers"] * 128)
            ), "127 is the limit"
        case "missing blob":
            layout.image("a", LOWER)
            del layout.files[next(file for file in layout.files if file.startswith("blobs/"))]
            return layout, "No such file or directory"
    raise AssertionError(name)


FAULTS = [
    "layer digest",
    "layer size",
    "diff-id",
    "path for a digest",
    "foreign layer",
    "unknown layer",
    "manifest and index",
    "another spelling",
    "negative size",
    "too many layers",
    "missing blob",
]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fresh_sbx: Sbx, tmp_path: Path, fault: str) -> None:
    layout, message = spoil(fault)
    result = fresh_sbx("load", "-i", f"oci:{layout.write(tmp_path / 'layout')}")
    assert result.status == 125
    assert message in result.stderr
    assert images(fresh_sbx) == {}
    for place in ("layers", "tmp", "refs"):
        assert os.listdir(fresh_sbx.home / place) == [], place


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[" * 60_000, "nested too deeply"),
        (b'{"schemaVersion":2,"schemaVersion":2,"manifests":[]}', "a key stands twice"),
        (b'{"schemaVersion":2,"manifests":[],"x":%s}' % (b"9" * 100), "too many digits"),
        (b" " * (5 << 20), "larger than"),
        (b'{"schemaVersion":2,"manifests":{}}', "not a list"),
        (b"\xff", "UTF-8"),
        (b'{"schemaVersion":1,"manifests":[]}', "schema 1"),
    ],
)
def test_bad_indexes(fresh_sbx: Sbx, tmp_path: Path, data: bytes, message: str) -> None:
    path = Layout().write(tmp_path / "layout")
    (path / "index.json").write_bytes(data)
    result = fresh_sbx("load", "-i", f"oci:{path}")
    assert result.status == 125
    assert message in result.stderr


def test_links_and_pipes_in_a_layout(fresh_sbx: Sbx, tmp_path: Path) -> None:
    path = Layout().image("a", LOWER).write(tmp_path / "layout")
    (path / "index.json").unlink()
    os.mkfifo(path / "index.json")
    assert "it is not a file" in fresh_sbx("load", "-i", f"oci:{path}", check=125, timeout=20).stderr
    (path / "index.json").unlink()
    (path / "index.json").symlink_to("/etc/passwd")
    assert "symbolic links" in fresh_sbx("load", "-i", f"oci:{path}", check=125).stderr


def test_docker_archives_of_old(fresh_sbx: Sbx) -> None:
    """Layers that images share were links to one another's files."""
    config = json.dumps(
        {
            "os": "linux",
            "architecture": "amd64",
            "rootfs": {"type": "layers", "diff_ids": [digest(LOWER), digest(LOWER)]},
        }
    ).encode()
    listed = [
        {"Config": f"{digest(config)[7:]}.json", "RepoTags": ["old:1"], "Layers": ["one/layer.tar", "two/layer.tar"]}
    ]
    data = archive(
        member(f"{digest(config)[7:]}.json".encode(), config),
        folder(b"one"),
        member(b"one/layer.tar", LOWER),
        folder(b"two"),
        symlink(b"two/layer.tar", b"../one/layer.tar"),
        member(b"manifest.json", json.dumps(listed).encode()),
    )
    assert fresh_sbx.ok("load", input=data) == "docker.io/library/old:1"
    assert images(fresh_sbx)["docker.io/library/old:1"]["id"] == digest(config)


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ({}, "it is not a list"),
        ([{"Config": 3}], "not as docker writes it"),
        ([{"Config": "../../etc/passwd", "RepoTags": ["a:1"], "Layers": []}], "is not in it"),
        ([{"Config": "/etc/passwd", "RepoTags": ["a:1"], "Layers": []}], "is not in it"),
    ],
)
def test_bad_docker_archives(fresh_sbx: Sbx, listed: object, message: str) -> None:
    result = fresh_sbx("load", input=archive(member(b"manifest.json", json.dumps(listed).encode())))
    assert result.status == 125
    assert message in result.stderr


def test_archives_that_hold_no_images(fresh_sbx: Sbx) -> None:
    result = fresh_sbx("load", input=LOWER)
    assert (result.status, result.stderr) == (
        125,
        "sbx: read -: it holds no images\nhint: sbx import makes an image of a root filesystem\n",
    )


def test_an_image_without_a_name(fresh_sbx: Sbx, tmp_path: Path) -> None:
    path = Layout().image(None, LOWER).write(tmp_path / "layout")
    assert "it brings no name" in fresh_sbx("load", "-i", f"oci:{path}", check=125).stderr
    fresh_sbx.ok("import", "named", f"oci:{path}")
    assert list(images(fresh_sbx)) == ["docker.io/library/named:latest"]


def test_a_file_appears_whole_or_not_at_all(fresh_sbx: Sbx, layered: str, tmp_path: Path) -> None:
    blobs = fresh_sbx.home / "blobs" / "sha256"
    largest = max(blobs.iterdir(), key=lambda blob: blob.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    result = fresh_sbx("save", "-o", tmp_path / "out.tar", layered)
    assert result.status == 125
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == []


# ── the store as a whole ──────────────────────────────────────────────────────────────────────────────────────────────


def test_check_and_repair(fresh_sbx: Sbx, layered: str) -> None:
    assert fresh_sbx.ok("system", "check") == "the store is whole"
    layer = json.loads(fresh_sbx.ok("inspect", layered))[0]["layers"][0]["digest"][7:]
    blob = fresh_sbx.home / "blobs" / "sha256" / layer
    blob.write_bytes(b"x" * blob.stat().st_size)
    key = next((fresh_sbx.home / "layers").iterdir())
    (key / "meta").write_bytes(b"")
    (fresh_sbx.home / "index.json").write_text("{}")
    found = fresh_sbx("system", "check", check=1).stdout
    assert "its bytes have changed" in found
    assert f"layer {key.name}: what is known of it is lost" in found
    assert "index.json" in found
    assert "changed" not in fresh_sbx("system", "check", "--quick", check=1).stdout
    fresh_sbx.ok("system", "check", "--repair")
    found = fresh_sbx("system", "check", check=1).stdout
    assert found == f"image docker.io/library/layered:1: layer sha256:{layer} is missing\n"
    fresh_sbx.ok("system", "check", "--repair")
    assert fresh_sbx.ok("system", "check") == "the store is whole"


def test_usage_by_map(fresh_sbx: Sbx, layered: str) -> None:
    before = json.loads(fresh_sbx.ok("system", "df", "--json"))
    fresh_sbx.ok("export", "--idmap", "single", "-o", fresh_sbx.home.parent / "x", layered)
    after = {entry["kind"]: entry for entry in json.loads(fresh_sbx.ok("system", "df", "--json"))}
    assert after["layers for single"]["count"] == 2
    assert after["blobs"] == before[0]
    assert all(entry["reclaimable"] == 0 for entry in after.values())


def test_prune(fresh_sbx: Sbx, layered: str) -> None:
    (fresh_sbx.home / "partial" / ("0" * 64)).write_bytes(b"x" * 100)
    assert fresh_sbx("image", "prune", check=0).stdout == ""
    assert os.listdir(fresh_sbx.home / "partial") == []
    assert list(images(fresh_sbx)) == ["docker.io/library/layered:1"]
    assert fresh_sbx.ok("image", "prune", "--all") == "docker.io/library/layered:1"
    assert os.listdir(fresh_sbx.home / "layers") == os.listdir(fresh_sbx.home / "blobs" / "sha256") == []


def test_commands_on_an_empty_store(fresh_sbx: Sbx) -> None:
    assert fresh_sbx.ok("system", "check") == "the store is whole"
    assert fresh_sbx.ok("image", "prune") == ""
    assert json.loads(fresh_sbx.ok("system", "df", "--json"))[0]["count"] == 0
    for command in ("save", "export", "history"):
        assert fresh_sbx(command, "nothing", check=125).stderr.startswith("sbx: find image nothing")


def test_tarfile_reads_our_headers() -> None:
    """Names at the edges of ustar's fields."""
    from rootless.oci import pack

    for length in (1, 99, 100, 101, 154, 155, 156, 200, 255, 256, 300):
        for name in (b"n" * length, b"d" * (length // 2) + b"/" + b"n" * (length - length // 2)):
            parts: list[bytes | memoryview] = []
            writer = pack.Writer(parts.append)
            writer.add_bytes(pack.Entry(name, uid=8**7, gid=8**7 - 1, mtime=1_500_000_000_000_000_001), b"data")
            writer.close()
            with tarfile.open(fileobj=io.BytesIO(b"".join(parts))) as tar:
                [info] = tar
                assert (info.name, info.uid, info.gid, info.size) == (name.decode(), 8**7, 8**7 - 1, 4)
