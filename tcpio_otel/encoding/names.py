"""Every name that leaves the agent: scope, events, attributes; the semantic conventions' as they stand there."""

from tcpio_otel import __version__

SCHEMA_URL = "https://opentelemetry.io/schemas/1.44.0"
SCOPE = "tcpio_otel"
SCOPE_VERSION = __version__

PACKET_EVENT = "tcp.packet"
CONNECTION_SPAN = "tcp.connection"
CONNECTION_SUMMARY = "tcp.connection.summary"
REQUEST_EVENT = "tcp.request"
SEVERITIES = ((9, "INFO"), (13, "WARN"))  # of packets: opentelemetry.proto.logs.v1.SeverityNumber, and its text

# OpenTelemetry semantic conventions 1.44
CLIENT_ADDRESS, CLIENT_PORT = "client.address", "client.port"
SERVER_ADDRESS, SERVER_PORT = "server.address", "server.port"
CPU = "cpu.logical_number"
ERROR_TYPE = "error.type"
IO_DIRECTION = "network.io.direction"
LOCAL_ADDRESS, LOCAL_PORT = "network.local.address", "network.local.port"
PEER_ADDRESS, PEER_PORT = "network.peer.address", "network.peer.port"
NETWORK_TRANSPORT, NETWORK_TYPE = "network.transport", "network.type"
EXECUTABLE_NAME, PID = "process.executable.name", "process.pid"

# Ours: no semantic convention covers TCP yet
SOCKET_LOCAL_ADDRESS, SOCKET_LOCAL_PORT = "tcp.socket.local.address", "tcp.socket.local.port"
SOCKET_PEER_ADDRESS, SOCKET_PEER_PORT = "tcp.socket.peer.address", "tcp.socket.peer.port"
FLAGS, FLAGS_BITS = "tcp.flags", "tcp.flags.bits"
PAYLOAD_SIZE, SEQ, ACK, WINDOW = "tcp.payload.size", "tcp.seq", "tcp.ack", "tcp.window"
GSO_SEGMENTS, GSO_SIZE = "tcp.gso.segments", "tcp.gso.size"
RETRANSMIT, DROP_REASON = "tcp.retransmit", "tcp.drop.reason"
RESET_REASON = "tcp.reset.reason"
CONNECTION_ID = "tcp.connection.id"
CONNECTION_START, CONNECTION_END = "tcp.connection.start", "tcp.connection.end"
BYTES_SENT, BYTES_RECEIVED = "tcp.bytes.sent", "tcp.bytes.received"
PACKETS_SENT, PACKETS_RECEIVED = "tcp.packets.sent", "tcp.packets.received"
RETRANSMITS = "tcp.retransmits"
RTT_SMOOTHED, RTT_MIN = "tcp.rtt.smoothed", "tcp.rtt.min"
HANDSHAKE_DURATION = "tcp.handshake.duration"
CLOSE_INITIATOR, CLOSE_REASON = "tcp.close.initiator", "tcp.close.reason"
TOTALS_SOURCE = "tcp.totals.source"
CONTEXT_SOURCE, CONTEXT_SHARED = "tcp.context.source", "tcp.context.shared"
CONTEXT_START, CONTEXT_END = "tcp.context.start", "tcp.context.end"
CONTEXTS, INTERLEAVED = "tcp.contexts", "tcp.contexts.interleaved"
PEER_PREFIX, PEER_KIND = "tcp.peer.", "tcp.peer.kind"
REAL_PEER_ADDRESS, REAL_PEER_PORT = "tcp.peer.address", "tcp.peer.port"
ROLE, OVERFLOW = "tcp.connection.role", "otel.metric.overflow"
SENT_START, SENT_END = "tcp.sent.start", "tcp.sent.end"
RECEIVED_START, RECEIVED_END = "tcp.received.start", "tcp.received.end"
REQUEST_DURATION, FIRST_BYTE = "tcp.request.duration", "tcp.request.time_to_first_byte"
LAST_ACK, LONGEST_GAP = "tcp.request.time_to_last_ack", "tcp.request.longest_gap"
