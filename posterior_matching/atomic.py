"""Writing files that are there whole or not at all."""

import contextlib
import os
import pathlib
import uuid
from collections.abc import Iterator


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary path in the folder of `path`, and moves what was written there to `path` on success.

    The name is unique, so that several processes can write the same file; the last one wins. On failure the temporary
    file is removed, and `path` is as before.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
