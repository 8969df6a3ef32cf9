"""What is known of a connection's peer, as attributes: what its own Resource would say, behind a prefix."""

from tcpio_otel import names
from tcpio_otel.attribution.naming import Kind, Known
from tcpio_otel.batch import Names
from tcpio_otel.connections.events import Connection, Role
from tcpio_otel.encoding.endpoints import address_text


def peer_names(known: Known) -> Names:
    """The attributes of a peer (docs/attributes.md)."""
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


OWNERS = (
    names.DEPLOYMENT, names.STATEFUL_SET, names.DAEMON_SET, names.CRON_JOB, names.JOB, names.REPLICA_SET,
    names.REPLICATION_CONTROLLER,
)  # fmt: skip
WORKLOAD_NAMES = (
    "kind", names.SERVICE, names.NAMESPACE, names.SERVICE_NAME, names.SERVICE_NAMESPACE, *OWNERS,
)  # fmt: skip


def series_peer(known: Known, connection: Connection) -> Names:
    """What a series says of a connection's peer; of one that has no name, its address if it is the server."""
    found = peer_workload(known)
    if found or connection.role is not Role.CLIENT:
        return found
    return ((names.SERVER_ADDRESS, address_text(connection.peer.address)),)


def peer_workload(known: Known) -> Names:
    """What of that is the same for all pods of a workload: for series, of which there shall be few.

    A pod of which no owner is known goes by its own name, and so does a node.
    """
    found = {name.removeprefix(names.PEER_PREFIX): value for name, value in peer_names(known)}
    kept = {name: found[name] for name in WORKLOAD_NAMES if name in found}
    if found.get("kind") == Kind.POD and not any(name in found for name in (names.SERVICE_NAME, *OWNERS)):
        kept[names.POD_NAME] = found.get(names.POD_NAME, "")
    if found.get("kind") == Kind.NODE:
        kept[names.NODE] = found.get(names.NODE, "")
    return tuple((names.PEER_PREFIX + name, value) for name, value in kept.items())
