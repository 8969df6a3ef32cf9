"""The ledger and the clock: what stands at the bottom of everything."""

import threading

from tcpio_otel.clock import UnixOffset
from tcpio_otel.ledger import Ledger


def test_a_record_moves_and_never_vanishes() -> None:
    """From the source through the agent to the receiver, the sum stays what was seen."""
    ledger = Ledger()
    ledger.source(seen=10, filtered={"port": 2}, dropped={"ring_full": 1}, pending=7)
    assert ledger.balance().difference == 0
    ledger.taken(5)
    ledger.source(seen=10, filtered={"port": 2}, dropped={"ring_full": 1}, pending=2)
    ledger.exported(3)
    ledger.dropped(1, "queue_full")
    balance = ledger.balance()
    assert balance.difference == 0
    assert (balance.exported, balance.in_flight) == (3, 3)
    assert balance.dropped == {"ring_full": 1, "queue_full": 1}


def test_a_silent_loss_shows() -> None:
    """If a stage forgot a record, the difference says so."""
    ledger = Ledger()
    ledger.source(seen=10, filtered={}, dropped={}, pending=9)
    assert ledger.balance().difference == 1


def test_threads_do_not_lose_counts() -> None:
    """Exporter threads and the main loop write at once."""
    ledger = Ledger()
    ledger.source(seen=40_000, filtered={}, dropped={}, pending=0)
    ledger.taken(40_000)

    def export() -> None:
        for _ in range(10_000):
            ledger.exported(1)

    threads = [threading.Thread(target=export) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.balance().difference == 0
    assert ledger.balance().exported == 40_000


def test_unix_time_is_sampled_tightly_and_again_after_a_while() -> None:
    """The offset follows a step of Unix time, but only once the refresh is due."""
    now = {"boot": 1_000, "offset": 500}
    offset = UnixOffset(boot=lambda: now["boot"], unix=lambda: now["boot"] + now["offset"], refresh_ns=100)
    assert offset() == 500
    now.update(boot=1_050, offset=700)
    assert offset() == 500
    now.update(boot=1_100)
    assert offset() == 700
