/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * The record that the probe writes and Python reads: the wire contract between them.
 *
 * Every kind has the same size, so that a drained stretch of ring buffer is one array. tcpio_otel/batch.py holds
 * the same layout as a NumPy dtype; a test compares the two through the object's BTF. docs/record.md explains
 * each field. Change TCPIO_RECORD_VERSION with any change of layout or meaning.
 */
#ifndef TCPIO_RECORD_H
#define TCPIO_RECORD_H

#define TCPIO_RECORD_VERSION 4

enum tcpio_kind {
	TCPIO_PACKET = 1,  /* one segment or GSO super-packet: union member packet */
	TCPIO_SOCKET = 2,  /* a socket's own totals, at a change of state or on request: union member socket */
	TCPIO_RESET = 3,   /* the kernel decided to send RST and said why: union member socket, reason only */
	TCPIO_CONTEXT = 4, /* a trace context begins on a connection: union member context */
	TCPIO_CGROUP = 5,  /* a cgroup was made: union member made; the cookie holds its id and, in the upper half, its
			      parent's; the state is enum tcpio_hierarchy */
	TCPIO_LOOK = 6,	   /* made by the reader of TCPIO_SOCKET: a socket that it has looked at again */
};

/* Where a context is known from. */
enum tcpio_origin {
	TCPIO_ORIGIN_TAG = 1,	      /* the application said so, by the socket option */
	TCPIO_ORIGIN_TRACEPARENT = 2, /* the head of an HTTP request */
	TCPIO_ORIGIN_B3 = 3,	      /* likewise */
	TCPIO_ORIGIN_PUBLISHED =
		4, /* the map in which OpenTelemetry eBPF Instrumentation publishes threads' contexts */
};

enum tcpio_context_mark {
	TCPIO_CONTEXT_SHARED =
		1 << 0, /* one of several that the connection serves at a time: it has no bytes of its own */
	TCPIO_CONTEXT_EARLY = 1 << 1, /* before the handshake was complete: it begins where the connection does */
};

enum tcpio_hierarchy {
	TCPIO_UNIFIED = 0,
	TCPIO_MEMORY = 1, /* of cgroup v1 */
};

enum tcpio_direction {
	TCPIO_RECEIVE = 0,
	TCPIO_TRANSMIT = 1,
};

enum tcpio_mark {
	TCPIO_MARK_RETRANSMIT = 1 << 0, /* carries sequence numbers that were sent before */
	TCPIO_MARK_DROPPED = 1 << 1,	/* received, then freed by TCP without reaching a full socket */
	TCPIO_MARK_TRANSLATED = 1 << 2, /* the headers' tuple differs from the socket's: NAT between them */
	TCPIO_MARK_LISTENER = 1 << 3,	/* the socket at hand was a listener: the tuple is the headers' */
	TCPIO_MARK_NO_SOCKET = 1 << 4,	/* no full socket: TIME_WAIT (state 6) or none (state 0) */
};

/* Addresses are 16 bytes in network order, IPv4 as ::ffff:a.b.c.d; everything else is in host order. */
struct tcpio_tuple {
	__u8 local_address[16];
	__u8 peer_address[16];
	__u16 local_port;
	__u16 peer_port;
	__u32 netns; /* inode number of the network namespace; 0: unknown */
};

struct tcpio_record {
	__u64 time_ns;		  /* boot clock */
	__u64 socket_cookie;	  /* 0: unknown */
	struct tcpio_tuple tuple; /* the connection's key: the socket's own tuple, whatever NAT makes of it */
	__u32 pid;		  /* thread group id in the initial namespace; 0: unknown */
	__u16 cpu;
	__u8 kind;
	__u8 state;	       /* TCP state of the socket at hand; 0: none */
	__u8 process_name[16]; /* basename of the executable, NUL-padded; command name where that is unreadable */
	union {
		struct {
			__u32 seq;
			__u32 ack;
			__u32 payload_bytes;
			__u16 window;	    /* as in the header, not scaled */
			__u16 gso_segments; /* 0 or 1: a single segment */
			__u8 flags;	    /* header byte 13: FIN SYN RST PSH ACK URG ECE CWR from bit 0 up */
			__u8 direction;
			__u16 marks;
			__u16 drop_reason; /* enum skb_drop_reason of the running kernel; 0: none */
			__u16 gso_size;	   /* payload bytes of each segment but the last; 0: a single segment */
			__u16 header_local_port;
			__u16 header_peer_port;
			__u16 contexts; /* how many the socket has had by then, modulo 2^16 */
			__u16 reserved;
			__u8 header_local_address[16];
			__u8 header_peer_address[16];
			__u64 more_reserved;
			__u32 cgroup; /* of the socket's process in the unified tree: its id's lower half; 0: unknown */
			__u32 cgroup_v1; /* likewise in the tree of cgroup v1's memory controller, where there is one */
		} packet;
		struct {
			__u64 bytes_acked;    /* counts SYN (client) and FIN */
			__u64 bytes_received; /* counts FIN */
			__u64 bytes_sent;     /* payload, retransmits included */
			__u64 bytes_retransmitted;
			__u32 snd_una;
			__u32 snd_nxt;
			__u32 write_seq;
			__u32 rcv_nxt;
			__u32 segments_in;
			__u32 segments_out;
			__u32 retransmits; /* segments */
			__u32 rtt_smoothed_us;
			__u32 rtt_min_us;
			__u8 old_state;
			__u8 new_state; /* equal to old_state: a snapshot, not a change */
			__u8 error;	/* sk_err: errno of the failure, 0: none */
			union {
				__u8 reason;	   /* kind RESET: enum sk_rst_reason of the running kernel; 0: none */
				__u8 fin_received; /* kind SOCKET, where it closes: 1: the peer's FIN was; 0: not, or
						      unknown */
			};
			__u32 cgroup; /* as with a packet */
			__u32 cgroup_v1;
		} socket;
		struct {
			__u8 trace_id[16]; /* all zero: from here on the connection is in no known context */
			__u8 span_id[8];
			__u32 sent_seq;	    /* where it begins in what this end sends */
			__u32 received_seq; /* and in what it receives */
			__u16 serial;	    /* counts the socket's contexts from 1 on: a gap tells that one was lost */
			__u8 origin;	    /* enum tcpio_origin */
			__u8 context_marks; /* enum tcpio_context_mark */
			__u32 reserved;
		} context;
		struct {
			__u8 cgroup_name[80]; /* of its directory, NUL-terminated, cut if it is longer */
		} made;
	};
};

/* Counters of one CPU, in memory that Python maps: seen = submitted + filtered_* + lost, for packets. */
struct tcpio_counters {
	__u64 seen;
	__u64 submitted;
	__u64 filtered_port;
	__u64 filtered_cidr;
	__u64 filtered_own;
	__u64 lost;	  /* packet records for which the ring had no room */
	__u64 lost_facts; /* records of other kinds for which the ring had no room */
	__u64 filtered_netns;
};

#endif
