"""Files appear whole or not at all: written under a hidden name first, then moved into place."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, moved onto it when the block ends well, removed when it does not."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
