"""One process at a time, also on file systems without locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from halfstep.errors import HalfstepError

# What flock says where there are no locks: Lustre mounted without -o flock, some NFS and FUSE.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


@contextlib.contextmanager
def exclusive(file: Path, patience_s: float) -> Iterator[str]:
    """Hold the lock `file`. Yields "", or a warning where the file system has no locks.

    There, a file that only one process can create takes the place of the lock. It names its
    process; that of a killed process on this machine is removed.
    """
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise HalfstepError(
            f"{file}: cannot be written ({error.strerror}), so no lock can be held; "
            "change the permissions of the folder"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        os.close(descriptor)
        if error.errno not in NO_LOCKS:
            raise
    else:
        try:
            yield ""
        finally:
            os.close(descriptor)
        return
    with _created(Path(f"{file}.held"), patience_s):
        yield (
            f"WARNING: {file.parent}: this file system has no locks (flock); "
            f"{file.name}.held took their place; mount it with -o flock\n"
        )


@contextlib.contextmanager
def _created(marker: Path, patience_s: float) -> Iterator[None]:
    from filelock import SoftFileLock, Timeout

    lock = SoftFileLock(str(marker), timeout=patience_s)
    try:
        lock.acquire()
    except Timeout:
        raise HalfstepError(
            f"{marker}: another process holds it, for more than {patience_s:g} s; "
            "delete the file if that process has ended"
        ) from None
    try:
        yield
    finally:
        lock.release()
