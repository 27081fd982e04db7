"""A store that belongs to one attempt. torchrun hands the store of a failed attempt on to the next one, addresses of
dead processes included, and a process that reads one of those before its peer has written anew can't connect.

The processes of an attempt agree on a prefix that no earlier one had. Each writes a name of its own. Process 0 proposes
a token together with all names that it sees, again whenever a name changes; the others answer a proposal that holds
their own name, and once all have, process 0 confirms it. Names, proposals and answers of the dead match nothing.
"""

import time
import uuid

from torch.distributed import DistStoreError, PrefixStore

__all__ = ["fresh_store"]

PREFIX = "fastflow"
POLL_SECONDS = 0.01


def fresh_store(store, rank, count, timeout_seconds):
    """A view of ``store`` that is empty, the same in all ``count`` processes; every one of them calls this.

    Raises:
        torch.distributed.DistStoreError: the others did not come within ``timeout_seconds``.
    """
    shared = PrefixStore(PREFIX, store)
    agree = _propose if rank == 0 else _follow
    return PrefixStore(agree(shared, rank, count, time.monotonic() + timeout_seconds), shared)


def _propose(store, rank, count, deadline):
    """The token, in process 0."""
    store.set(f"name/{rank}", uuid.uuid4().hex)
    names = [f"name/{r}" for r in range(count)]
    answers = [f"answer/{r}" for r in range(1, count)]
    proposed, token = None, ""
    while True:
        found = _read(store, names)
        if found is not None and found != proposed:
            proposed, token = found, uuid.uuid4().hex
            store.set("proposal", " ".join([token, *found]))
        if token and _read(store, answers) == [token] * len(answers):
            store.set("confirmed", token)
            return token
        _wait(deadline)


def _follow(store, rank, count, deadline):
    """The token, in the other processes."""
    name = uuid.uuid4().hex
    store.set(f"name/{rank}", name)
    answered = None
    while True:
        proposal = _read(store, ["proposal"])
        if proposal is not None:
            token, *names = proposal[0].split()
            if len(names) == count and names[rank] == name:
                if token != answered:
                    store.set(f"answer/{rank}", token)
                    answered = token
                if _read(store, ["confirmed"]) == [token]:
                    return token
        _wait(deadline)


def _read(store, keys):
    """The texts of all keys, None as long as one is missing."""
    if not keys:
        return []
    return [store.get(key).decode() for key in keys] if store.check(keys) else None


def _wait(deadline):
    if time.monotonic() > deadline:
        raise DistStoreError("not all processes of this attempt came in time")
    time.sleep(POLL_SECONDS)
