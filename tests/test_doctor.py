"""`sbx doctor`: one line for each check, the same as JSON, an exit status, and nothing left behind."""

from __future__ import annotations

import itertools
import json
import os
import resource

import needs
from conftest import Sbx

from rootless import checks

pytestmark = needs.userns

MARKS = {checks.OK, checks.DEGRADED, checks.MISSING}


@needs.busybox
def test_what_it_finds_is_what_is_so(sbx: Sbx) -> None:
    found = {finding["name"]: finding for finding in json.loads(sbx.ok("doctor", "--json"))}
    assert [*found] == [check.name for check in checks.CHECKS]
    # what the other tests of this suite rely on
    for name in ("kernel", "userns", "namespaces", "limits", "data", "overlay", "devices", "seccomp"):
        assert found[name]["mark"] == checks.OK, found[name]
    assert os.uname().release in found["kernel"]["found"]
    assert str(sbx.home) in found["data"]["found"]


def test_one_line_for_each_check_and_one_for_its_cure(sbx: Sbx) -> None:
    lines = sbx.ok("doctor").splitlines()
    findings = {line.split(":")[0]: line.split()[0] for line in lines if not line.startswith(" ")}
    assert [line[10:] for line in findings] == [check.title for check in checks.CHECKS]
    assert set(findings.values()) <= MARKS
    # a cure follows something that is not well, and is one line
    assert all(not above.startswith(("ok", " ")) for above, line in itertools.pairwise(lines) if line.startswith(" "))


def test_what_is_essential_makes_the_exit_status(sbx: Sbx) -> None:
    assert sbx("doctor", env={"SBX_HOME": "/proc/no-such-folder"}).status == 1
    assert sbx("doctor", env={"XDG_RUNTIME_DIR": None}).status == 0


def test_all_that_is_wrong_has_a_cure(sbx: Sbx) -> None:
    done = sbx("doctor", "--json", env={"SBX_HOME": "/proc/no-such-folder", "XDG_RUNTIME_DIR": None})
    wrong = [finding for finding in json.loads(done.stdout) if finding["mark"] != checks.OK]
    assert {"data", "overlay", "runtime"} <= {finding["name"] for finding in wrong}
    assert all(finding["fix"] for finding in wrong)


def test_it_leaves_nothing_and_is_quick(fresh_sbx: Sbx) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    fresh_sbx.ok("doctor")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert os.listdir(fresh_sbx.home) == []
    # processor time: what else this machine does is not counted
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_a_data_folder_that_is_yet_to_be_made_stays_so(fresh_sbx: Sbx) -> None:
    home = fresh_sbx.home / "a" / "b"
    found = {f["name"]: f for f in json.loads(fresh_sbx.ok("doctor", "--json", env={"SBX_HOME": str(home)}))}
    assert found["overlay"]["mark"] == checks.OK
    assert os.listdir(fresh_sbx.home) == []


def test_it_needs_no_packages_of_the_callers(sbx: Sbx) -> None:
    # a broken module of the same name as one that it imports, in the current folder and on PYTHONPATH
    (folder := sbx.home / "broken").mkdir(exist_ok=True)
    (folder / "resource.py").write_text("raise SystemExit(77)\n")
    assert sbx("doctor", env={"PYTHONPATH": str(folder)}, cwd=folder).status == 0
