"""Id maps: the arithmetic, and /etc/subuid as people write it."""

from __future__ import annotations

import os

import needs
import pytest
from conftest import Sbx
from hypothesis import given
from hypothesis import strategies as st
from launching import NONE

from rootless import idmap
from rootless.errors import SbxError
from rootless.spec import IdMap, IdMapping

Triple = tuple[int, int, int]


def triples(mappings: list[IdMapping]) -> list[Triple]:
    return [(m.container_id, m.host_id, m.size) for m in mappings]


# ── subuid(5) ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "ranges"),
    [
        ("", []),
        ("dev:100000:65536\n", [(100000, 65536)]),
        ("dev:100000:65536", [(100000, 65536)]),
        ("1001:100000:65536\n", [(100000, 65536)]),
        ("other:1:2\ndev:3:4\n1001:5:6\n", [(3, 4), (5, 6)]),
        ("  dev:3:4  \n", [(3, 4)]),
        ("dev:3:0\n", []),
        ("dev:3\ndev:\ndev\n:3:4\n\n#dev:3:4\n", []),
        ("dev:x:4\ndev:3:x\ndev:-3:4\ndev:3:-4\ndev:3:4:5\n", []),
        ("deve:3:4\nde:3:4\n10011:3:4\n", []),
    ],
)
def test_lines_of_a_user(text: str, ranges: list[tuple[int, int]]) -> None:
    assert idmap.parse(text, "dev", 1001) == ranges


def test_a_user_known_by_number_only() -> None:
    assert idmap.parse(":1:2\n1001:3:4\n", "", 1001) == [(3, 4)]


@pytest.mark.parametrize(
    ("ranges", "cause"),
    [
        ([(100, 10), (105, 10)], "100:10 and 105:10 overlap"),
        ([(105, 10), (100, 10)], "100:10 and 105:10 overlap"),
        ([(100, 10), (100, 10)], "overlap"),
        ([(1000, 10)], "contains your own id, 1001"),
        ([(1001, 1)], "contains your own id, 1001"),
        ([(4294967290, 10)], "goes past the last id, 4294967294"),
        ([(4294967295, 1)], "goes past the last id, 4294967294"),
        ([(10**20, 1)], "goes past the last id, 4294967294"),
        ([(2000 + n, 1) for n in range(338)], "338 ranges are more than a map can have"),
    ],
)
def test_ranges_that_cannot_be(ranges: list[tuple[int, int]], cause: str) -> None:
    with pytest.raises(SbxError, match=cause) as caught:
        idmap.check(ranges, 1001, "/etc/subuid")
    assert caught.value.code == "subids-invalid"
    assert caught.value.hint


@pytest.mark.parametrize(
    "ranges",
    [[], [(100000, 65536)], [(100, 10), (110, 10)], [(110, 10), (100, 10)], [(1002, 1), (1000, 1)], [(4294967294, 1)]],
)
def test_ranges_that_can_be(ranges: list[tuple[int, int]]) -> None:
    idmap.check(ranges, 1001, "/etc/subuid")


# ── the arithmetic ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_auto() -> None:
    assert triples(idmap.auto(1001, [(100000, 65536)])) == [(0, 1001, 1), (1, 100000, 65536)]
    assert triples(idmap.auto(1001, [(5, 3), (100, 2)])) == [(0, 1001, 1), (1, 5, 3), (4, 100, 2)]


def test_keep() -> None:
    assert triples(idmap.keep(1001, [(100000, 65536)])) == [
        (0, 100000, 1001), (1001, 1001, 1), (1002, 101001, 64535),
    ]  # fmt: skip
    # too few to reach the caller's own id: what is between has no place
    assert triples(idmap.keep(1001, [(5, 3)])) == [(0, 5, 3), (1001, 1001, 1)]
    assert triples(idmap.keep(2, [(5, 1), (10, 1), (20, 4)])) == [(0, 5, 1), (1, 10, 1), (2, 2, 1), (3, 20, 4)]
    assert triples(idmap.keep(0, [(5, 3)])) == [(0, 0, 1), (1, 5, 3)]


RANGES = st.lists(st.tuples(st.integers(2000, 10**6), st.integers(1, 1000)), max_size=6).filter(
    lambda ranges: all(a + n <= b for (a, n), (b, _) in zip(sorted(ranges), sorted(ranges)[1:], strict=False))
)


@given(RANGES, st.integers(0, 1999))
def test_every_id_has_one_place(ranges: list[tuple[int, int]], own: int) -> None:
    for mappings in (idmap.auto(own, ranges), idmap.keep(own, ranges)):
        outside = sorted(triple[1] + n for triple in triples(mappings) for n in (0, triple[2] - 1))
        inside = [c for c, _, size in triples(mappings) for c in (c, c + size - 1)]
        assert inside == sorted(inside)  # in order, and no overlap
        assert len({c for c, _, _ in triples(mappings)}) == len(mappings)
        assert sum(size for _, _, size in triples(mappings)) == 1 + sum(size for _, size in ranges)
        assert outside[0] >= 0
        assert all(size > 0 for _, _, size in triples(mappings))
    kept = idmap.keep(own, ranges)
    assert [h for c, h, size in triples(kept) if c <= own < c + size] == [own]


def test_repeat_keeps_the_extents() -> None:
    assert triples(idmap.repeat(idmap.auto(1001, [(5, 3), (100, 2)]))) == [(0, 0, 1), (1, 1, 3), (4, 4, 2)]


def test_covers() -> None:
    mappings = idmap.auto(1001, [(100000, 10)])
    assert [number for number in (-1, 0, 1, 10, 11, 4294967294) if idmap.covers(mappings, number)] == [0, 1, 10]


def test_text_is_what_the_kernel_reads() -> None:
    assert idmap.text(idmap.auto(1001, [(100000, 65536)])) == "0 1001 1\n1 100000 65536\n"


def test_keys_tell_maps_apart() -> None:
    def of(mode: str, ranges: list[tuple[int, int]]) -> str:
        maps = idmap.auto(1001, ranges)
        return IdMap(mode=mode, uids=maps, gids=maps).key

    assert of("auto", [(5, 3)]) == of("auto", [(5, 3)])
    assert len({of("auto", [(5, 3)]), of("auto", [(5, 4)]), of("auto", [(6, 3)]), of("single", [])}) == 4
    one, two = idmap.auto(1, [(5, 3)]), idmap.auto(1, [])
    assert IdMap(uids=one, gids=two).key != IdMap(uids=two, gids=one).key


# ── the caller's ──────────────────────────────────────────────────────────────────────────────────────────────────────


def given_files(monkeypatch: pytest.MonkeyPatch, subuid: str, subgid: str) -> None:
    texts = {
        "/etc/subuid": subuid,
        "/etc/subgid": subgid,
        "/etc/passwd": f"me:x:{os.getuid()}:{os.getgid()}::/:/bin/sh\n",
    }
    monkeypatch.setattr(idmap, "_read", lambda path: texts.get(path, ""))


@needs.program("newuidmap", "newgidmap")
@pytest.mark.skipif(os.geteuid() == 0, reason="root maps what it likes")
def test_for_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    given_files(monkeypatch, "me:200000:10\n", f"{os.getuid()}:300000:20\n")
    ids, notice = idmap.for_caller()
    assert (ids.mode, notice) == ("auto", "")
    assert triples(ids.uids) == [(0, os.geteuid(), 1), (1, 200000, 10)]
    assert triples(ids.gids) == [(0, os.getegid(), 1), (1, 300000, 20)]
    assert idmap.for_caller("keep")[0].mode == "keep"


@pytest.mark.parametrize(
    ("subuid", "subgid", "cause"),
    [
        ("", "me:5:5\n", "read /etc/subuid: no subordinate ids for me"),
        ("me:5000:5\n", "", "read /etc/subgid: no subordinate ids for me"),
        ("me:5000:5\nme:5002:5\n", "me:5000:5\n", "read /etc/subuid: 5000:5 and 5002:5 overlap"),
        ("me:5000:5\n", "me:4294967290:50\n", "read /etc/subgid: 4294967290:50 goes past the last id"),
    ],
)
@pytest.mark.skipif(os.geteuid() == 0, reason="root maps what it likes")
def test_files_that_give_nothing(monkeypatch: pytest.MonkeyPatch, subuid: str, subgid: str, cause: str) -> None:
    given_files(monkeypatch, subuid, subgid)
    with pytest.raises(SbxError, match=cause):
        idmap.for_caller("auto")
    ids, notice = idmap.for_caller()
    assert notice.startswith(cause)
    assert notice.endswith("; only your own id is mapped")
    assert (ids.mode, triples(ids.uids)) == ("single", [(0, os.geteuid(), 1)])
    assert triples(idmap.for_caller("keep")[0].uids) == [(os.geteuid(), os.geteuid(), 1)]
    assert idmap.for_caller("single")[1] == ""


def test_an_unknown_mode() -> None:
    with pytest.raises(SbxError, match="choose id map 'wat': there are auto, single and keep"):
        idmap.for_caller("wat")


# ── as sandboxes ──────────────────────────────────────────────────────────────────────────────────────────────────────

SHOW = "cat /proc/self/uid_map; id -u; id -g; chown 5:5 /mnt && chown 0:0 /mnt && echo chowned"


def shown(sbx: Sbx, image: str, mode: str) -> tuple[list[list[int]], list[str]]:
    lines = sbx.ok("run", *NONE, "--idmap", mode, image, "sh", "-c", SHOW).splitlines()
    maps = [list(map(int, line.split())) for line in lines if len(line.split()) == 3]
    return maps, lines[len(maps) :]


@needs.userns
@needs.busybox
def test_single(sbx: Sbx, image: str) -> None:
    """One id is mapped; chown is answered and does nothing."""
    maps, rest = shown(sbx, image, "single")
    assert [(inside, size) for inside, _, size in maps] == [(0, 1)]
    assert rest == ["0", "0", "chowned"]
    setgroups = sbx.ok("run", *NONE, "--idmap", "single", image, "cat", "/proc/self/setgroups")
    assert setgroups == "deny"


@needs.userns
@needs.subids
@needs.busybox
def test_auto_and_keep(sbx: Sbx, image: str) -> None:
    maps, rest = shown(sbx, image, "auto")
    # the sandbox's own user namespace repeats the map of the one around it: its ids are the same
    assert [(inside, outside) for inside, outside, _ in maps] == [(0, 0), (1, 1)]
    assert maps[1][2] >= 1000
    assert rest == ["0", "0", "chowned"]
    if os.geteuid() != 0:
        own = str(os.geteuid())
        assert sbx.ok("run", *NONE, "--idmap", "keep", image, "id", "-u") == own
        assert sbx.ok("run", *NONE, "--idmap", "keep", "-u", "0", image, "id", "-u") == "0"


@needs.userns
@needs.busybox
def test_what_has_no_place_in_the_map(sbx: Sbx, image: str) -> None:
    result = sbx("run", *NONE, "--idmap", "single", "-u", "5", image, "true")
    assert result.status == 125
    assert result.stderr.startswith("sbx: become user 5:0: the id has no place in the sandbox's id map\nhint: ")
