"""What is known of a connection's peer, as attributes: what its own Resource would say, behind a prefix."""

from tcpio_otel.attribution.naming import Kind, Known
from tcpio_otel.batch import Names
from tcpio_otel.encoding import names
from tcpio_otel.encoding.endpoints import address_text


def peer_names(known: Known) -> Names:
    """The attributes of a peer (docs/record.md)."""
    meaning, real, behind = known
    if meaning is not None and behind is not None and meaning.kind is not Kind.SERVICE:
        meaning = None  # the address that a node or a gateway gave them; whoever is behind counts
    attributes: dict[str, str | int] = {}
    for part in (behind, meaning):
        if part is not None:
            attributes[names.PEER_KIND] = part.kind.value
            attributes |= {names.PEER_PREFIX + name: value for name, value in part.attributes}
    if real:
        attributes |= {names.REAL_PEER_ADDRESS: address_text(real.address), names.REAL_PEER_PORT: real.port}
    return tuple(attributes.items())
