"""Processes of one attempt find each other in a store full of what earlier attempts left."""

import threading
import time

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("torch without distributed", allow_module_level=True)

from fastflow.engine.rendezvous import PREFIX, fresh_store

DistStoreError, HashStore, PrefixStore = (getattr(torch.distributed, name)
                                          for name in ("DistStoreError", "HashStore", "PrefixStore"))


def attempt(store, count, delays=None, timeout=20.0):
    """What every process of an attempt found: its store, or the error."""
    found = [None] * count

    def process(rank):
        time.sleep((delays or {}).get(rank, 0.0))
        try:
            found[rank] = fresh_store(store, rank, count, timeout)
        except DistStoreError as error:
            found[rank] = error

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("count", [1, 2, 5])
def test_each_attempt_has_an_empty_store_that_its_processes_share(count):
    store = HashStore()
    for number in range(4):
        late = {number % count: 0.05}  # the others see what is left of the attempt before
        found = attempt(store, count, late)
        for rank, mine in enumerate(found):
            assert not mine.check(["address"])
            mine.set(f"of {rank}", str(number))
        assert all(mine.get(f"of {rank}") == str(number).encode() for mine in found for rank in range(count))
        found[0].set("address", "stale")


def test_an_attempt_may_be_smaller_or_larger_than_the_one_before():
    store = HashStore()
    for count in (3, 1, 4, 2):
        found = attempt(store, count, {0: 0.03})
        found[-1].set("key", str(count))
        assert all(mine.get("key") == str(count).encode() for mine in found)


def test_one_that_died_in_the_midst_of_agreeing_does_not_count():
    """Process 1 of the attempt before had written its name and answered; process 0 had not confirmed."""
    store = HashStore()
    left = PrefixStore(PREFIX, store)
    left.set("name/1", "dead")
    left.set("proposal", "token other dead")
    left.set("answer/1", "token")
    left.set("confirmed", "token")
    for delays in ({0: 0.1}, {1: 0.1}):
        first, second = attempt(store, 2, delays)
        first.set("key", "value")
        assert second.get("key") == b"value"


def test_one_alone_says_so_in_time():
    begin = time.monotonic()
    for rank in (0, 1):
        with pytest.raises(DistStoreError, match="not all processes of this attempt came in time"):
            fresh_store(HashStore(), rank, 2, 0.1)
    assert time.monotonic() - begin < 5
