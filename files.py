"""Where this clone is; and files that appear whole or not at all: under a hidden name first, then moved into place."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLONE = Path(__file__).resolve().parent


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, moved onto it when the block ends well, and removed when it does not. The file
    gets the permissions of any new file, also from writers that would keep it to their user."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.touch()
        permissions = partial.stat().st_mode & 0o777
        yield partial
        partial.chmod(permissions)
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # else a power cut may leave an empty file under the name
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
