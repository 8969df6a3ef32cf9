"""CIDR blocks to one question: does an address lie in any of them?"""

from collections.abc import Iterable
from functools import lru_cache

from tcpio_otel.batch import IPV4_PREFIX
from tcpio_otel.capture.control import Network

_ANSWERS_KEPT = 1 << 16


class Networks:
    """A set of CIDR blocks, asked by 16-byte address, IPv4 mapped; as in the probe, `::/0` holds IPv4 too."""

    def __init__(self, networks: Iterable[Network]) -> None:
        self._prefixes = [_prefix(network) for network in networks]
        self.holds = lru_cache(_ANSWERS_KEPT)(self._search)

    def __bool__(self) -> bool:
        return bool(self._prefixes)

    def _search(self, address: bytes) -> bool:
        number = int.from_bytes(address)
        return any(number >> host_bits == prefix for prefix, host_bits in self._prefixes)


def _prefix(network: Network) -> tuple[int, int]:
    """The leading bits of a block's addresses, and how many bits come behind them."""
    packed = network.network_address.packed
    host_bits = network.max_prefixlen - network.prefixlen
    return int.from_bytes(packed if network.version == 6 else IPV4_PREFIX + packed) >> host_bits, host_bits
