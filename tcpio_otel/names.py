"""Every name that leaves the agent, declared once with what it means; docs/attributes.md is made of them.

A name is plain text to whoever uses it, so that what it means costs nothing where records are encoded.
"""

from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple

from tcpio_otel import __version__

SCHEMA_URL = "https://opentelemetry.io/schemas/1.44.0"
SCOPE = "tcpio_otel"
SCOPE_VERSION = __version__


class On(Enum):
    """Where an attribute can stand, and the letter that stands for it."""

    PACKET = "P"
    SPAN = "S"
    SUMMARY = "C"
    REQUEST = "R"
    EVENT = "E"
    LINK = "L"
    POINT = "D"
    RESOURCE = "O"


class Attribute(NamedTuple):
    """An attribute: its name (`*` stands for anything), its type and unit, where it can stand, and its meaning.

    `of_peer`: the same of the other end stands behind PEER_PREFIX.
    """

    name: str
    kind: str
    unit: str
    on: tuple[On, ...]
    meaning: str
    of_peer: bool = False


class Kind(Enum):
    """What a metric is; all are cumulative."""

    SUM = "sum"
    UP_DOWN = "up-down sum"
    GAUGE = "gauge"
    HISTOGRAM = "exponential histogram"


class Instrument(NamedTuple):
    """A metric: its name and unit, what it is, its meaning, and the attributes of its points beyond its series'."""

    name: str
    unit: str
    kind: Kind
    meaning: str
    by: tuple[str, ...] = ()


ATTRIBUTES: dict[str, Attribute] = {}
INSTRUMENTS: dict[str, Instrument] = {}
RECORDS: dict[str, str] = {}
"""Names of log records and spans."""
SPAN_EVENTS: dict[str, str] = {}
FAULTS: dict[str, str] = {}
"""Values of `tcpio.fault`, which are fields in line protocol."""

PEER_PREFIX = "tcp.peer."

STRING, INT, DOUBLE, BOOLEAN, STRINGS = "string", "int", "double", "boolean", "string[]"
SECONDS, BYTES, NANOSECONDS = "s", "By", "ns"
CONNECTION = (On.SPAN, On.SUMMARY)
ENDS = (On.PACKET, *CONNECTION, On.REQUEST)


def attribute(name: str, kind: str, on: Iterable[On], meaning: str, *, unit: str = "", of_peer: bool = False) -> str:
    """Declare an attribute; returns its name."""
    ATTRIBUTES[name] = Attribute(name, kind, unit, tuple(on), meaning, of_peer)
    return name


def named(found: dict[str, str], name: str, meaning: str) -> str:
    """Declare another name; returns it."""
    found[name] = meaning
    return name


def instrument(name: str, unit: str, kind: Kind, meaning: str, by: tuple[str, ...] = ()) -> Instrument:
    """Declare a metric."""
    INSTRUMENTS[name] = Instrument(name, unit, kind, meaning, by)
    return INSTRUMENTS[name]


# --- log records and spans

PACKET_EVENT = named(RECORDS, "tcp.packet", "log record of a segment, or of a super-packet")
CONNECTION_SPAN = named(RECORDS, "tcp.connection", "span of one end of a connection")
CONNECTION_SUMMARY = named(
    RECORDS, "tcp.connection.summary", "log record of an open connection that is not silent, every now and then"
)
REQUEST_EVENT = named(RECORDS, "tcp.request", "log record of what one end did for an application's span")
SEVERITIES = ((9, "INFO"), (13, "WARN"))  # of packets: opentelemetry.proto.logs.v1.SeverityNumber, and its text

SYN = named(SPAN_EVENTS, "tcp.syn", "the first SYN without ACK in a direction")
SYN_ACK = named(SPAN_EVENTS, "tcp.syn_ack", "its answer")
ESTABLISHED = named(SPAN_EVENTS, "tcp.established", "the ACK that ends this end's handshake")
FIRST_SENT = named(SPAN_EVENTS, "tcp.first_payload_sent", "the first payload sent")
FIRST_RECEIVED = named(SPAN_EVENTS, "tcp.first_payload_received", "the first payload received")
RETRANSMITTED = named(SPAN_EVENTS, "tcp.retransmit", "a segment that was sent before")
ZERO_WINDOW = named(SPAN_EVENTS, "tcp.zero_window", "an end's window shuts")
FIN = named(SPAN_EVENTS, "tcp.fin", "the first FIN in a direction")
RST = named(SPAN_EVENTS, "tcp.rst", "a RST")

# --- attributes of these

NETWORK_TRANSPORT = attribute("network.transport", STRING, ENDS, "`tcp`")
NETWORK_TYPE = attribute("network.type", STRING, ENDS, "`ipv4`, `ipv6`; IPv4-mapped IPv6 is `ipv4`")
_OF = "of a packet as its headers have it, else the socket's own"
LOCAL_ADDRESS = attribute("network.local.address", STRING, ENDS, f"this end's address: {_OF}")
LOCAL_PORT = attribute("network.local.port", INT, ENDS, f"this end's port: {_OF}")
PEER_ADDRESS = attribute("network.peer.address", STRING, ENDS, f"the other end's address: {_OF}")
PEER_PORT = attribute("network.peer.port", INT, ENDS, f"the other end's port: {_OF}")
_SOCKETS = "the socket's own, where NAT makes the headers differ:"
SOCKET_LOCAL_ADDRESS = attribute("tcp.socket.local.address", STRING, [On.PACKET], f"{_SOCKETS} this end's address")
SOCKET_LOCAL_PORT = attribute("tcp.socket.local.port", INT, [On.PACKET], f"{_SOCKETS} this end's port")
SOCKET_PEER_ADDRESS = attribute("tcp.socket.peer.address", STRING, [On.PACKET], f"{_SOCKETS} the other end's address")
SOCKET_PEER_PORT = attribute("tcp.socket.peer.port", INT, [On.PACKET], f"{_SOCKETS} the other end's port")
CLIENT_ADDRESS = attribute("client.address", STRING, CONNECTION, "of the end that sent the SYN, where that is known")
CLIENT_PORT = attribute("client.port", INT, CONNECTION, "of the end that sent the SYN, where that is known")
SERVER_ADDRESS = attribute(
    "server.address", STRING, [*CONNECTION, On.POINT],
    "of the end that the SYN was sent to, where that is known; of a series only a client's, whose peer has no name",
)  # fmt: skip
SERVER_PORT = attribute(
    "server.port", INT, [*CONNECTION, On.POINT], "of the end that the SYN was sent to, where that is known"
)
IO_DIRECTION = attribute(
    "network.io.direction", STRING, [On.PACKET, On.EVENT, On.POINT], "`transmit`, `receive`, as this end sees it"
)
FLAGS = attribute("tcp.flags", STRING, [On.PACKET], "as in `PUSH\\|ACK`; `null` for no flag")
FLAGS_BITS = attribute("tcp.flags.bits", INT, [On.PACKET], "FIN 1, SYN 2, RST 4, PUSH 8, ACK 16, …, CWR 128")
PAYLOAD_SIZE = attribute(
    "tcp.payload.size", INT, [On.PACKET, On.EVENT], "IP length less IP and TCP headers; of events, where any",
    unit=BYTES,
)  # fmt: skip
SEQ = attribute("tcp.seq", INT, [On.PACKET, On.EVENT], "sequence number")
ACK = attribute("tcp.ack", INT, [On.PACKET], "acknowledgement number")
WINDOW = attribute("tcp.window", INT, [On.PACKET], "as in the header, not scaled")
GSO_SEGMENTS = attribute("tcp.gso.segments", INT, [On.PACKET], "segments in a super-packet, where it is more than one")
GSO_SIZE = attribute("tcp.gso.size", INT, [On.PACKET], "with it: payload of each segment but the last", unit=BYTES)
RETRANSMIT = attribute("tcp.retransmit", BOOLEAN, [On.PACKET], "true of what was sent before, else absent")
DROP_REASON = attribute(
    "tcp.drop.reason", STRING, [On.PACKET, On.POINT], "why a segment was received and dropped, by the kernel's name"
)
RESET_REASON = attribute(
    "tcp.reset.reason",
    STRING,
    [On.EVENT],
    "of `tcp.rst`: why the kernel sent it, by its own name, from Linux 6.10 on",
)
CPU = attribute("cpu.logical_number", INT, [On.PACKET], "where the hook ran; 0 of a capture")
PID = attribute("process.pid", INT, ENDS, "of the socket's owner, in the initial pid namespace, where it is known")
EXECUTABLE_NAME = attribute(
    "process.executable.name", STRING, [*ENDS, On.RESOURCE],
    "of the socket's owner, cut to 15 bytes, where it is known; of a Resource, outside of containers",
)  # fmt: skip
CONNECTION_ID = attribute(
    "tcp.connection.id", STRING, ENDS,
    "16 hex digits: the first half of the connection's own trace id, once both initial sequence numbers are known, or "
    "the one of a SYN that met no socket",
)  # fmt: skip
CONTEXTS = attribute(
    "tcp.contexts", STRINGS, [On.PACKET], "of a packet that reaches over several requests: each, as `traceid-spanid`"
)
INTERLEAVED = attribute(
    "tcp.contexts.interleaved", BOOLEAN, [On.PACKET],
    "true where its connection serves several contexts at a time, and which this is of is not known",
)  # fmt: skip
_TOTALS = [*CONNECTION, On.REQUEST]
_ONCE = "payload, without retransmits"
BYTES_SENT = attribute("tcp.bytes.sent", INT, _TOTALS, _ONCE, unit=BYTES)
BYTES_RECEIVED = attribute("tcp.bytes.received", INT, _TOTALS, _ONCE, unit=BYTES)
PACKETS_SENT = attribute("tcp.packets.sent", INT, _TOTALS, "segments", unit="{packet}")
PACKETS_RECEIVED = attribute("tcp.packets.received", INT, _TOTALS, "segments", unit="{packet}")
RETRANSMITS = attribute("tcp.retransmits", INT, _TOTALS, "segments sent again", unit="{packet}")
TOTALS_SOURCE = attribute(
    "tcp.totals.source", STRING, CONNECTION,
    "`kernel`: from the socket itself; `records`: added up from packets, on top of what the kernel said when it was "
    "last asked",
)  # fmt: skip
RTT_SMOOTHED = attribute("tcp.rtt.smoothed", DOUBLE, CONNECTION, "the kernel's smoothed round-trip time", unit=SECONDS)
RTT_MIN = attribute("tcp.rtt.min", DOUBLE, CONNECTION, "the least round-trip time that the kernel knows", unit=SECONDS)
HANDSHAKE_DURATION = attribute(
    "tcp.handshake.duration", DOUBLE, CONNECTION, "from the first SYN to the end of this end's handshake", unit=SECONDS
)
CLOSE_REASON = attribute(
    "tcp.close.reason", STRING, [On.SPAN, On.POINT], "`fin`, `reset`, `refused`, `timeout`, `unreachable`, `aborted`"
)
CLOSE_INITIATOR = attribute("tcp.close.initiator", STRING, [On.SPAN, On.POINT], "`local` or `peer`")
ERROR_TYPE = attribute(
    "error.type", STRING, [On.SPAN, On.POINT],
    "absent on success; of a connection `connection_refused`, `connection_reset`, `timeout`, `host_unreachable`, "
    "`network_unreachable`; of an export `rejected`, `queue_full`, `retries_exhausted`, `shutdown`, `http_400` …",
)  # fmt: skip
CONNECTION_START = attribute(
    "tcp.connection.start", STRING, CONNECTION, "`observed`, or `inherited`: older than the agent or the capture"
)
CONNECTION_END = attribute("tcp.connection.end", STRING, [On.SPAN], "`observed`, `agent_shutdown`, `evicted`")
ROLE = attribute("tcp.connection.role", STRING, [On.POINT], "`client`, `server`; absent where it is not known")
OVERFLOW = attribute(
    "otel.metric.overflow",
    BOOLEAN,
    [On.POINT],
    "true of the one series for all beyond `metrics.series_limit`, as the specification of metrics has it",
)
CONTEXT_SOURCE = attribute(
    "tcp.context.source", STRING, [On.LINK, On.REQUEST], "`tag`, `traceparent`, `b3`, `published`"
)
CONTEXT_SHARED = attribute("tcp.context.shared", BOOLEAN, [On.LINK], "true where it shared the connection")
CONTEXT_START = attribute("tcp.context.start", INT, [On.LINK], "its beginning, in Unix time", unit=NANOSECONDS)
CONTEXT_END = attribute("tcp.context.end", INT, [On.LINK], "its end, in Unix time", unit=NANOSECONDS)
_RANGE = "of its bytes, counted from the first of the stream"
SENT_START = attribute("tcp.sent.start", INT, [On.LINK, On.REQUEST], f"the first sent {_RANGE}", unit=BYTES)
SENT_END = attribute("tcp.sent.end", INT, [On.LINK, On.REQUEST], f"one past the last sent {_RANGE}", unit=BYTES)
RECEIVED_START = attribute("tcp.received.start", INT, [On.LINK, On.REQUEST], f"the first received {_RANGE}", unit=BYTES)
RECEIVED_END = attribute(
    "tcp.received.end", INT, [On.LINK, On.REQUEST], f"one past the last received {_RANGE}", unit=BYTES
)
REQUEST_DURATION = attribute(
    "tcp.request.duration", DOUBLE, [On.REQUEST], "from its first byte, in whichever direction, to its last packet",
    unit=SECONDS,
)  # fmt: skip
FIRST_BYTE = attribute(
    "tcp.request.time_to_first_byte", DOUBLE, [On.REQUEST], "from its first byte to the first in the other direction",
    unit=SECONDS,
)  # fmt: skip
LAST_ACK = attribute(
    "tcp.request.time_to_last_ack", DOUBLE, [On.REQUEST], "from the first byte sent until the last was acknowledged",
    unit=SECONDS,
)  # fmt: skip
LONGEST_GAP = attribute(
    "tcp.request.longest_gap", DOUBLE, [On.REQUEST], "the longest without a packet of it", unit=SECONDS
)
_PEERS = [*ENDS, On.POINT]
PEER_KIND = attribute(f"{PEER_PREFIX}kind", STRING, _PEERS, "`pod`, `service`, `node`, `external`")
_REAL = "where an address was translated (NAT) on the way: where the peer really is"
REAL_PEER_ADDRESS = attribute(f"{PEER_PREFIX}address", STRING, ENDS, _REAL)
REAL_PEER_PORT = attribute(f"{PEER_PREFIX}port", INT, ENDS, _REAL)
OUTCOME = attribute("tcpio.outcome", STRING, [On.POINT], "`exported`, `filtered`, `sampled`, `dropped`, `in_flight`")
REASON = attribute("tcpio.reason", STRING, [On.POINT], "why packets were filtered or dropped")
FAULT = attribute("tcpio.fault", STRING, [On.POINT], "what went wrong; see below")
COMPONENT = attribute("otel.component.name", STRING, [On.POINT], "which exporter: `tcpio_otel/` and the signal")

# --- the Resource

_WHOSE = [On.RESOURCE]


def _of_resource(name: str, meaning: str, kind: str = STRING, *, of_peer: bool = False) -> str:
    return attribute(name, kind, _WHOSE, meaning, of_peer=of_peer)


HOST_NAME = _of_resource("host.name", "the host's")
HOST_ID = _of_resource("host.id", "the host's `/etc/machine-id`, where there is one")
OS_TYPE = _of_resource("os.type", "`linux`")
SERVICE_NAME = _of_resource(
    "service.name",
    "of a pod: its annotation; with `kubernetes.service_labels` its labels `app.kubernetes.io/instance`, then `name`; "
    "else its Deployment, ReplicaSet, StatefulSet, DaemonSet, CronJob, Job, or its own name. Outside: the systemd "
    "unit's name without its ending, or else the program's, cut to 15 bytes. Of the agent: `resource.service_name`, or "
    "`tcpio-otel`",
    of_peer=True,
)
SERVICE_NAMESPACE = _of_resource("service.namespace", "of a pod: its annotation, or its namespace", of_peer=True)
SERVICE_VERSION = _of_resource(
    "service.version",
    "of a pod: its annotation, with `kubernetes.service_labels` its label `app.kubernetes.io/version`, or its image's "
    "tag and digest. Of the agent: its own",
)
SERVICE_INSTANCE = _of_resource(
    "service.instance.id", "of a pod: its annotation, or namespace, pod and container, with dots between"
)
CONTAINER_ID = _of_resource("container.id", "64 hex digits")
CONTAINER_RUNTIME = _of_resource(
    "container.runtime.name", "`containerd`, `cri-o`, `docker`, `podman`; absent where the cgroup's name does not tell"
)
CONTAINER_IMAGE = _of_resource("container.image.name", "from the container's status, once the kubelet has written it")
POD_UID = _of_resource(
    "k8s.pod.uid",
    "as the API server has it; from a cgroup's name alone, the hash of its file for a static pod",
    of_peer=True,
)
POD_QOS = _of_resource("k8s.pod.qos_class", "`Guaranteed`, `Burstable`, `BestEffort`")
POD_NAME = _of_resource("k8s.pod.name", "the pod's", of_peer=True)
POD_START = _of_resource("k8s.pod.start_time", "when it was started, as the API server writes it")
POD_LABEL = _of_resource("k8s.pod.label.*", "labels that `kubernetes.labels` lists", of_peer=True)
POD_ANNOTATION = _of_resource("k8s.pod.annotation.*", "annotations that `kubernetes.annotations` lists", of_peer=True)
NAMESPACE = _of_resource("k8s.namespace.name", "the pod's; of a peer, its pod's or its Service's", of_peer=True)
NODE = _of_resource("k8s.node.name", "the pod's; of a peer, its pod's or its own", of_peer=True)
CONTAINER_NAME = _of_resource("k8s.container.name", "from the container's status")
CONTAINER_RESTARTS = _of_resource("k8s.container.restart_count", "from the container's status, in decimal")
DEPLOYMENT = _of_resource(
    "k8s.deployment.name", "the owner's owner, by the template's hash in the ReplicaSet's name", of_peer=True
)
REPLICA_SET = _of_resource("k8s.replicaset.name", "the owner", of_peer=True)
STATEFUL_SET = _of_resource("k8s.statefulset.name", "the owner", of_peer=True)
DAEMON_SET = _of_resource("k8s.daemonset.name", "the owner", of_peer=True)
CRON_JOB = _of_resource("k8s.cronjob.name", "the owner's owner, by the time in the Job's name", of_peer=True)
JOB = _of_resource("k8s.job.name", "the owner", of_peer=True)
REPLICATION_CONTROLLER = _of_resource("k8s.replicationcontroller.name", "the owner", of_peer=True)

SERVICE = attribute("k8s.service.name", STRING, (), "the Service that the connection was made to", of_peer=True)

# --- metrics; those of traffic have the attributes of their series beside these

IO = instrument("tcp.io", "By", Kind.SUM, "Payload, without retransmits.", (IO_DIRECTION,))
PACKETS = instrument("tcp.packets", "{packet}", Kind.SUM, "Segments.", (IO_DIRECTION,))
RETRANSMITTED_PACKETS = instrument("tcp.retransmits", "{packet}", Kind.SUM, "Segments that were sent again.")
OPENED = instrument("tcp.connections.opened", "{connection}", Kind.SUM, "Connections that were established.")
CLOSED = instrument("tcp.connections.closed", "{connection}", Kind.SUM, "Connections that ended.", (CLOSE_REASON,))
FAILED = instrument(
    "tcp.connections.failed", "{connection}", Kind.SUM, "Connections that were not established.", (ERROR_TYPE,)
)
RESETS = instrument("tcp.resets", "{connection}", Kind.SUM, "Connections that a RST ended.", (CLOSE_INITIATOR,))
DROPS = instrument("tcp.drops", "{packet}", Kind.SUM, "Segments that were received and dropped.", (DROP_REASON,))
HANDSHAKES = instrument(
    "tcp.handshake.duration", "s", Kind.HISTOGRAM, "From the SYN to the connection being established."
)
ROUND_TRIPS = instrument(
    "tcp.rtt.smoothed",
    "s",
    Kind.HISTOGRAM,
    "The kernel's smoothed round-trip time: at a connection's end, and at each export of those that are not silent.",
)
SEEN = instrument("tcpio.packets.seen", "{packet}", Kind.SUM, "Packets seen.")
OUTCOMES = instrument(
    "tcpio.packets", "{packet}", Kind.UP_DOWN, "What became of them.", (OUTCOME, REASON)
)  # its points add up to SEEN
WRONG = instrument("tcpio.faults", "{fault}", Kind.SUM, "What went wrong without costing a packet.", (FAULT,))
OPEN = instrument("tcpio.connections.open", "{connection}", Kind.GAUGE, "Connections whose span is still owed.")


def _exporter(name: str, unit: str) -> tuple[Instrument, Instrument]:
    return (
        instrument(f"{name}.exported", unit, Kind.SUM, "Items whose export ended.", (COMPONENT, ERROR_TYPE)),
        instrument(f"{name}.inflight", unit, Kind.UP_DOWN, "Items under way.", (COMPONENT,)),
    )


EXPORTED_LOGS, INFLIGHT_LOGS = _exporter("otel.sdk.exporter.log", "{log_record}")
EXPORTED_SPANS, INFLIGHT_SPANS = _exporter("otel.sdk.exporter.span", "{span}")
EXPORTED_POINTS, INFLIGHT_POINTS = _exporter("otel.sdk.exporter.metric_data_point", "{data_point}")

LATE = named(FAULTS, "late", "records delivered out of order")
FACTS_LOST = named(FAULTS, "facts_lost", "records of sockets that found no room in a ring")
RECURSION_MISSES = named(FAULTS, "recursion_misses", "programs skipped because they were running already")
CONTEXTS_LOST = named(FAULTS, "contexts_lost", "trace contexts that found no room in a ring")
CONTEXT_UNKNOWN = named(FAULTS, "context_unknown", "packets whose context was waited for in vain")
TRANSLATIONS_LOST = named(
    FAULTS, "translations_lost", "times that the kernel's messages about translated connections did not fit"
)
TIMESTAMPS_MOVED = named(FAULTS, "timestamps_moved", "lines whose time was taken, for Telegraf alone")
SKIPPED = named(FAULTS, "skipped *", "frames of a capture without a TCP segment, by why")
