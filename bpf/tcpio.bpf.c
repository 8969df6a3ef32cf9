// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/*
 * The probe: one record for every TCP segment that this host's stack sends or receives, in every network namespace.
 *
 * Hooks, and what each of them is for (docs/architecture.md says why these and no kprobe):
 *   cgroup_skb both ways         every segment of every full socket, and of listeners
 *   tp_btf/kfree_skb             segments that a TIME_WAIT or no socket received
 *   tp_btf/net_dev_queue         segments that a TIME_WAIT or no socket sent, where cgroup_skb does not see them
 *   tp_btf/inet_sock_set_state   a socket's totals when it closes
 *   tp_btf/tcp_send_reset        why the kernel sent a RST
 *   cgroup/sock_create           who owns a socket; accepted sockets inherit it from their listener
 *   tp_btf/tcp_rcv_space_adjust  who really reads from it: a pre-forked worker, say
 *   tp_btf/cgroup_mkdir          names of cgroups, for those that are gone before anybody looks
 *   iter/task_file               sockets older than the agent, and all sockets when it stops
 *   cgroup/setsockopt            which trace a connection serves, as the application says (context.h)
 */
#include <stdbool.h>
#include <stddef.h>
#include <linux/bpf.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>
#include "record.h"
#include "packet.h"
#include "filter.h"
#include "kernel.h"

char LICENSE[] SEC("license") = "GPL";

/* Points nowhere: it keeps the record's layout in the object's BTF, where a test compares it with Python's. */
const struct tcpio_record *const tcpio_record_layout = NULL;

#define ETH_P_IPV6 0x86DD

#define SOCKFS_MAGIC 0x534F434B

#define MAX_CPUS 1024
/* How long one pass over one segment can take: what comes later is another segment. The short time is for those that
 * may be alike and come close together, the long one, still below any retransmission timer, allows for a virtual CPU
 * that was made to wait. */
#define PASS_NS 1000000
#define LONG_PASS_NS 50000000

/* Known when the probe is loaded; what is behind one that is false is not verified. */
#define HAS_DROP_REASONS bpf_core_type_exists(enum skb_drop_reason) /* from 5.17 on */
#define HAS_MEMORY_CONTROLLER bpf_core_enum_value_exists(enum cgroup_subsys_id, memory_cgrp_id)
#define MEMORY_CONTROLLER bpf_core_enum_value(enum cgroup_subsys_id, memory_cgrp_id)
/* From 5.11 on, and with it socket storage in tracing programs. */
#define HAS_SOCK_FROM_FILE bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_sock_from_file)

/* Scratch of one CPU, for what one softirq pass over one segment must remember between hooks. */
struct scratch {
	__u64 socket; /* the address of a control socket, on its way to a plain read */
	struct segment {
		__u64 time_ns; /* 0: none */
		__u32 seq;
		__u32 ack;
		__u16 local_port;
		__u16 peer_port;
		__u32 bytes; /* from the IP header on: data can follow an ACK of the same numbers */
	} reply, received;
};

struct ring {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 18);
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, MAX_CPUS);
	__type(key, __u32);
	__array(values, struct ring);
} rings SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, MAX_CPUS);
	__type(key, __u32);
	__type(value, struct tcpio_counters);
} counters SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct tcpio_control);
} control SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} scratches SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC | BPF_F_CLONE);
	__type(key, int);
	__type(value, struct tcpio_owner);
} owners SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1024);
	__type(key, struct tcpio_network);
	__type(value, __u8);
} networks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, struct tcpio_own_key);
	__type(value, __u8);
} own_connections SEC(".maps");

#define MAP(name) (&(name))
#include "hook.h"

static __always_inline bool enter_with_scratch(struct context *context, struct scratch **scratch)
{
	__u32 zero = 0;

	*scratch = bpf_map_lookup_elem(&scratches, &zero);
	return enter(context) && *scratch;
}

/* The socket's own tuple: what the application asked for, whatever NAT makes of it on the wire. */
static __always_inline void fill_tuple(struct tcpio_tuple *tuple, struct sock *sk)
{
	struct inet_sock *inet = (struct inet_sock *)sk;
	struct in6_addr address;

	if (BPF_CORE_READ(sk, __sk_common.skc_family) == AF_INET6) {
		BPF_CORE_READ_INTO(&address, sk, __sk_common.skc_v6_rcv_saddr);
		__builtin_memcpy(tuple->local_address, &address, 16);
		BPF_CORE_READ_INTO(&address, sk, __sk_common.skc_v6_daddr);
		__builtin_memcpy(tuple->peer_address, &address, 16);
	} else {
		tcpio_map_ipv4(tuple->local_address, BPF_CORE_READ(sk, __sk_common.skc_rcv_saddr));
		tcpio_map_ipv4(tuple->peer_address, BPF_CORE_READ(sk, __sk_common.skc_daddr));
	}
	tuple->local_port = __builtin_bswap16(BPF_CORE_READ(inet, inet_sport));
	tuple->peer_port = __builtin_bswap16(BPF_CORE_READ(sk, __sk_common.skc_dport));
	tuple->netns = BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum);
}

/* One look at a socket's numbers; true when none of those that belong together has moved meanwhile. A function of its
 * own, called again and again: the verifier of 6.1 takes no loop with this body. */
static __noinline bool look_at(struct tcpio_record *record, struct tcp_sock *tp)
{
	record->socket.snd_una = BPF_CORE_READ(tp, snd_una);
	record->socket.rcv_nxt = BPF_CORE_READ(tp, rcv_nxt);
	record->socket.snd_nxt = BPF_CORE_READ(tp, snd_nxt);
	record->socket.write_seq = BPF_CORE_READ(tp, write_seq);
	record->socket.bytes_acked = BPF_CORE_READ(tp, bytes_acked);
	record->socket.bytes_received = BPF_CORE_READ(tp, bytes_received);
	record->socket.bytes_sent = BPF_CORE_READ(tp, bytes_sent);
	record->socket.bytes_retransmitted = BPF_CORE_READ(tp, bytes_retrans);
	return record->socket.snd_una == BPF_CORE_READ(tp, snd_una) &&
	       record->socket.rcv_nxt == BPF_CORE_READ(tp, rcv_nxt) &&
	       record->socket.snd_nxt == BPF_CORE_READ(tp, snd_nxt) &&
	       record->socket.bytes_sent == BPF_CORE_READ(tp, bytes_sent);
}

/* A socket's totals and numbers. Other CPUs may be changing them: look until two looks in a row agree on the
 * sequence numbers, so that the initial ones can be computed from them. */
static __always_inline void fill_totals(struct tcpio_record *record, struct tcp_sock *tp)
{
	if (!look_at(record, tp) && !look_at(record, tp) && !look_at(record, tp))
		look_at(record, tp);
	record->socket.segments_in = BPF_CORE_READ(tp, segs_in);
	record->socket.segments_out = BPF_CORE_READ(tp, segs_out);
	record->socket.retransmits = BPF_CORE_READ(tp, total_retrans);
	record->socket.rtt_smoothed_us = BPF_CORE_READ(tp, srtt_us) >> 3; /* the kernel keeps eighths */
	record->socket.rtt_min_us = BPF_CORE_READ(tp, rtt_min.s[0].v);
	record->socket.error = BPF_CORE_READ(tp, inet_conn.icsk_inet.sk.sk_err);
}

static __always_inline void fill_socket(struct tcpio_record *record, struct tcp_sock *tp, __u8 old_state,
					__u8 new_state)
{
	record->kind = TCPIO_SOCKET;
	record->state = new_state;
	record->socket_cookie = BPF_CORE_READ(tp, inet_conn.icsk_inet.sk.__sk_common.skc_cookie.counter);
	fill_tuple(&record->tuple, (struct sock *)tp);
	fill_totals(record, tp);
	record->socket.old_state = old_state;
	record->socket.new_state = new_state;
}

/* A function of its own to spare the stack, as are those further down. */
static __noinline void remember(struct segment *segment, const struct tcpio_headers *headers, __u32 bytes)
{
	segment->time_ns = bpf_ktime_get_boot_ns();
	segment->bytes = bytes;
	segment->seq = headers->seq;
	segment->ack = headers->ack;
	segment->local_port = headers->tuple.local_port;
	segment->peer_port = headers->tuple.peer_port;
}

/* Has this very segment been remembered in this pass? */
static __always_inline bool remembered(const struct segment *segment, const struct tcpio_headers *headers, __u32 bytes,
				       __u64 pass_ns)
{
	return segment->seq == headers->seq && segment->ack == headers->ack && segment->bytes == bytes &&
	       segment->local_port == headers->tuple.local_port && segment->peer_port == headers->tuple.peer_port &&
	       bpf_ktime_get_boot_ns() - segment->time_ns < pass_ns;
}

static __always_inline void forget(struct segment *segment)
{
	segment->time_ns = 0;
}

static __always_inline long load_memory(const void *packet, __u32 offset, void *to, __u32 size)
{
	return bpf_probe_read_kernel(to, size, packet + offset);
}

/* Global functions: the verifier checks each once, and takes what they return for any number. */
__noinline __u32 ipv6_payload_skb(struct __sk_buff *skb, __u8 next)
{
	return tcpio_ipv6_payload(skb, load_skb, next);
}

__noinline __u32 ipv6_payload_memory(__u64 address, __u8 next)
{
	return tcpio_ipv6_payload((const void *)address, load_memory, next);
}

static __always_inline __u32 ipv6_skb(const void *packet, __u8 next)
{
	return ipv6_payload_skb((struct __sk_buff *)packet, next);
}

static __always_inline __u32 ipv6_memory(const void *packet, __u8 next)
{
	return ipv6_payload_memory((__u64)packet, next);
}

/* Functions of their own, so that what they need of the stack is free again when a head is read further down. */
static __noinline bool decode_skb(struct tcpio_headers *headers, __u8 direction, struct __sk_buff *skb)
{
	return tcpio_decode(headers, direction, skb, load_skb, ipv6_skb);
}

static __noinline bool is_wanted(const struct context *context, const struct tcpio_tuple *tuple,
				 const struct tcpio_owner *owner)
{
	return wanted(context, tuple, owner);
}

static __noinline void note_syn(const struct context *context, const struct tcpio_headers *headers,
				const struct tcpio_owner *owner)
{
	note_opening(context, &headers->tuple, owner);
}

static __noinline void name_ends(struct tcpio_tuple *tuple, struct tcp_sock *tp)
{
	fill_tuple(tuple, (struct sock *)tp);
}

static __always_inline bool decode_memory(struct tcpio_headers *headers, __u8 direction, const void *network)
{
	return tcpio_decode(headers, direction, network, load_memory, ipv6_memory);
}

/* Reports a socket that is older than the agent and that no process's files led to: one never accepted, say. */
static __noinline void announce(const struct context *context, struct tcp_sock *tp, const struct tcpio_owner *owner)
{
	__u8 state = BPF_CORE_READ(tp, inet_conn.icsk_inet.sk.__sk_common.skc_state);
	struct tcpio_record *record;
	void *ring;

	record = reserve_fact(context, &ring);
	if (!record)
		return;
	fill_owner(record, owner);
	fill_socket(record, tp, state, state);
	submit(context, ring, record);
}

#include "context.h"

static __always_inline int on_segment(struct __sk_buff *skb, __u8 direction)
{
	bool sent = direction == TCPIO_TRANSMIT;
	struct tcpio_headers headers;
	struct tcpio_record *record;
	struct tcp_sock *tp = NULL;
	struct tcpio_tuple tuple;
	struct tcpio_owner *owner;
	struct context context;
	struct scratch *scratch;
	struct bpf_sock *sk;
	__u16 marks = 0, contexts = 0;
	bool stream;
	void *ring;

	sk = skb->sk;
	if (!sk)
		return 1;
	sk = bpf_sk_fullsock(sk);
	if (!sk)
		return 1;
	/* A raw socket of protocol TCP receives copies of what others receive. What it sends is a segment like any:
	 * the kernel's own control sockets, which send RSTs, are such sockets. */
	stream = sk->type == SOCK_STREAM && sk->protocol == IPPROTO_TCP;
	if (!stream && !sent)
		return 1;
	if (!decode_skb(&headers, direction, skb) || !enter_with_scratch(&context, &scratch))
		return 1;
	owner = bpf_sk_storage_get(&owners, sk, 0, 0);
	if (stream)
		tp = bpf_skc_to_tcp_sock(sk);
	if (!tp) {
		tuple = headers.tuple;
		tuple.netns = BPF_CORE_READ(kernel_socket(scratch, sk), __sk_common.skc_net.net, ns.inum);
		marks = TCPIO_MARK_NO_SOCKET;
	} else if (sk->state == TCP_LISTEN) {
		tuple = headers.tuple;
		tuple.netns = BPF_CORE_READ(tp, inet_conn.icsk_inet.sk.__sk_common.skc_net.net, ns.inum);
		marks = TCPIO_MARK_LISTENER;
		remember(sent ? &scratch->reply : &scratch->received, &headers, skb->len);
	} else {
		name_ends(&tuple, tp);
		if (!sent && !HAS_DROP_REASONS)
			remember(&scratch->received, &headers, skb->len);
		if (!same_ends(&tuple, &headers.tuple))
			marks = TCPIO_MARK_TRANSLATED;
		if (sent && is_retransmit(BPF_CORE_READ(tp, snd_nxt), &headers, skb->len))
			marks |= TCPIO_MARK_RETRANSMIT;
	}
	if (sent && (headers.flags & (FLAG_SYN | FLAG_ACK)) == FLAG_SYN)
		note_syn(&context, &headers, owner);
	if (!is_wanted(&context, &tuple, owner))
		return 1;
	if (tp && owner && !(marks & TCPIO_MARK_LISTENER)) {
		if (context.control->http_headers && may_hold_request(skb, &headers, direction, &owner->stream, tp))
			read_requests(skb, &headers, direction, &owner->stream);
		if (reads_published && sent && skb->len > headers.header_bytes && !(marks & TCPIO_MARK_RETRANSMIT))
			read_published(&context, &headers, tp, owner);
		contexts = owner->contexts;
	}
	record = reserve_packet(&context, &ring, &tuple, &headers, direction, skb->len);
	if (!record)
		return 1;
	record->socket_cookie = bpf_get_socket_cookie(skb);
	record->packet.gso_segments = skb->gso_segs;
	record->packet.gso_size = skb->gso_size;
	record->packet.marks = marks;
	if (tp)
		record->state = sk->state;
	if (owner) {
		fill_owner(record, owner);
		record->packet.contexts = contexts;
	}
	if (!tp)
		remember(&scratch->reply, &headers, skb->len);
	submit(&context, ring, record);

	if (tp && !(marks & TCPIO_MARK_LISTENER) && (!owner || !owner->observed)) {
		owner = bpf_sk_storage_get(&owners, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
		if (owner) {
			owner->observed = 1;
			announce(&context, tp, owner);
		}
	}
	return 1;
}

SEC("cgroup_skb/ingress")
int tcpio_ingress(struct __sk_buff *skb)
{
	return on_segment(skb, TCPIO_RECEIVE);
}

SEC("cgroup_skb/egress")
int tcpio_egress(struct __sk_buff *skb)
{
	return on_segment(skb, TCPIO_TRANSMIT);
}

/* Length from the IP header on: `data` may stand before it (link layer) or behind it (in TCP). */
static __always_inline __u32 packet_bytes(struct sk_buff *skb, const unsigned char *network)
{
	return BPF_CORE_READ(skb, len) + (__u32)(BPF_CORE_READ(skb, data) - network);
}

/* Counts, filters and fills in a segment for which there is only the packet itself to go by. */
static __always_inline struct tcpio_record *reserve_without_socket(const struct context *context, void **ring,
								   struct sk_buff *skb,
								   const struct tcpio_headers *headers, __u32 bytes,
								   __u8 direction)
{
	struct skb_shared_info *shared = (void *)(BPF_CORE_READ(skb, head) + BPF_CORE_READ(skb, end));
	struct tcpio_tuple tuple = headers->tuple;
	struct tcpio_record *record;

	tuple.netns = BPF_CORE_READ(skb, dev, nd_net.net, ns.inum);
	if (!wanted(context, &tuple, NULL))
		return NULL;
	record = reserve_packet(context, ring, &tuple, headers, direction, bytes);
	if (!record)
		return NULL;
	record->packet.gso_segments = BPF_CORE_READ(shared, gso_segs);
	record->packet.gso_size = BPF_CORE_READ(shared, gso_size);
	record->packet.marks = TCPIO_MARK_NO_SOCKET;
	return record;
}

static __always_inline bool within(__u64 address, const __u64 range[2])
{
	return address >= range[0] && address < range[1];
}

/* Was a segment that TCP freed seen at ingress already? A listener's was, and one that went on to a full socket's
 * filter or backlog. Where the kernel gives no reasons, only memory tells. */
static __always_inline bool seen_at_ingress(struct scratch *scratch, const struct tcpio_headers *headers, __u32 bytes,
					    __u32 reason)
{
	if (HAS_DROP_REASONS && (reason == bpf_core_enum_value(enum skb_drop_reason, SKB_DROP_REASON_SOCKET_FILTER) ||
				 reason == bpf_core_enum_value(enum skb_drop_reason, SKB_DROP_REASON_SOCKET_BACKLOG)))
		return true;
	if (!remembered(&scratch->received, headers, bytes, LONG_PASS_NS))
		return false;
	forget(&scratch->received);
	return true;
}

/* A segment that TCP received and freed: left are those that met a TIME_WAIT socket, none at all, or a wrong
 * checksum. */
SEC("tp_btf/kfree_skb")
int BPF_PROG(tcpio_drop, struct sk_buff *skb, void *location)
{
	__u32 reason = HAS_DROP_REASONS ? (__u32)ctx[2] : 0;
	struct tcpio_headers headers;
	struct tcpio_record *record;
	struct context context;
	struct scratch *scratch;
	unsigned char *network;
	__u32 bytes;
	void *ring;

	if (!enter_with_scratch(&context, &scratch))
		return 0;
	if (!within((__u64)location, context.control->tcp_v4_rcv) &&
	    !within((__u64)location, context.control->tcp_v6_rcv))
		return 0;
	network = BPF_CORE_READ(skb, head) + BPF_CORE_READ(skb, network_header);
	if (!decode_memory(&headers, TCPIO_RECEIVE, network))
		return 0;
	bytes = packet_bytes(skb, network);
	if (seen_at_ingress(scratch, &headers, bytes, reason))
		return 0;
	record = reserve_without_socket(&context, &ring, skb, &headers, bytes, TCPIO_RECEIVE);
	if (!record)
		return 0;
	record->packet.marks |= TCPIO_MARK_DROPPED;
	record->packet.drop_reason = reason;
	/* The reply, a RST say, is sent before the segment is freed; on the wire the segment came first. */
	if (scratch->reply.local_port == headers.tuple.local_port &&
	    scratch->reply.peer_port == headers.tuple.peer_port && record->time_ns - scratch->reply.time_ns < PASS_NS)
		record->time_ns = scratch->reply.time_ns - 1;
	forget(&scratch->reply);
	submit(&context, ring, record);
	return 0;
}

/* From 6.13 on an IPv6 reply that the kernel's control socket sends, a RST say, is attached to the socket that it
 * answers for, so that cgroup_skb is not run on it. */
static __always_inline bool replies_for(const struct context *context, struct sk_buff *skb)
{
	return context->control->sock_edemux &&
	       (__u64)BPF_CORE_READ(skb, destructor) == context->control->sock_edemux &&
	       BPF_CORE_READ(skb, protocol) == __builtin_bswap16(ETH_P_IPV6);
}

/* Before 6.11 cgroup_skb is not run on an IPv6 SYN-ACK that answers for a request socket. Whether it is here shows with
 * the first of them that comes by. */
static __always_inline bool answers_unseen(const struct context *context, const struct scratch *scratch,
					   struct sk_buff *skb, const struct tcpio_headers *headers, __u32 bytes)
{
	if (BPF_CORE_READ(skb, protocol) != __builtin_bswap16(ETH_P_IPV6))
		return false;
	if (remembered(&scratch->reply, headers, bytes, LONG_PASS_NS))
		context->control->sees_syn_acks = 1;
	return !context->control->sees_syn_acks;
}

SEC("tp_btf/net_dev_queue")
int BPF_PROG(tcpio_queue, struct sk_buff *skb)
{
	struct sock *sk = BPF_CORE_READ(skb, sk);
	struct tcpio_headers headers;
	struct tcpio_record *record;
	struct context context;
	struct scratch *scratch;
	unsigned char *network;
	__u8 state = 0;
	__u32 bytes;
	void *ring;

	if (!enter_with_scratch(&context, &scratch))
		return 0;
	if (sk) {
		state = BPF_CORE_READ(sk, __sk_common.skc_state);
		if (state != TCP_TIME_WAIT && state != TCP_NEW_SYN_RECV && !replies_for(&context, skb))
			return 0;
	} else if (BPF_CORE_READ(skb, skb_iif)) {
		return 0; /* forwarded */
	}
	network = BPF_CORE_READ(skb, head) + BPF_CORE_READ(skb, network_header);
	if (!decode_memory(&headers, TCPIO_TRANSMIT, network))
		return 0;
	bytes = packet_bytes(skb, network);
	if (state == TCP_NEW_SYN_RECV && !answers_unseen(&context, scratch, skb, &headers, bytes))
		return 0;
	/* Older kernels show it at egress as well, and a stacked device queues it again. */
	if (remembered(&scratch->reply, &headers, bytes, PASS_NS))
		return 0;
	record = reserve_without_socket(&context, &ring, skb, &headers, bytes, TCPIO_TRANSMIT);
	if (!record)
		return 0;
	record->state = state;
	if (state == TCP_NEW_SYN_RECV)
		record->packet.marks = TCPIO_MARK_LISTENER;
	remember(&scratch->reply, &headers, bytes);
	submit(&context, ring, record);
	return 0;
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(tcpio_state, struct sock *sk, int old_state, int new_state)
{
	struct tcpio_owner *owner = NULL;
	struct tcpio_record *record;
	struct tcpio_tuple tuple;
	struct context context;
	struct tcp_sock *tp;
	void *ring;

	if (new_state != TCP_CLOSE || old_state == TCP_LISTEN || sk->sk_protocol != IPPROTO_TCP)
		return 0;
	tp = bpf_skc_to_tcp_sock(sk);
	if (!tp || !enter(&context))
		return 0;
	if (HAS_SOCK_FROM_FILE)
		owner = bpf_sk_storage_get(&owners, sk, 0, 0);
	fill_tuple(&tuple, sk);
	if (!wanted_fact(&context, &tuple, owner))
		return 0;
	record = reserve_fact(&context, &ring);
	if (!record)
		return 0;
	fill_socket(record, tp, old_state, new_state);
	record->socket.fin_received = sk->__sk_common.skc_flags >> bpf_core_enum_value(enum sock_flags, SOCK_DONE) & 1;
	if (owner)
		fill_owner(record, owner);
	submit(&context, ring, record);
	return 0;
}

SEC("tp_btf/tcp_send_reset")
int BPF_PROG(tcpio_reset, struct sock *sk, struct sk_buff *skb, int reason)
{
	struct tcpio_record *record;
	struct tcpio_tuple tuple;
	struct context context;
	void *ring;
	__u8 state;

	if (!sk)
		return 0;
	state = BPF_CORE_READ(sk, __sk_common.skc_state);
	if (state == TCP_TIME_WAIT || state == TCP_NEW_SYN_RECV || state == TCP_LISTEN || !enter(&context))
		return 0;
	fill_tuple(&tuple, sk);
	if (!wanted_fact(&context, &tuple, NULL))
		return 0;
	record = reserve_fact(&context, &ring);
	if (!record)
		return 0;
	record->kind = TCPIO_RESET;
	record->state = state;
	record->tuple = tuple;
	record->socket.reason = reason;
	submit(&context, ring, record);
	return 0;
}

SEC("tp_btf/cgroup_mkdir")
int BPF_PROG(tcpio_cgroup, struct cgroup *cgroup)
{
	int unified = !BPF_CORE_READ(cgroup, root, hierarchy_id);
	struct tcpio_record *record;
	struct context context;
	void *ring;
	__u32 id, parent;

	if (!unified &&
	    (!HAS_MEMORY_CONTROLLER || !(BPF_CORE_READ(cgroup, root, subsys_mask) >> MEMORY_CONTROLLER & 1)))
		return 0;
	if (!enter(&context))
		return 0;
	record = reserve_fact(&context, &ring);
	if (!record)
		return 0;
	id = BPF_CORE_READ(cgroup, kn, id);
	parent = BPF_CORE_READ(cgroup, self.parent, cgroup, kn, id);
	record->kind = TCPIO_CGROUP;
	record->state = unified ? TCPIO_UNIFIED : TCPIO_MEMORY;
	record->socket_cookie = (__u64)parent << 32 | id;
	bpf_probe_read_kernel_str(record->made.cgroup_name, sizeof(record->made.cgroup_name),
				  BPF_CORE_READ(cgroup, kn, name));
	submit(&context, ring, record);
	return 0;
}

/* The executable's basename; the command name where there is no executable to name (a kernel thread). */
static __always_inline void name_process(struct tcpio_owner *owner, struct task_struct *task)
{
	const unsigned char *name = BPF_CORE_READ(task, mm, exe_file, f_path.dentry, d_name.name);

	if (!name || bpf_probe_read_kernel_str(owner->name, sizeof(owner->name), name) <= 0)
		BPF_CORE_READ_INTO(&owner->name, task, comm);
}

/* Where a task stands in the unified tree, and in the memory controller's own, where that is one of cgroup v1. */
static __always_inline void place_process(struct tcpio_owner *owner, struct task_struct *task)
{
	struct css_set *set = BPF_CORE_READ(task, cgroups);
	struct cgroup_subsys_state *memory = NULL;
	struct cgroup *cgroup;
	__u32 v1 = 0;

	if (HAS_MEMORY_CONTROLLER) {
		bpf_probe_read_kernel(&memory, sizeof(memory),
				      (void *)set + bpf_core_field_offset(struct css_set, subsys) +
					      MEMORY_CONTROLLER * sizeof(memory));
		cgroup = BPF_CORE_READ(memory, cgroup);
		if (BPF_CORE_READ(cgroup, root, hierarchy_id))
			v1 = BPF_CORE_READ(cgroup, kn, id);
	}
	owner->cgroup = BPF_CORE_READ(set, dfl_cgrp, kn, id);
	owner->cgroup_v1 = v1;
	owner->placed = (__u64)set;
}

SEC("cgroup/sock_create")
int tcpio_create(struct bpf_sock *sk)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	struct tcpio_owner *owner;

	if (sk->type != SOCK_STREAM || sk->protocol != IPPROTO_TCP)
		return 1;
	owner = bpf_sk_storage_get(&owners, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!owner)
		return 1;
	owner->pid = bpf_get_current_pid_tgid() >> 32;
	owner->observed = 1;
	name_process(owner, task);
	place_process(owner, task);
	return 1;
}

SEC("tp_btf/tcp_rcv_space_adjust")
int BPF_PROG(tcpio_read, struct sock *sk)
{
	__u32 pid = bpf_get_current_pid_tgid() >> 32;
	struct task_struct *task;
	struct tcpio_owner *owner;

	if (!HAS_SOCK_FROM_FILE)
		return 0;
	owner = bpf_sk_storage_get(&owners, sk, 0, 0);
	if (!owner || !pid)
		return 0;
	task = (struct task_struct *)bpf_get_current_task();
	if (owner->pid == pid && owner->placed == (__u64)BPF_CORE_READ(task, cgroups))
		return 0;
	if (!BPF_CORE_READ(task, mm))
		return 0; /* a kernel thread reads on somebody's behalf */
	owner->pid = pid;
	name_process(owner, task);
	place_process(owner, task);
	return 0;
}

/* The socket behind a file, by its inode; NULL when it is none. */
static __always_inline struct sock *socket_of(struct file *file)
{
	struct inode *inode = BPF_CORE_READ(file, f_inode);
	struct socket_alloc *both;

	if (BPF_CORE_READ(inode, i_sb, s_magic) != SOCKFS_MAGIC)
		return NULL;
	both = (void *)inode - bpf_core_field_offset(struct socket_alloc, vfs_inode);
	return BPF_CORE_READ(both, socket.sk);
}

/* Writes a snapshot of every connected socket that a process holds to whoever reads the iterator. The agent reads
 * it when it starts, for connections older than itself, and when it stops, for those still open. */
SEC("iter/task_file")
int tcpio_snapshot(struct bpf_iter__task_file *ctx)
{
	struct task_struct *task = ctx->task;
	struct file *file = ctx->file;
	struct tcpio_record record = {};
	struct tcpio_owner holder = {};
	struct tcpio_owner *owner = NULL;
	struct context context;
	struct socket *socket;
	struct sock *sk;
	__u8 state;

	if (!file)
		return 0;
	if (!task)
		return 0;
	if (!enter(&context))
		return 0;
	context.control->agent_tgid = bpf_get_current_pid_tgid() >> 32;
	sk = socket_of(file);
	if (!sk || BPF_CORE_READ(sk, sk_protocol) != IPPROTO_TCP || BPF_CORE_READ(sk, sk_type) != SOCK_STREAM)
		return 0;
	holder.pid = task->tgid;
	holder.observed = 1;
	name_process(&holder, task);
	place_process(&holder, task);
	if (HAS_SOCK_FROM_FILE) {
		socket = bpf_sock_from_file(file);
		if (socket && socket->sk)
			owner = bpf_sk_storage_get(&owners, socket->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
		if (owner && !owner->pid)
			*owner = holder;
	}
	if (!owner)
		owner = &holder;
	state = BPF_CORE_READ(sk, __sk_common.skc_state);
	if (state == TCP_LISTEN || state == TCP_CLOSE || state == TCP_SYN_SENT || state == TCP_SYN_RECV)
		return 0;
	record.time_ns = bpf_ktime_get_boot_ns();
	record.cpu = context.cpu;
	fill_socket(&record, (struct tcp_sock *)sk, state, state);
	fill_owner(&record, owner);
	if (wanted_fact(&context, &record.tuple, owner))
		bpf_seq_write(ctx->meta->seq, &record, sizeof(record));
	return 0;
}
