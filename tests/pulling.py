"""Pulls for tests: in a process of their own, as the command does it, but with less patience and an error's code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import needs

# Not in the test's own process: its servers are threads, and a pull forks.
_DRIVER = """
import json, sys
sys.path.insert(0, sys.argv[1])
from rootless import idmap, reference
from rootless.errors import SbxError
from rootless.oci import images, manifest, progress, pull, registries
from rootless.oci.pace import Patience
options = json.loads(sys.argv[2])
try:
    ids, _ = idmap.for_caller(options["idmap"])
    pulled = pull.pull(
        reference.parse(options["name"]), ids, options["platform"], progress.choose(), registries.load(),
        Patience(**options["patience"]),
    )
    platform = manifest.Platform.parse(options["platform"]) if options["platform"] else None
    image = images.prepare(pulled.reference, ids, platform)
    answer = {"digest": pulled.digest, "fresh": pulled.fresh, "layers": image.layers, "image": image.digest}
except SbxError as error:
    answer = {"code": error.code, "message": error.message, "hint": error.hint, "status": error.status}
print(json.dumps(answer))
"""
HASTE = {"connect": 2, "head": 2, "window": 1.0, "rate": 1000, "tries": 3, "backoff": 0.01, "retry_after": 1}


@dataclass
class Pull:
    """What a pull gave: `code` and `message` of its error, or what it brought; and what it told on stderr."""

    answer: dict[str, Any]
    told: str

    @property
    def code(self) -> str:
        return str(self.answer.get("code", ""))

    @property
    def message(self) -> str:
        return str(self.answer.get("message", ""))

    @property
    def digest(self) -> str:
        assert not self.code, self.answer
        return str(self.answer["digest"])

    @property
    def fresh(self) -> bool:
        assert not self.code, self.answer
        return bool(self.answer["fresh"])


class Puller:
    """Pulls into a store of its own, with a home of its own: nothing of the tester's settings counts."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.store = folder / "store"
        self.home.mkdir(parents=True, exist_ok=True)
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "SBX_HOME": str(self.store),
            "XDG_RUNTIME_DIR": os.environ.get("XDG_RUNTIME_DIR", ""),
            "CONTAINERS_REGISTRIES_CONF": "/dev/null",
        }

    def start(
        self,
        name: str,
        platform: str = "",
        idmap: str = "",
        patience: Mapping[str, float] = HASTE,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> subprocess.Popen[bytes]:
        """Start a pull of `name`; finish() gives what came of it."""
        options = {"name": name, "platform": platform, "idmap": idmap, "patience": dict(patience)}
        return subprocess.Popen(
            [*prefix, sys.executable, "-c", _DRIVER, str(needs.CHECKOUT), json.dumps(options)],
            env={**self.env, **(env or {})}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def finish(self, process: subprocess.Popen[bytes], timeout: float = 60) -> Pull:
        out, err = process.communicate(timeout=timeout)
        assert process.returncode == 0, err.decode(errors="replace")
        return Pull(json.loads(out), err.decode(errors="replace"))

    def __call__(self, name: str, **options: Any) -> Pull:
        return self.finish(self.start(name, **options))

    def configure(self, text: str) -> None:
        """Write our own registries.conf."""
        path = self.home / ".config" / "sbx" / "registries.conf"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    # ── what is in the store ──────────────────────────────────────────────────────────────────────────────────────

    def names(self, *parts: str) -> list[str]:
        """Return the names in a folder of the store, sorted; none where it is missing."""
        folder = self.store.joinpath(*parts)
        return sorted(os.listdir(folder)) if folder.is_dir() else []

    @property
    def blobs(self) -> list[str]:
        return [f"sha256:{name}" for name in self.names("blobs", "sha256")]

    def partial(self, digest: str) -> Path:
        return self.store / "partial" / digest.removeprefix("sha256:")

    def content(self, pull: Pull) -> dict[str, bytes]:
        """Return the files of a pulled image that the test may read, upper layers over lower ones."""
        found = {}
        for layer in reversed(pull.answer["layers"]):
            root = self.store / "layers" / layer
            for path in root.rglob("*"):
                if path.is_file():
                    found[str(path.relative_to(root))] = path.read_bytes()
        return found

    def nothing_half_stored(self) -> None:
        """Require a store without a reference, a layer, a document, or anything in the making."""
        assert self.names("refs") == []
        assert self.names("layers") == []
        assert self.names("tmp") == []
        assert self.names("launch") == []
        assert self.names("locks") in ([], ["collect"])
