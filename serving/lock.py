"""One process at a time in a local folder."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What file systems without locks say.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def held(path: Path) -> Iterator[bool | None]:
    """Hold the file ``path``, which is made where it is missing; however the process ends, let go.

    Yields:
        Whether it is this process's: False while another one holds it, None where the file system
        has no locks.

    Raises:
        OSError: the file cannot be made or opened.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, *NO_LOCKS):
                raise
            yield None if error.errno in NO_LOCKS else False
        else:
            yield True
