"""The commands `import`, `images`, `rmi`, `tag`, `history`, `inspect` of an image."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import subprocess
from pathlib import Path

import archives
import needs
import pytest
import zstandard
from archives import archive, folder, member
from conftest import Sbx

TREE = archive(folder(b"bin"), member(b"bin/sh", b"#!", mode=0o755))


@pytest.fixture
def tarball(tmp_path: Path) -> Path:
    path = tmp_path / "tree.tar"
    path.write_bytes(TREE)
    return path


@pytest.mark.parametrize(
    "compress", [bytes, gzip.compress, lzma.compress, zstandard.compress], ids=["plain", "gzip", "xz", "zstd"]
)
def test_import_a_file_and_from_stdin(fresh_sbx: Sbx, tmp_path: Path, compress: object) -> None:
    data = compress(TREE)  # type: ignore[operator]
    path = tmp_path / "tree"
    path.write_bytes(data)
    first = fresh_sbx.ok("import", "one", path)
    assert first.startswith("sha256:")
    fresh_sbx.ok("import", "two", "-", input=data)
    listed = json.loads(fresh_sbx.ok("images", "--json"))
    assert [image["reference"] for image in listed] == ["docker.io/library/one:latest", "docker.io/library/two:latest"]
    assert fresh_sbx.ok("images", "-q").splitlines()[0] == first


def test_repeatable(fresh_sbx: Sbx, tarball: Path) -> None:
    env = {"SOURCE_DATE_EPOCH": "1000000000"}
    assert fresh_sbx.ok("import", "a", tarball, env=env) == fresh_sbx.ok("import", "b", tarball, env=env)
    image = json.loads(fresh_sbx.ok("inspect", "a"))[0]
    assert image["created"] == "2001-09-09T01:46:40Z"
    assert image["names"] == ["docker.io/library/a:latest", "docker.io/library/b:latest"]


def test_changes(fresh_sbx: Sbx, tarball: Path) -> None:
    changes = [
        'CMD ["sh", "-l"]',
        "ENTRYPOINT echo hi",
        'ENV A=1 B="x y"',
        "env C some text",
        "WORKDIR /w",
        "WORKDIR x",
        "USER 1:2",
        "EXPOSE 80 53/udp",
        "LABEL a=b",
        "VOLUME /data",
        "STOPSIGNAL SIGINT",
    ]
    fresh_sbx.ok(
        "import", *[word for change in changes for word in ("--change", change)], "-m", "from the moon", "a", tarball
    )
    image = json.loads(fresh_sbx.ok("inspect", "a"))[0]
    assert image["config"] == {
        "Cmd": ["sh", "-l"],
        "Entrypoint": ["/bin/sh", "-c", "echo hi"],
        "Env": ["A=1", "B=x y", "C=some text"],
        "WorkingDir": "/w/x",
        "User": "1:2",
        "ExposedPorts": {"80/tcp": {}, "53/udp": {}},
        "Labels": {"a": "b"},
        "Volumes": {"/data": {}},
        "StopSignal": "SIGINT",
    }
    assert json.loads(fresh_sbx.ok("history", "--json", "a"))[0]["comment"] == "from the moon"


@pytest.mark.parametrize("change", ["FROM x", "CMD", "ENV", "ENV =x", "ENV 'x", "", "LABEL a=b c"])
def test_bad_changes(fresh_sbx: Sbx, tarball: Path, change: str) -> None:
    result = fresh_sbx("import", "-c", change, "a", tarball)
    assert result.status == 125
    assert result.stderr.startswith("sbx: bad change ")
    assert fresh_sbx.ok("images", "-q") == ""


def test_tables(fresh_sbx: Sbx, tarball: Path) -> None:
    fresh_sbx.ok("import", "a", tarball)
    fresh_sbx.ok("import", "localhost:5000/b:1", tarball)
    head, *rows = fresh_sbx.ok("images").splitlines()
    assert head.split() == ["IMAGE", "ID", "CREATED", "SIZE"]
    assert [row.split()[0] for row in rows] == ["a", "localhost:5000/b:1"]
    digest = json.loads(fresh_sbx.ok("images", "--json"))[0]["digest"]
    assert digest in fresh_sbx.ok("images", "--digests")
    assert "localhost" not in fresh_sbx.ok("images", "a")


def test_the_empty_store(fresh_sbx: Sbx) -> None:
    assert fresh_sbx.ok("images", "--json") == "[]"
    assert fresh_sbx.ok("images", "-q") == ""
    assert not (fresh_sbx.home / "blobs").exists(), "looking makes nothing"
    assert fresh_sbx("rmi", "a").status == 125
    assert fresh_sbx("rmi", "--ignore", "a").status == 0


def test_rmi_by_name_and_by_id(fresh_sbx: Sbx, tarball: Path) -> None:
    identity = fresh_sbx.ok("import", "a", tarball)
    fresh_sbx.ok("tag", "a", "b:1", "c")
    assert fresh_sbx.ok("rmi", "c") == "docker.io/library/c:latest"
    result = fresh_sbx("rmi", identity[7:19])
    assert (result.status, result.stdout) == (125, "")
    message, hint = result.stderr.splitlines()
    assert message == f"sbx: remove image {identity[7:19]}: it has 2 names: a, b:1"
    assert hint == "hint: give the names to remove, or --force for all of them"
    assert len(json.loads(fresh_sbx.ok("images", "--json"))) == 2
    fresh_sbx.ok("tag", "a", "d")
    # as docker, one after the other: when the names have gone that are given, the id has but one
    removed = fresh_sbx.ok("rmi", "a", "d", identity).splitlines()
    assert removed == [f"docker.io/library/{name}" for name in ("a:latest", "d:latest", "b:1")]
    assert os.listdir(fresh_sbx.home / "layers") == os.listdir(fresh_sbx.home / "blobs" / "sha256") == []


def test_an_image_is_removed_by_its_id_and_with_force_all_its_names(fresh_sbx: Sbx, tarball: Path) -> None:
    identity = fresh_sbx.ok("import", "a", tarball)
    assert fresh_sbx.ok("rmi", identity[7:15]) == "docker.io/library/a:latest"
    identity = fresh_sbx.ok("import", "a", tarball)
    fresh_sbx.ok("tag", "a", "b")
    assert len(fresh_sbx.ok("rmi", "-f", "nothing", identity[7:19]).splitlines()) == 2
    assert fresh_sbx.ok("images", "-q") == ""


def test_an_id_that_two_images_begin_with_is_none(fresh_sbx: Sbx, tarball: Path) -> None:
    env = {"SOURCE_DATE_EPOCH": "1000000000"}
    first = fresh_sbx.ok("import", "first", tarball, "-m", "number 0", env=env)
    config = (fresh_sbx.home / "blobs" / "sha256" / first[7:]).read_bytes()
    # The id is the digest of the config: among a few hundred there are two that begin alike.
    seen: dict[str, int] = {}
    for number in range(100_000):
        prefix = hashlib.sha256(config.replace(b"number 0", b"number %d" % number)).hexdigest()[:4]
        if prefix in seen:
            break
        seen[prefix] = number
    for name, same in (("one", seen[prefix]), ("two", number)):
        fresh_sbx.ok("import", name, tarball, "-m", f"number {same}", env=env)
    result = fresh_sbx("rmi", prefix)
    assert (result.status, result.stdout) == (125, "")
    assert result.stderr == f"sbx: find image {prefix}: 2 images begin with that\nhint: give more digits\n"


def test_rmi_of_one_that_is_not_there_removes_nothing(fresh_sbx: Sbx, tarball: Path) -> None:
    fresh_sbx.ok("import", "a", tarball)
    result = fresh_sbx("rmi", "a", "nothing")
    assert result.status == 125
    assert result.stderr == "sbx: find image nothing: not in the store\nhint: sbx images lists what is there\n"
    assert fresh_sbx.ok("images", "-q") != ""


@pytest.mark.parametrize("name", ["tree.tar", "./tree.tar"])
def test_import_with_dockers_order(fresh_sbx: Sbx, tarball: Path, name: str) -> None:
    result = fresh_sbx("import", name, "made", cwd=tarball.parent)
    assert result.status == 125
    assert result.stderr.endswith("\nhint: the image's name comes first: sbx import NAME SOURCE\n")


def test_tag_what_is_not_there(fresh_sbx: Sbx) -> None:
    assert "find image a: not in the store" in fresh_sbx("tag", "a", "b", check=125).stderr


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty", b"", "it is empty"),
        ("text", b"no archive at all\n" * 50, "this is not a tar archive"),
        ("dot dot", archives.HOSTILE["dot dot"][0], "'..' in its name leads out of the tree"),
        ("cut", gzip.compress(TREE)[:-9], "it is cut off"),
        ("control", archive(member(b"\x1b[31m/../x")), r"unpack \x1b[31m/../x: "),
    ],
)
def test_bad_archives_leave_nothing(
    fresh_sbx: Sbx, tarball: Path, tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    fresh_sbx.ok("import", "a", tarball)
    before = sorted(str(path) for path in fresh_sbx.home.rglob("*"))
    path = tmp_path / name
    path.write_bytes(data)
    result = fresh_sbx("import", "b", path)
    assert result.status == 125
    assert message in result.stderr
    assert result.stderr.startswith("sbx: ")
    assert "\x1b" not in result.stderr
    assert sorted(str(path) for path in fresh_sbx.home.rglob("*")) == before


def test_sources_that_cannot_be_read(fresh_sbx: Sbx, tmp_path: Path) -> None:
    assert "No such file or directory" in fresh_sbx("import", "a", tmp_path / "nothing", check=125).stderr
    result = fresh_sbx("import", "a", tmp_path, check=125)
    assert "it is a folder" in result.stderr
    assert f"hint: write dir:{tmp_path}" in result.stderr


def test_limits(fresh_sbx: Sbx, tarball: Path) -> None:
    result = fresh_sbx("import", "--max-entries", "1", "a", tarball)
    assert result.stderr == "sbx: read the archive: more than 1 entries\nhint: --max-entries raises the limit\n"
    assert "--max-size" in fresh_sbx("import", "--max-size", "1k", "a", tarball, check=125).stderr
    assert "bad size" in fresh_sbx("import", "--max-size", "much", "a", tarball, check=125).stderr
    fresh_sbx.ok("import", "--max-entries", "2", "--max-size", "1m", "a", tarball)


def test_what_was_left_out_is_told(fresh_sbx: Sbx, tmp_path: Path) -> None:
    path = tmp_path / "devices.tar"
    attribute = archives.pax((b"SCHILY.xattr.security.selinux", b"x"))
    path.write_bytes(
        archive(folder(b"dev"), member(b"dev/null", kind=archives.CHARACTER, major=1, minor=3), attribute, member(b"a"))
    )
    result = fresh_sbx("import", "a", path)
    assert result.status == 0
    assert "sbx: left out 1 device nodes, which need root: dev/null\n" in result.stderr
    assert "sbx: left out 1 extended attributes that cannot be kept\n" in result.stderr
    assert fresh_sbx("import", "-q", "b", path).stderr == ""


def test_bad_names(fresh_sbx: Sbx, tarball: Path) -> None:
    result = fresh_sbx("import", "Upper", tarball)
    assert result.status == 125
    assert "bad reference" in result.stderr
    assert "position 1" in result.stderr


@needs.program("skopeo")
def test_skopeo_reads_the_store(fresh_sbx: Sbx, tarball: Path, tmp_path: Path) -> None:
    fresh_sbx.ok("import", "-c", "ENV A=1", "a", tarball)
    source = f"oci:{fresh_sbx.home}:docker.io/library/a:latest"
    subprocess.run(["skopeo", "--insecure-policy", "copy", "-q", source, f"dir:{tmp_path}/copy"], check=True)
    manifest = (tmp_path / "copy" / "manifest.json").read_bytes()
    import hashlib

    assert json.loads(fresh_sbx.ok("images", "--json"))[0]["digest"] == f"sha256:{hashlib.sha256(manifest).hexdigest()}"


def test_the_offline_image_is_repeatable(offline_tarball: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.tar"
    subprocess.run([needs.CHECKOUT / "images" / "offline", again], check=True)
    assert again.read_bytes() == offline_tarball.read_bytes()


def test_the_offline_image_runs(sbx: Sbx, image: str) -> None:
    assert sbx.ok(
        "run", "--net", "none", image, "sh", "-c", ". /etc/os-release; echo $ID; stat -c %U:%a /home/guest /tmp"
    ) == ("offline\nguest:755\nroot:1777")


def test_habits_of_other_tools_get_a_hint(sbx: Sbx, tmp_path: Path) -> None:
    (tmp_path / "a.tar").touch()
    assert sbx("import", tmp_path / "a.tar", "name").stderr.endswith(
        "\nhint: the image's name comes first: sbx import NAME SOURCE\n"
    )
    assert sbx("pull", "docker://alpine").stderr.endswith("\nhint: write it without docker://\n")


def test_what_is_here_for_another_platform_is_not_what_was_asked_for(sbx: Sbx, image: str) -> None:
    line = ("run", "--net", "none", "--pull", "never", "--platform")
    result = sbx(*line, "linux/s390x", image, "true")
    assert result.status == 125
    assert result.stderr == "sbx: find image offline: it is not in the store\nhint: fetch it: sbx pull offline\n"
    assert sbx(*line, os.uname().machine, image, "true").status == 0


@needs.userns
def test_another_map_is_unpacked_when_it_is_needed(fresh_sbx: Sbx, offline_tarball: Path) -> None:
    fresh_sbx.ok("import", "one", offline_tarball)
    before = len(os.listdir(fresh_sbx.home / "layers"))
    assert fresh_sbx.ok("run", "--net", "none", "--idmap", "single", "one", "stat", "-c", "%U", "/etc/passwd") == "root"
    assert len(os.listdir(fresh_sbx.home / "layers")) == before + 1
