"""One run at a time in a directory."""

import contextlib

from fastflow.data.files import lock
from fastflow.engine.errors import RunError

__all__ = ["claimed"]


@contextlib.contextmanager
def claimed(directory, processes):
    """Inside, the directory, which is made, belongs to this run alone, until it leaves or its first process ends,
    however it does; where files can't be locked nothing keeps others out. All processes of the run enter together.

    Args:
        directory: a Path that all of them see.
        processes: the run's :class:`~fastflow.engine.distributed.Processes`; the first one holds the lock.

    Raises:
        RunError: another run is inside.
        OSError: the directory can't be made or written.
    """
    failure = None
    with contextlib.ExitStack() as stack:
        if processes.rank == 0:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                lock(stack.enter_context(open(directory / ".lock", "a")), wait=False)
            except BlockingIOError:
                failure = RunError(f"{directory}: another run is writing here; wait for its end or choose another "
                                   "directory (--out)")
            except OSError as error:
                failure = error
        if processes.most(failure is not None):
            raise failure or RunError(f"{directory}: process 0 could not get it for this run")
        yield
