"""The store: launch records, references, pins and the collector, locks, debris, and what kill -9 leaves."""

from __future__ import annotations

import errno
import io
import json
import marshal
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import archives
import needs
import pytest
from archives import archive, folder, member

from rootless import idmap, state, store
from rootless.errors import SbxError
from rootless.oci import collect, images, layers, layout, manifest
from rootless.oci.layers import LayerInfo
from rootless.oci.layout import Workspace
from rootless.oci.tar import Limits
from rootless.reference import parse
from rootless.spec import IdMap, Image

TREE = archive(folder(b"bin"), member(b"bin/sh", b"#!"), member(b"etc/passwd", b"root:x:0:0\n"))
OTHER = archive(member(b"other", b"x" * 100))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SBX_HOME", str(tmp_path / "store"))
    yield tmp_path / "store"
    layout.remove_tree(str(tmp_path / "store"))


@pytest.fixture
def ids() -> IdMap:
    return idmap.for_caller("single")[0]


def source(data: bytes) -> layers.Open:
    def open_at(offset: int) -> Callable[[int], bytes]:
        stream = io.BytesIO(data)
        stream.seek(offset)
        return stream.read

    return open_at


def make(name: str, data: bytes, ids: IdMap, **run: object) -> images.Stored:
    """Store an image of one layer, ready to run."""
    with Workspace() as work:
        info = layers.ingest(work, source(data), idmap=ids)
        stored = images.save(work, parse(name), [info], dict(run), "")
        images.prepare_in(work, parse(name), ids)
    return stored


def contents(home: Path) -> set[str]:
    """Return the store's files and folders, without what is inside of layers, and without locks."""
    found = set()
    for top, folders, files in os.walk(home):
        folders[:] = [name for name in folders if name not in ("fs", "locks")]
        found |= {os.path.relpath(os.path.join(top, name), home) for name in folders + files}
    return found


# ── launch records ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_find_what_was_imported(ids: IdMap) -> None:
    make("a", TREE, ids, Env=["A=1"], Cmd=["sh"], Entrypoint=["/e"], WorkingDir="/w", User="1:2", StopSignal="SIGINT")
    found = store.find(parse("a"), ids)
    assert found is not None
    assert (found.env, found.cmd, found.entrypoint) == (["A=1"], ["sh"], ["/e"])
    assert (found.working_dir, found.user, found.stop_signal) == ("/w", "1:2", "SIGINT")
    assert (Path(store.layers()) / found.layers[0] / "bin" / "sh").read_text() == "#!"


def test_find_nothing(ids: IdMap) -> None:
    assert store.find(parse("a"), ids) is None
    make("a", TREE, ids)
    assert store.find(parse("b"), ids) is None
    other = IdMap(mode="keep", uids=ids.uids, gids=ids.gids)
    assert store.find(parse("a"), other) is None, "it is not unpacked for that map"


@pytest.mark.parametrize(
    "damage", [b"", b"\0" * 100, b"x", marshal.dumps(("x",) * 11, 4), marshal.dumps(None, 4), marshal.dumps((1, 2), 4)]
)
def test_a_record_that_does_not_fit_is_none(ids: IdMap, damage: bytes) -> None:
    make("a", TREE, ids)
    record = Path(store.record_path(str(parse("a")), ids))
    whole = record.read_bytes()
    record.write_bytes(damage)
    assert store.find(parse("a"), ids) is None
    for length in range(0, len(whole), 7):
        record.write_bytes(whole[:length])
        assert store.find(parse("a"), ids) is None


def test_a_layer_that_is_gone_is_none(ids: IdMap) -> None:
    make("a", TREE, ids)
    found = store.find(parse("a"), ids)
    assert found
    layout.remove_tree(f"{store.layers()}/{found.layers[0].partition('/')[0]}")
    assert store.find(parse("a"), ids) is None
    again = images.prepare(parse("a"), ids)
    assert again
    assert again.layers == found.layers
    assert store.find(parse("a"), ids) == found


def test_another_boot(ids: IdMap, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpacked layers are not fsynced: after a reboot their files are counted before they are trusted."""
    make("a", TREE, ids)
    found = store.find(parse("a"), ids)
    assert found
    monkeypatch.setattr(store, "boot_id", lambda: "another")
    assert store.find(parse("a"), ids) is None
    inode = os.stat(f"{store.layers()}/{found.layers[0]}").st_ino
    assert images.prepare(parse("a"), ids) == found
    assert store.find(parse("a"), ids) == found
    assert os.stat(f"{store.layers()}/{found.layers[0]}").st_ino == inode, "it was whole, so it was kept"


def test_another_boot_that_lost_data(ids: IdMap, monkeypatch: pytest.MonkeyPatch) -> None:
    make("a", TREE, ids)
    found = store.find(parse("a"), ids)
    assert found
    os.truncate(f"{store.layers()}/{found.layers[0]}/bin/sh", 0)
    monkeypatch.setattr(store, "boot_id", lambda: "another")
    assert images.prepare(parse("a"), ids) == found
    assert Path(f"{store.layers()}/{found.layers[0]}/bin/sh").read_text() == "#!", "it was unpacked again from its blob"


@pytest.mark.parametrize(
    "name", ["a", "a:b", "localhost:5000/a/b:c", "a@sha256:" + "0" * 64, "x" * 100 + "/" + "y" * 100 + ":" + "z" * 128]
)
def test_every_reference_is_one_file(name: str) -> None:
    text = str(parse(name))
    escaped = store.escape(text)
    assert store.unescape(escaped) == text
    assert all(0 < len(part) <= 255 and part not in (".", "..") for part in escaped.split("/"))


def test_a_long_reference(ids: IdMap) -> None:
    name = "a" * 100 + "/" + "b" * 100 + ":" + "c" * 128
    make(name, TREE, ids)
    assert store.find(parse(name), ids)
    assert layout.ref_names() == [str(parse(name))]
    with Workspace() as work:
        layout.remove_ref(work, parse(name))
    assert store.find(parse(name), ids) is None


# ── references ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_index_lists_the_references(home: Path, ids: IdMap) -> None:
    stored = make("a", TREE, ids)
    make("b:1", OTHER, ids)
    index = json.loads((home / "index.json").read_text())
    names = {entry["annotations"][manifest.REF_NAME]: entry["digest"] for entry in index["manifests"]}
    assert names[str(parse("a"))] == stored.digest
    assert set(names) == {str(parse("a")), str(parse("b:1"))}


def test_a_reference_that_moves_takes_its_launch_record_along(ids: IdMap) -> None:
    make("a", TREE, ids)
    make("b", OTHER, ids)
    before = store.find(parse("a"), ids)
    with Workspace() as work:
        images.tag(work, "b", [parse("a")])
    assert store.find(parse("a"), ids) is None
    after = images.prepare(parse("a"), ids)
    assert after
    assert before
    assert after.layers != before.layers


def test_a_digest_is_a_name_too(ids: IdMap) -> None:
    stored = make("a", TREE, ids)
    assert images.find(parse(f"a@{stored.digest}"))
    assert images.find(parse(f"a:latest@{stored.digest}"))
    assert images.find(parse(f"b@{stored.digest}")) is None
    assert images.prepare(parse(f"a@{stored.digest}"), ids)
    assert store.find(parse(f"a@{stored.digest}"), ids)
    with Workspace() as work:
        layout.remove_ref(work, parse("a"))
        collect.collect(work)
    assert store.find(parse(f"a@{stored.digest}"), ids) is None


def test_many_writers_and_one_index(home: Path, ids: IdMap) -> None:
    stored = make("a", TREE, ids)

    def write(number: int) -> None:
        with Workspace() as work:
            for turn in range(5):
                layout.set_ref(work, parse(f"t{number}:{turn}"), stored.descriptor)

    in_threads(write, 6)
    index = json.loads((home / "index.json").read_text())
    assert len(index["manifests"]) == len(layout.ref_names()) == 31


def in_threads(function: Callable[[int], None], count: int) -> None:
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            function(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


# ── ingestion ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def take(data: bytes, ids: IdMap | None, **expected: object) -> LayerInfo:
    with Workspace() as work:
        return layers.ingest(work, source(data), idmap=ids, **expected)  # type: ignore[arg-type]


def expectation(data: bytes) -> dict[str, object]:
    import gzip

    return {"digest": manifest.digest_of(data), "size": len(data), "diff_id": manifest.digest_of(gzip.decompress(data))}


@pytest.fixture
def packed() -> bytes:
    import gzip

    return gzip.compress(TREE, mtime=0)


def test_what_is_there_is_not_asked_for(packed: bytes, ids: IdMap) -> None:
    first = take(packed, ids, **expectation(packed))
    assert first.fresh
    with Workspace() as work:
        again = layers.ingest(work, unwilling, idmap=ids, **expectation(packed))  # type: ignore[arg-type]
    assert (again.fresh, again.key, again.digest) == (False, first.key, first.digest)


def unwilling(offset: int) -> Callable[[int], bytes]:
    raise AssertionError("nobody may ask")


def test_another_map_is_unpacked_from_the_blob(packed: bytes, ids: IdMap) -> None:
    take(packed, None, **expectation(packed))
    with Workspace() as work:
        info = layers.ingest(work, unwilling, idmap=ids, **expectation(packed))  # type: ignore[arg-type]
    assert layers.read_meta(info.key)


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("digest", "sha256:" + "1" * 64, "digest-mismatch"),
        ("diff_id", "sha256:" + "1" * 64, "digest-mismatch"),
        ("size", 10, "size-mismatch"),
        ("size", 10_000, "size-mismatch"),
    ],
)
def test_what_was_announced_must_come(
    home: Path, packed: bytes, ids: IdMap, field: str, value: object, code: str
) -> None:
    take(archive(), None)
    before = contents(home)
    with pytest.raises(SbxError) as raised:
        take(packed, ids, **{**expectation(packed), field: value})
    assert raised.value.code == code
    assert {name for name in contents(home) if not name.startswith("partial/")} == {
        name for name in before if not name.startswith("partial/")
    }


def test_a_cut_transfer_goes_on_where_it_ended(packed: bytes, ids: IdMap) -> None:
    asked: list[int] = []

    def cut(offset: int) -> Callable[[int], bytes]:
        asked.append(offset)
        stream = io.BytesIO(packed)
        stream.seek(offset)

        def read(size: int) -> bytes:
            if stream.tell() >= 80 and len(asked) == 1:
                raise SbxError("registry-broken", "the line went dead")
            return stream.read(min(size, 40))

        return read

    with pytest.raises(SbxError, match="dead"), Workspace() as work:
        layers.ingest(work, cut, idmap=ids, **expectation(packed))  # type: ignore[arg-type]
    with Workspace() as work:
        layers.ingest(work, cut, idmap=ids, **expectation(packed))  # type: ignore[arg-type]
    assert asked == [0, 80]
    assert os.listdir(layout.path("partial")) == []


def test_a_wrong_beginning_is_thrown_away(packed: bytes, ids: IdMap) -> None:
    layout.ensure()
    Path(layout.path("partial", manifest.digest_of(packed)[7:])).write_bytes(b"\x1f\x8b" + b"x" * 50)
    with pytest.raises(SbxError) as raised:
        take(packed, ids, **expectation(packed))
    assert raised.value.code == "archive-invalid"
    take(packed, ids, **expectation(packed))
    assert layout.blob_size(manifest.digest_of(packed)) == len(packed)


def test_a_stream_of_no_layer_type_is_stored_as_gzip(ids: IdMap) -> None:
    import gzip
    import lzma

    for data in (TREE, lzma.compress(OTHER)):
        info = take(data, ids)
        assert info.media_type == manifest.OCI_LAYER_GZIP
        blob = Path(layout.blob_path(info.digest)).read_bytes()
        assert manifest.digest_of(blob) == info.digest
        assert manifest.digest_of(gzip.decompress(blob)) == info.diff_id


def test_a_layer_of_an_image_is_gzip_zstd_or_plain(ids: IdMap) -> None:
    import lzma

    data = lzma.compress(TREE)
    with pytest.raises(SbxError) as raised:
        take(data, ids, digest=manifest.digest_of(data), size=len(data), diff_id=manifest.digest_of(TREE))
    assert raised.value.code == "archive-unsupported"
    plain = take(TREE, ids, digest=manifest.digest_of(TREE), media_type=manifest.OCI_LAYER)
    assert (plain.digest, plain.media_type) == (plain.diff_id, manifest.OCI_LAYER)


def test_zstd_stays_zstd(ids: IdMap) -> None:
    import zstandard

    data = zstandard.compress(TREE)
    info = take(data, ids)
    assert (info.media_type, info.digest) == (manifest.OCI_LAYER_ZSTD, manifest.digest_of(data))


@pytest.mark.parametrize("kind", ["gzip", "zstd", "xz", "bzip2"])
def test_compressed_streams_that_are_cut_or_go_on(kind: str, ids: IdMap) -> None:
    import bz2
    import gzip
    import lzma

    import zstandard

    compressors: dict[str, Callable[[bytes], bytes]] = {
        "gzip": gzip.compress,
        "zstd": zstandard.compress,
        "xz": lzma.compress,
        "bzip2": bz2.compress,
    }
    compress = compressors[kind]
    data = compress(TREE)
    whole = take(data, ids)
    assert take(compress(TREE[:700]) + compress(TREE[700:]), ids).diff_id == whole.diff_id, (
        "members one after the other"
    )
    for cut in (1, 4, 9, len(data) // 2):
        with pytest.raises(SbxError) as raised:
            take(data[:-cut], ids)
        assert raised.value.code == "archive-invalid"
    with pytest.raises(SbxError) as raised:
        take(data + b"something else", ids)
    assert raised.value.code == "archive-invalid"


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_a_bomb_ends_at_the_limit_in_little_memory(kind: str, ids: IdMap) -> None:
    import gzip
    import resource

    import zstandard

    bomb = archives.header(b"a", size=1 << 30) + bytes(1 << 26)
    data = gzip.compress(bomb) if kind == "gzip" else zstandard.compress(bomb)
    assert len(data) < len(bomb) / 900
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def again_and_again(offset: int) -> Callable[[int], bytes]:
        stream = io.BytesIO()

        def read(size: int) -> bytes:
            nonlocal stream
            return stream.read(size) or (stream := io.BytesIO(data)).read(size)

        return read

    with pytest.raises(SbxError) as raised, Workspace() as work:
        layers.ingest(work, again_and_again, idmap=ids, limits=Limits(size=1 << 27))
    assert raised.value.code == "archive-limit"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "KiB"


def test_the_same_layer_at_once(packed: bytes, ids: IdMap) -> None:
    opened: list[int] = []

    def slowly(offset: int) -> Callable[[int], bytes]:
        opened.append(offset)
        return source(packed)(offset)

    def work(number: int) -> None:
        with Workspace() as workspace:
            layers.ingest(workspace, slowly, idmap=ids, **expectation(packed))  # type: ignore[arg-type]

    in_threads(work, 8)
    assert opened == [0], "one fetched it, the others waited"


def test_different_layers_at_once(ids: IdMap) -> None:
    def work(number: int) -> None:
        info = take(archive(*(member(b"%d-%d" % (number, file), b"x" * 3000) for file in range(200))), ids)
        assert len(os.listdir(f"{store.layers()}/{info.key}/fs")) == 200

    in_threads(work, 6)


# ── collecting ────────────────────────────────────────────────────────────────────────────────────────────────────────


def remove(name: str) -> collect.Freed:
    with Workspace() as work:
        layout.remove_ref(work, parse(name))
        return collect.collect(work)


def test_what_only_it_used_goes_with_an_image(home: Path, ids: IdMap) -> None:
    make("a", TREE, ids)
    before = contents(home)
    make("b", OTHER, ids)
    make("b:two", OTHER, ids)
    remove("b")
    assert images.find(parse("b:two"))
    freed = remove("b:two")
    assert (freed.blobs, freed.layers) == (3, 1)
    assert contents(home) == before


def test_nothing_is_left_of_the_last(home: Path, ids: IdMap) -> None:
    make("a", TREE, ids)
    remove("a")
    assert [name for name in contents(home) if name.startswith(("blobs/sha256/", "layers/", "refs/", "tmp/"))] == []
    assert json.loads((home / "index.json").read_text())["manifests"] == []


def test_what_is_pinned_stays(packed: bytes, ids: IdMap) -> None:
    make("a", OTHER, ids)
    with Workspace() as work:
        info = layers.ingest(work, source(packed), idmap=ids, **expectation(packed))  # type: ignore[arg-type]
        freed = remove("a")
        assert freed.layers == 1
        assert layout.blob_size(info.digest)
        assert layers.read_meta(info.key)
    remove("a")
    assert layout.blob_size(info.digest) is None
    assert layers.read_meta(info.key) is None


def test_what_a_running_sandbox_uses_stays(ids: IdMap) -> None:
    make("a", TREE, ids)
    found = store.find(parse("a"), ids)
    assert found
    sandbox = state.create("s1")
    sandbox.use_layers(found.layers)
    freed = remove("a")
    assert freed.kept == [found.layers[0].partition("/")[0]]
    assert (Path(store.layers()) / found.layers[0]).exists()
    assert store.find(parse("a"), ids) is None
    state.discard(sandbox)
    assert remove("a").layers == 1


def test_a_damaged_manifest_stops_the_collector(ids: IdMap) -> None:
    """What it would lead to is unknown: better garbage than loss."""
    stored = make("a", TREE, ids)
    make("b", OTHER, ids)
    blob = Path(layout.blob_path(stored.digest))
    blob.write_bytes(blob.read_bytes().replace(b"layers", b"lawyer"))
    before = set(collect.stored_blobs())
    with pytest.raises(SbxError) as raised:
        remove("b")
    assert raised.value.code == "blob-damaged"
    assert set(collect.stored_blobs()) == before


def test_importing_and_removing_at_once(ids: IdMap) -> None:
    """An import is never robbed of its layers by a collector that runs beside it."""
    stop = threading.Event()

    def sweep() -> None:
        while not stop.is_set():
            with Workspace() as work:
                collect.collect(work)

    def work(number: int) -> None:
        for turn in range(6):
            data = archive(member(b"f", b"%d" % (turn % 2)))
            with Workspace() as workspace:
                info = layers.ingest(workspace, source(data), idmap=ids)
                images.save(workspace, parse(f"i{number}"), [info], {}, "")
            image = images.prepare(parse(f"i{number}"), ids)
            assert image
            assert Path(f"{store.layers()}/{image.layers[0]}/f").exists()

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        in_threads(work, 3)
    finally:
        stop.set()
        sweeper.join()


# ── locks and debris ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_lock_is_held_by_one_and_leaves_no_file() -> None:
    layout.ensure()
    holders: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            with layout.lock("x"):
                holders.append(number)
                most.append(len(holders))
                holders.remove(number)

    in_threads(work, 6)
    assert max(most) == 1
    assert not os.path.exists(layout.path("locks", "x"))
    assert not layout.is_locked("x")


def test_debris_of_the_dead_is_cleared_and_that_of_the_living_is_not(home: Path) -> None:
    layout.ensure()
    dead = home / "tmp" / "1-dead"
    (dead / "layer" / "fs").mkdir(parents=True)
    with Workspace() as living:
        Path(living.draft()).touch()
        with Workspace() as other:
            assert sorted(os.listdir(home / "tmp")) == sorted(os.path.basename(each.folder) for each in (living, other))
        assert len(os.listdir(living.folder)) == 2
    assert os.listdir(home / "tmp") == []


def test_whoever_clears_debris_derives_the_index(home: Path, ids: IdMap) -> None:
    """Its owner may have been killed when the reference was there, and index.json did not speak of it yet."""
    make("a", TREE, ids)
    told = (home / "index.json").read_bytes()
    (home / "index.json").write_text('{"schemaVersion": 2, "manifests": []}')
    with Workspace():
        assert (home / "index.json").read_bytes() != told  # nobody was killed
    (home / "tmp" / "1-dead").mkdir()
    (home / "tmp" / ".oci-layout-dead").touch()
    with Workspace() as work:
        assert os.listdir(home / "tmp") == [os.path.basename(work.folder)]
    assert (home / "index.json").read_bytes() == told


def test_the_index_is_derived_when_debris_had_filled_the_disk(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout.ensure()
    dead = home / "tmp" / "1-dead"
    dead.mkdir()
    derive = layout.write_index

    def with_room(work: Workspace) -> None:
        if dead.exists():
            raise OSError(errno.ENOSPC, "")
        derive(work)

    monkeypatch.setattr(layout, "write_index", with_room)
    with Workspace():
        assert (home / "index.json").exists()


@needs.subids
def test_debris_of_subordinate_ids_is_cleared(home: Path) -> None:
    ids, _ = idmap.for_caller("auto")
    with Workspace() as work:
        info = layers.ingest(work, source(archive(folder(b"a", 0o700, uid=5), member(b"a/b", b"x", uid=5))), idmap=ids)
    os.rename(layout.path("layers", info.key), home / "tmp" / "1-dead")
    with Workspace():
        pass
    assert os.listdir(home / "tmp") == []


IMPORT = """
import sys
sys.path.insert(0, sys.argv[1])
from rootless import idmap
from rootless.oci import imports
from rootless.reference import parse
imports.store(parse("killed"), sys.argv[2], idmap.for_caller(sys.argv[3])[0], [])
"""


@pytest.mark.parametrize("mode", ["single", pytest.param("auto", marks=needs.subids)])
def test_killed_at_any_moment(home: Path, tmp_path: Path, mode: str) -> None:
    """After kill -9 the store is as before or as after; the next one clears the debris."""
    ids, _ = idmap.for_caller(mode)
    make("a", TREE, ids)
    tarball = tmp_path / "large.tar"
    tarball.write_bytes(
        archive(*(member(b"%d/%d" % (number % 10, number), b"x" * 2000, uid=number % 3) for number in range(1500)))
    )
    command = [sys.executable, "-c", IMPORT, str(needs.CHECKOUT), str(tarball), mode]
    started = time.monotonic()
    subprocess.run(command, check=True)
    whole = time.monotonic() - started
    remove("killed")
    outcomes = set()
    for _ in range(12):
        process = subprocess.Popen(command)
        time.sleep(random.uniform(0.1, 1.0) * whole)
        process.send_signal(signal.SIGKILL)
        process.wait()
        image = images.prepare(parse("killed"), ids)
        outcomes.add(image is not None)
        if image:
            whole *= 0.8  # the first one may have had a busier machine
            assert len(list(Path(f"{store.layers()}/{image.layers[0]}").iterdir())) == 10
        assert images.prepare(parse("a"), ids)
        remove("killed")
        until(lambda: cleared(home))
        assert len(layers.layer_keys()) == 1
        assert len(collect.stored_blobs()) == 3
    assert False in outcomes, "none was killed before it was done"


def cleared(home: Path) -> bool:
    with Workspace():
        pass
    return os.listdir(home / "tmp") == []


def until(true: Callable[[], bool]) -> None:
    """Wait for what must become true soon: a killed process's child dies a moment after it."""
    deadline = time.monotonic() + 5
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ── failures ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("code", ["disk-full"])
@needs.userns
def test_a_full_disk(tmp_path: Path, code: str) -> None:
    """On a filesystem of 2 MiB: one clear error, and what was there is there."""
    tarball = tmp_path / "large.tar"
    tarball.write_bytes(archive(member(b"large", os.urandom(3 << 20))))
    small = tmp_path / "small.tar"
    small.write_bytes(TREE)
    mount = tmp_path / "mount"
    mount.mkdir()
    script = f"""
mount -t tmpfs -o size=2m,mode=700 none {mount} || exit 99
export SBX_HOME={mount}/store
run() {{ {sys.executable} -I -S -E {needs.CHECKOUT}/rootless/__main__.py "$@"; }}
run import --idmap single small {small} || exit 98
run import --idmap single large {tarball}; echo status $?
run images -q | wc -l
ls {mount}/store/tmp {mount}/store/partial
run import --idmap single again {small} >&2 || exit 97
"""
    done = subprocess.run(["unshare", "-Urm", "sh", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "status 125\n1\n" in done.stdout
    assert "No space left on device" in done.stderr
    assert "hint: free some space" in done.stderr
    after = done.stdout.partition("status 125\n1\n")[2].split()
    assert [line for line in after if not line.endswith(":")] == []


def test_a_store_that_may_not_be_written(home: Path, ids: IdMap) -> None:
    if os.geteuid() == 0:
        pytest.skip("the superuser may write everywhere")
    make("a", TREE, ids)
    found = store.find(parse("a"), ids)
    modes = {path: path.stat().st_mode for path in [home, *home.rglob("*")] if path.is_dir()}
    for path in modes:
        path.chmod(0o500)
    try:
        assert store.find(parse("a"), ids) == found, "running needs no writing here"
        with pytest.raises(SbxError) as raised:
            make("b", OTHER, ids)
        assert raised.value.code == "data-unwritable"
        assert "SBX_HOME" in raised.value.hint
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


@pytest.mark.parametrize(
    "limit",
    ["umask 0777", "umask 0", "ulimit -n 24", "unset HOME TMPDIR", "cd /tmp && mkdir x$$ && cd x$$ && rmdir ../x$$"],
)
def test_odd_surroundings(home: Path, tmp_path: Path, limit: str) -> None:
    tarball = tmp_path / "tree.tar"
    tarball.write_bytes(archive(*(member(b"/".join([b"%d" % number] * 12), b"x") for number in range(30))))
    sbx = f"{sys.executable} -I -S -E {needs.CHECKOUT}/rootless/__main__.py"
    script = f"{limit}; {sbx} import -q a {tarball} && {sbx} images -q && {sbx} rmi a"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == done.stdout.splitlines()[1]
    assert home.stat().st_mode & 0o777 == 0o700
    assert os.listdir(home / "tmp") == os.listdir(home / "layers") == []


def test_an_image_in_a_record_survives_its_trip() -> None:
    image = Image(
        reference="r",
        digest="d",
        layers=["a/fs"],
        env=["A=\udcff"],
        entrypoint=[],
        cmd=["x"],
        working_dir="/",
        user="u",
    )
    assert marshal.loads(store.encode(image, "b"))[4:8] == (("a/fs",), ("A=\udcff",), (), ("x",))
