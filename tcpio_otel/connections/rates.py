"""Open connections by column, as they stand at a moment: rates since the moment before, totals, round-trip times.

Beside the table, not in it: what the kernel says of open sockets now and then refines these figures, and neither
begins nor ends a connection.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tcpio_otel.batch import Batch, Direction, Kind, Mark
from tcpio_otel.connections.identity import FIN_RECEIVED_STATES
from tcpio_otel.connections.table import ConnectionTable, Records, Slots

_RETRANSMIT, _TRANSMIT, _SOCKET = int(Mark.RETRANSMIT), int(Direction.TRANSMIT), int(Kind.SOCKET)
_COLUMNS = ("_before", "_base", "_resent", "_resent_before", "_resent_base", "_rtt_us")


class Moment(NamedTuple):
    """Open connections, a row each. Columns of shape (n, 2) are by direction; rates are a second.

    Attributes:
        slots: of the connection table (int64).
        born: of each slot by then (uint64): it rises from connection to connection, and says whether this one has left.
        rates: payload, each byte once (float64, shape (n, 2)).
        totals: the same since the connection began, or is followed where the kernel does not say (int64, shape (n, 2)).
        retransmits: segments, likewise (int64).
        resent: of those, how many since it is followed (int64).
        retransmit_rates: float64.
        rtt_us: smoothed, as the kernel has it; 0: not known (int64).
        packets_s, payload_s, retransmits_s: of all connections together, ended ones too; payload is as it was sent
            and received, with what was repeated.
    """

    slots: Slots
    born: NDArray[np.uint64]
    rates: NDArray[np.float64]
    totals: NDArray[np.int64]
    retransmits: NDArray[np.int64]
    resent: NDArray[np.int64]
    retransmit_rates: NDArray[np.float64]
    rtt_us: NDArray[np.int64]
    packets_s: float
    payload_s: float
    retransmits_s: float


class Rates:
    """What the open connections of a table do, from batches and from what the kernel says in between.

    Args:
        table: takes each batch in first.
    """

    def __init__(self, table: ConnectionTable) -> None:
        self._table = table
        self._sampled_ns: int | None = None
        self._packets = self._payload = self._retransmits = 0  # since the last moment
        slots = len(table.flows)
        self._before = np.zeros((slots, 2), np.int64)  # payload, by the last moment
        self._base = np.zeros((slots, 2), np.int64)  # to be added to it for the kernel's totals
        self._resent = np.zeros(slots, np.int64)  # segments of which records said so
        self._resent_before = np.zeros(slots, np.int64)
        self._resent_base = np.zeros(slots, np.int64)
        self._rtt_us = np.zeros(slots, np.int64)

    def take(self, batch: Batch, slots: Slots) -> None:
        """Take in a batch that the table has taken in; `slots` are those of its packets."""
        self._grow()
        if self._sampled_ns is None and len(batch):
            self._sampled_ns = int(batch.records["time_ns"][0])
        if self._table.births:
            fresh = [birth.slot for birth in self._table.births]
            for name in _COLUMNS:
                getattr(self, name)[fresh] = 0
        packets = batch.packets
        self._packets += len(packets)
        self._payload += int(packets["payload_bytes"].sum())
        marked = packets["marks"] & _RETRANSMIT != 0
        if marked.any():
            marked &= (packets["direction"] == _TRANSMIT) & (slots >= 0)
            segments = np.maximum(packets["gso_segments"][marked], 1).astype(np.int64)
            np.add.at(self._resent, slots[marked], segments)
            self._retransmits += int(segments.sum())
        if len(packets) != len(batch):
            told = batch.records[batch.records["kind"] == _SOCKET]
            self._learn(told[told["old_state"] == told["new_state"]])

    def look(self, sockets: Records) -> None:
        """Take in what the kernel says of open sockets now: records of kind SOCKET that tell of no change."""
        if len(sockets):
            self._grow()
            slots, sockets = self._learn(sockets)
            self._rtt_us[slots] = sockets["rtt_smoothed_us"]

    def _learn(self, sockets: Records) -> tuple[Slots, Records]:
        """Learn totals from sockets; returns those that are followed, with their slots.

        A round-trip time is not among it: it is of its moment, and whoever tells of a socket once does not tell again.
        """
        slots = self._table.find(sockets)
        known = slots >= 0
        slots, sockets = slots[known], sockets[known]
        fins = np.isin(sockets["new_state"], FIN_RECEIVED_STATES)
        told = np.empty((len(slots), 2), np.int64)
        told[:, Direction.TRANSMIT] = sockets["bytes_sent"] - sockets["bytes_retransmitted"]
        told[:, Direction.RECEIVE] = sockets["bytes_received"] - np.minimum(fins, sockets["bytes_received"])
        self._base[slots] = told - self._table.payload()[slots]
        self._resent_base[slots] = sockets["retransmits"].astype(np.int64) - self._resent[slots]
        return slots, sockets

    def moment(self, now_ns: int) -> Moment:
        """How the open connections stand, with rates since the last call, or else since the first record.

        `now_ns` is on the records' clock: of the last batch that was taken in, so that they are of as long as it took.
        """
        self._grow()
        since_ns = now_ns if self._sampled_ns is None else self._sampled_ns
        seconds = max(now_ns - since_ns, 1) / 1e9
        slots, payload, resent = self._table.open_slots(), self._table.payload(), self._resent
        moment = Moment(
            slots=slots,
            born=self._table.flows["born"][slots],
            rates=(payload[slots] - self._before[slots]) / seconds,
            totals=payload[slots] + self._base[slots],
            retransmits=resent[slots] + self._resent_base[slots],
            resent=resent[slots],
            retransmit_rates=(resent[slots] - self._resent_before[slots]) / seconds,
            rtt_us=self._rtt_us[slots],
            packets_s=self._packets / seconds,
            payload_s=self._payload / seconds,
            retransmits_s=self._retransmits / seconds,
        )
        self._before, self._resent_before, self._sampled_ns = payload, resent.copy(), now_ns
        self._packets = self._payload = self._retransmits = 0
        return moment

    def _grow(self) -> None:
        more = len(self._table.flows) - len(self._rtt_us)
        if more > 0:
            for name in _COLUMNS:
                column = getattr(self, name)
                setattr(self, name, np.concatenate([column, np.zeros((more, *column.shape[1:]), column.dtype)]))
