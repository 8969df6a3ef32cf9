"""Connections to who is at their other end: a pod, a Service and the pod behind it, a node, or somebody outside.

What is known of a peer has a number, which the connection table's flows carry; 0 stands for nothing. A connection whose
peer is not known yet waits for it, bounded, and so can its records.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tcpio_otel.attribution.addresses import Addresses
from tcpio_otel.attribution.naming import NOTHING, Kind, Known
from tcpio_otel.attribution.translations import Translations
from tcpio_otel.batch import Batch, Birth, Endpoint, Mark

Flows = NDArray[np.void]
Slots = NDArray[np.int64]

TRANSLATION_NS = 1_000_000_000
"""How long a connection to a Service waits for the kernel to tell which pod is behind it: as a rule it has by then."""

RETRY_NS = 100_000_000
"""How often is asked what is waited for."""

FAMILIAR_NS = 600_000_000_000
"""For how long nobody waits again for what an address means, once that was in vain."""

FAMILIAR_LIMIT = 1 << 16

TIDY_NS = 10_000_000_000
"""How often numbers that no connection has any more are given back."""


class _Pending(NamedTuple):
    born: int
    since_ns: int
    local: Endpoint
    peer: Endpoint
    real: Endpoint | None


class Peers:
    """Who the peers of this host's connections are.

    Args:
        addresses: what addresses mean.
        translations: who is behind NAT; None: the headers of packets alone tell.
        wait_ns: how long is waited for what an address means that may be a new pod's.
    """

    def __init__(self, addresses: Addresses, translations: Translations | None, wait_ns: int) -> None:
        self._addresses, self._translations, self._wait_ns = addresses, translations, wait_ns
        self._known: list[Known] = [NOTHING]
        self._numbers: dict[Known, int] = {}
        self._free: list[int] = []
        self._pending: dict[int, _Pending] = {}
        self._waiting = np.zeros(0, np.bool_)
        self._familiar: dict[bytes, int] = {}  # addresses that nobody knew, and until when nobody waits for them
        self._retried_ns = self._tidied_ns = 0

    def __getitem__(self, number: int) -> Known:
        """What is known of a peer."""
        return self._known[number]

    @property
    def translations_lost(self) -> int:
        """How often the kernel said that it could not tell of all."""
        return self._translations.lost if self._translations else 0

    def waiting(self, slots: Slots) -> NDArray[np.bool_] | None:
        """Of which slots more may be known soon (bool, shape of `slots`); None: of none."""
        return self._waiting[slots] if self._pending else None

    def assign(
        self, batch: Batch, flows: Flows, slots: Slots, births: Sequence[Birth], renew: Callable[[int], None]
    ) -> None:
        """Note in `flows` the peers of new connections, and of those that waited for it.

        Args:
            batch: what the connections were learnt from.
            flows: of the connection table (dtype FLOW).
            slots: of the batch's packets (int64, shape (packets,)).
            births: connections that are new.
            renew: called with each slot of which something became known after its birth.
        """
        if len(self._waiting) < len(flows):
            self._waiting = np.concatenate([self._waiting, np.zeros(len(flows) - len(self._waiting), np.bool_)])
        now_ns = batch.now_ns
        real = _in_headers(batch, slots, [birth.slot for birth in births]) if births else {}
        for birth in births:
            born = int(flows["born"][birth.slot])
            pending = _Pending(born, now_ns, birth.local, birth.peer, real.get(birth.slot))
            known = self._find(pending, now_ns)
            if known is None:
                self._pending[birth.slot] = pending
                self._waiting[birth.slot] = True
            else:
                self._settle(birth.slot)
                flows["peer"][birth.slot] = self._number(known)
        if self._pending and now_ns - self._retried_ns >= RETRY_NS:
            self._retried_ns = now_ns
            self._retry(flows, now_ns, renew)
        if now_ns - self._tidied_ns >= TIDY_NS:
            self._tidy(flows, now_ns)

    def give_up(self, flows: Flows) -> None:
        """Wait no longer: note what is known by now."""
        self._retry(flows, 1 << 62, lambda _: None)

    def _find(self, pending: _Pending, now_ns: int) -> Known | None:
        """What is known of a peer; None while it is worth waiting to know more."""
        peer, real, waited_ns = pending.peer, pending.real, now_ns - pending.since_ns
        if real is None and self._translations:
            real = self._translations.peer(pending.local, peer)
        meaning, behind = self._addresses.meaning(*peer), None
        to_service = meaning is not None and meaning.kind is Kind.SERVICE
        if to_service and real is None and self._translations and waited_ns < TRANSLATION_NS:
            return None
        asked = real or peer
        if real:
            behind = self._addresses.meaning(*real)
        if (behind if real else meaning) is None:
            if self._worth_waiting(asked.address, waited_ns, now_ns):
                return None
            if real:
                behind = self._addresses.outside(real.address)
            else:
                meaning = self._addresses.outside(peer.address)
        return Known(meaning, real, behind)

    def _worth_waiting(self, address: bytes, waited_ns: int, now_ns: int) -> bool:
        """Whether an address may yet turn out to be a new pod's."""
        if not self._addresses.may_appear(address) or now_ns < self._familiar.get(address, 0):
            return False
        if waited_ns < self._wait_ns:
            return True
        while len(self._familiar) >= FAMILIAR_LIMIT:
            del self._familiar[next(iter(self._familiar))]
        self._familiar[address] = now_ns + FAMILIAR_NS
        return False

    def _retry(self, flows: Flows, now_ns: int, renew: Callable[[int], None]) -> None:
        for slot, pending in list(self._pending.items()):
            if flows["born"][slot] != pending.born:
                self._settle(slot)
            elif (known := self._find(pending, now_ns)) is not None:
                self._settle(slot)
                if known != NOTHING:
                    flows["peer"][slot] = self._number(known)
                    renew(slot)

    def _settle(self, slot: int) -> None:
        """Nothing more is waited for."""
        self._pending.pop(slot, None)
        self._waiting[slot] = False

    def _number(self, known: Known) -> int:
        if known == NOTHING:
            return 0
        number = self._numbers.get(known)
        if number is None:
            if self._free:
                number = self._free.pop()
                self._known[number] = known
            else:
                number = len(self._known)
                self._known.append(known)
            self._numbers[known] = number
        return number

    def _tidy(self, flows: Flows, now_ns: int) -> None:
        self._tidied_ns = now_ns
        used = set(np.unique(flows["peer"][flows["born"] != 0]).tolist())
        for known, number in list(self._numbers.items()):
            if number not in used:
                del self._numbers[known]
                self._known[number] = NOTHING
                self._free.append(number)


def _in_headers(batch: Batch, slots: Slots, wanted: list[int]) -> dict[int, Endpoint]:
    """By slot, the peer that headers of packets show where it is not the socket's: NAT was at work between them."""
    packets = batch.packets
    translated = np.flatnonzero(packets["marks"] & _TRANSLATED)
    translated = translated[np.isin(slots[translated], wanted)]
    found: dict[int, Endpoint] = {}
    for row, slot in zip(translated.tolist(), slots[translated].tolist(), strict=True):
        if slot not in found:
            packet = packets[row]
            shown = Endpoint(packet["header_peer_address"].tobytes(), int(packet["header_peer_port"]))
            if shown != (packet["peer_address"].tobytes(), packet["peer_port"]):
                found[slot] = shown
    return found


_TRANSLATED = int(Mark.TRANSLATED)
