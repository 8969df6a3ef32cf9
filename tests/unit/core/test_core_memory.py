"""Memory of a burst, given back."""

from tcpio_otel.memory import BURST_RECORDS, CALM_NS, GiveBack


def test_memory_is_let_go_once_after_each_burst_and_not_in_between() -> None:
    """Calm has to last; a second burst starts the wait anew; small batches never cause anything."""
    now_ns, forgotten = [0], list[int]()
    give_back = GiveBack(lambda: forgotten.append(now_ns[0]), lambda: now_ns[0])
    batches = [(0, 10), (1, BURST_RECORDS), (CALM_NS - 1, BURST_RECORDS), (2 * CALM_NS - 2, 5), (2 * CALM_NS, 5),
               (3 * CALM_NS, 5), (9 * CALM_NS, BURST_RECORDS), (10 * CALM_NS, 0)]  # fmt: skip
    for now_ns[0], records in batches:
        give_back.after(records)
    assert forgotten == [2 * CALM_NS, 10 * CALM_NS]
