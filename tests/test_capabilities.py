"""Capability names, numbers and sets, checked against the kernel where it tells."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rootless import capabilities, syscalls
from rootless.errors import SbxError

NAME = st.sampled_from(capabilities.NAMES)


def test_numbers_are_the_kernels() -> None:
    assert capabilities.NUMBERS["CAP_CHOWN"] == 0
    assert capabilities.NUMBERS["CAP_SYS_ADMIN"] == 21
    assert capabilities.NUMBERS["CAP_SETFCAP"] == 31
    assert capabilities.NUMBERS["CAP_CHECKPOINT_RESTORE"] == 40
    assert len(capabilities.NAMES) == len(set(capabilities.NAMES)) == 41


def test_the_kernel_knows_each_number_and_no_more() -> None:
    with open("/proc/sys/kernel/cap_last_cap") as file:
        last = int(file.read())
    assert last <= capabilities.NUMBERS["CAP_CHECKPOINT_RESTORE"], "a new capability: add its name"
    assert syscalls.prctl(syscalls.PR_CAPBSET_READ, last) in (0, 1)


def test_the_default_set() -> None:
    assert capabilities.names(capabilities.DEFAULT) == [
        "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID", "CAP_SETUID",
        "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_SETFCAP",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "word", ["NET_RAW", "net_raw", "CAP_NET_RAW", "cap_net_raw", " Net_Raw ", "net_raw,", ",cap_NET_RAW"]
)
def test_spellings(word: str) -> None:
    assert capabilities.parse([word]) == 1 << 13


@pytest.mark.parametrize("word", ["all", "ALL", "CAP_ALL"])
def test_all(word: str) -> None:
    assert capabilities.parse([word]) == capabilities.EVERY == 0x1FFFFFFFFFF


def test_none() -> None:
    assert capabilities.parse([]) == capabilities.parse([""]) == 0


@pytest.mark.parametrize("word", ["NET", "CAP_CAP_KILL", "13", "NET-RAW", "\x1b[31m"])
def test_unknown_names_are_errors(word: str) -> None:
    with pytest.raises(SbxError) as caught:
        capabilities.parse(["KILL", word])
    assert caught.value.code == "capability-unknown"
    assert word in caught.value.message


def test_adding_and_dropping() -> None:
    base = capabilities.DEFAULT
    kill, raw = 1 << 5, 1 << 13
    assert capabilities.adjust(base, [], []) == base
    assert capabilities.adjust(base, ["net_raw"], ["KILL"]) == (base | raw) & ~kill
    assert capabilities.adjust(base, ["KILL", "NET_RAW"], ["ALL"]) == kill | raw
    assert capabilities.adjust(base, ["ALL"], ["kill"]) == capabilities.EVERY & ~kill
    assert capabilities.adjust(base, ["ALL"], []) == capabilities.EVERY
    assert capabilities.adjust(base, [], ["all"]) == 0
    assert capabilities.adjust(base, [], ["NET_RAW"]) == base


@pytest.mark.parametrize(("add", "drop"), [(["ALL"], ["ALL"]), (["KILL"], ["cap_kill"]), (["KILL", "BPF"], ["BPF"])])
def test_a_contradiction_is_an_error(add: list[str], drop: list[str]) -> None:
    with pytest.raises(SbxError) as caught:
        capabilities.adjust(capabilities.DEFAULT, add, drop)
    assert caught.value.code == "capability-conflict"


@given(st.sets(NAME))
def test_names_and_parse_are_inverse(names: set[str]) -> None:
    assert set(capabilities.names(capabilities.parse(names))) == names


@given(st.sets(NAME), st.sets(NAME), st.integers(0, capabilities.EVERY))
def test_what_is_named_is_obeyed(add: set[str], drop: set[str], base: int) -> None:
    drop -= add
    result = set(capabilities.names(capabilities.adjust(base, add, drop)))
    assert add <= result
    assert not drop & result
    assert result - add <= set(capabilities.names(base))


def test_a_real_process_keeps_exactly_the_set() -> None:
    """In a user namespace of our own, where root has all of them: capset(2) takes our numbers, and /proc shows them."""
    wanted = capabilities.adjust(capabilities.DEFAULT, ["NET_ADMIN"], ["KILL"])
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            syscalls.unshare(syscalls.CLONE_NEWUSER)
            syscalls.capset(wanted, wanted, 0)
            with open("/proc/self/status") as file:
                os.write(write, next(line for line in file if line.startswith("CapEff")).split()[1].encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with open(read) as pipe:
        assert int(pipe.read(), 16) == wanted
