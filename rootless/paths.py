"""Where things are: the data folder, the run-time folder, files shipped with the package. Outside.

Follows the XDG base directory specification. `SBX_HOME` moves everything that we write to one folder.
"""

from __future__ import annotations

import os
import sys

from rootless.errors import SbxError

PACKAGE = os.path.dirname(os.path.abspath(__file__))


def home() -> str:
    """Return the caller's home folder: HOME, or the password database's when that is unset."""
    if folder := os.environ.get("HOME", ""):
        return folder
    import pwd  # rare: only without HOME, and it asks the name service

    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        raise SbxError(
            "home-unknown",
            f"find the home folder of user {os.getuid()}: HOME is unset, and the user has no name",
            "set HOME, or SBX_HOME to a folder for sbx's own files",
        ) from None


def data() -> str:
    """Return the folder of images and sandboxes (absolute; it may not exist yet).

    `SBX_HOME`, or ``sbx`` below XDG_DATA_HOME, or ``~/.local/share/sbx``.
    """
    if folder := os.environ.get("SBX_HOME", ""):
        return os.path.abspath(folder)
    # A relative XDG_DATA_HOME is invalid and ignored, as the specification asks.
    base = os.environ.get("XDG_DATA_HOME", "")
    return f"{base if base.startswith('/') else home() + '/.local/share'}/sbx"


def config() -> str:
    """Return the folder of the user's own settings (absolute; it may not exist)."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    return f"{base if base.startswith('/') else home() + '/.config'}/sbx"


def ensure(folder: str) -> str:
    """Create `folder` and its parents with mode 0700 where they are missing, and return it.

    Raises SbxError ``data-unwritable`` with the cure when it cannot be made.
    """
    try:
        if not os.path.isdir(folder):
            if above := os.path.dirname(folder):
                ensure(above)
            os.mkdir(folder, 0o700)
    except FileExistsError:
        pass  # somebody else was faster
    except OSError as error:
        raise SbxError(
            "data-unwritable",
            f"create folder {folder}: {error.strerror}",
            "set SBX_HOME to a folder on a local disk that you may write to",
        ) from None
    return folder


def shipped(name: str) -> str:
    """Return the path of a file that is shipped with the project, such as ``helpers/seccomp.json``.

    A wheel carries them below ``rootless/share``; a checkout has them at its top.
    """
    for folder in (PACKAGE + "/share", os.path.dirname(PACKAGE)):
        path = f"{folder}/{name}"
        if os.path.exists(path):
            return path
    raise SbxError("installation-broken", f"find {name}: it is missing from the installation", "install sbx again")


def allow_packages() -> None:
    """Make installed packages importable, if the interpreter was started without them (``-S``, 3 ms less).

    Called before the slow way's imports. From here on garbage is collected, too, which a launch leaves alone.
    """
    import gc
    import site  # with -S it has no effect yet

    gc.enable()

    # Not to be told from sys.path: an installed copy of ours has put its own site-packages there.
    if sys.flags.no_site and site.ENABLE_USER_SITE is None:
        site.main()
