"""Files appear whole or not at all: written under a hidden name first, then moved into place."""

import glob
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, moved onto it when the block ends well, removed when it does not.

    The file gets the permissions of any new file, also from writers that would keep it to their user. What a
    killed process of this machine left of the same file is removed.
    """
    prefix = f".{path.name}.{platform.node()}."
    for left in path.parent.glob(f"{glob.escape(prefix)}*.partial"):
        pid = left.name[len(prefix) : -len(".partial")]
        if pid.isdecimal() and not _alive(int(pid)):
            left.unlink(missing_ok=True)
    partial = path.with_name(f"{prefix}{os.getpid()}.partial")
    try:
        partial.touch()
        permissions = partial.stat().st_mode & 0o777
        yield partial
        partial.chmod(permissions)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    """Whether a process of this machine has that id, whoever's it is."""
    try:
        os.kill(pid, 0)  # asks, and sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder inside `folder` whose entries are moved up into it when the block ends well.

    An entry of the same name is replaced, a sub-folder as one. If the block raises (a full disk, Ctrl-C),
    what `folder` held before is untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    try:
        yield staging
        for entry in sorted(staging.iterdir()):
            final = folder / entry.name
            if final.is_dir():
                os.replace(final, staging / f".old-{entry.name}")  # only an empty one can be replaced
            os.replace(entry, final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
