// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/*
 * The probe for kernels without BTF: the same records from UAPI structures alone. BCC compiles it on the host that runs
 * it; tcpio_otel/capture/bcc.py makes the maps, and puts their descriptors where MAP stands.
 *
 * Hooks, and what each of them is for:
 *   cgroup_skb both ways   every segment of every full socket, and of listeners
 *   cgroup/sock_create     who owns a socket; accepted sockets inherit it from their listener
 *   sockops                who opened a connection, and a socket's totals when it closes
 *
 * What tcpio.bpf.c sees by BTF tracepoints goes unseen here; docs/limitations.md lists it.
 */
#include <linux/types.h>
#include <linux/bpf.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include "record.h"
#include "packet.h"
#include "filter.h"

/* In the order of tcpio_otel/capture/bcc.py: a load of map n becomes one of the descriptor of the nth map. */
enum map {
	MAP_rings,
	MAP_counters,
	MAP_control,
	MAP_owners,
	MAP_networks,
	MAP_own_connections,
};

#define MAP(name) ((void *)bpf_pseudo_fd(1, MAP_##name))
#include "hook.h"

#define FIN_WAIT1 4
#define FIN_WAIT2 5
#define LAST_ACK 9
#define CLOSING 11

static __always_inline __u32 ipv6_skb(const void *packet, __u8 next)
{
	return tcpio_ipv6_payload(packet, load_skb, next);
}

/* Where no helper tells a packet's namespace, its socket's owner does. */
static __always_inline __u32 netns_of(void *context, const struct tcpio_owner *owner)
{
	if (owner && owner->netns)
		return owner->netns;
#ifdef HAS_NETNS_COOKIE
	return bpf_get_netns_cookie(context);
#else
	return 0;
#endif
}

/* Word by word, and not to be joined: a wider copy is arithmetic on a socket pointer to the verifier. */
static __always_inline void copy_address(__u8 to[16], volatile const __u32 from[4])
{
	__u32 words[4] = { from[0], from[1], from[2], from[3] };

	__builtin_memcpy(to, words, sizeof(words));
}

static __always_inline void fill_tuple(struct tcpio_tuple *tuple, struct bpf_sock *sk, __u32 netns)
{
	if (sk->family == AF_INET6) {
		copy_address(tuple->local_address, sk->src_ip6);
		copy_address(tuple->peer_address, sk->dst_ip6);
	} else {
		tcpio_map_ipv4(tuple->local_address, sk->src_ip4);
		tcpio_map_ipv4(tuple->peer_address, sk->dst_ip4);
	}
	tuple->local_port = sk->src_port;
	tuple->peer_port = __builtin_bswap16(sk->dst_port);
	tuple->netns = netns;
}

/* Bytes are told as payload that went out, since the kernel's own count of it is not to be had here: acknowledged and
 * under way, less the SYN of who opened the connection and the FIN of who is done. */
static __always_inline void fill_totals(struct tcpio_record *record, struct bpf_tcp_sock *tcp, __u32 snd_nxt,
					__u8 state, __u32 role)
{
	bool fin = state == FIN_WAIT1 || state == FIN_WAIT2 || state == LAST_ACK || state == CLOSING;

	record->socket.snd_una = tcp->snd_una;
	record->socket.snd_nxt = snd_nxt;
	record->socket.write_seq = snd_nxt;
	record->socket.rcv_nxt = tcp->rcv_nxt;
	record->socket.bytes_acked = tcp->bytes_acked;
	record->socket.bytes_received = tcp->bytes_received;
	record->socket.bytes_sent = record->socket.bytes_acked + (__u32)(snd_nxt - record->socket.snd_una) -
				    (role == TCPIO_ROLE_CLIENT) - fin;
	record->socket.segments_in = tcp->segs_in;
	record->socket.segments_out = tcp->segs_out;
	record->socket.retransmits = tcp->total_retrans;
	record->socket.rtt_smoothed_us = tcp->srtt_us >> 3; /* the kernel keeps eighths */
	record->socket.rtt_min_us = tcp->rtt_min;
}

/* Reports a socket that is older than the agent, or whose SYN-ACK may have gone unseen, while the kernel sends this
 * segment of it: nothing else moves then. */
static __always_inline void announce(const struct context *context, struct __sk_buff *skb,
				     const struct tcpio_tuple *tuple, const struct tcpio_headers *headers,
				     struct bpf_tcp_sock *tcp, __u8 state, const struct tcpio_owner *owner)
{
	struct tcpio_record *record;
	__u32 end, snd_nxt;
	void *ring;

	record = reserve_fact(context, &ring);
	if (!record)
		return;
	end = headers->seq + skb->len - headers->header_bytes + !!(headers->flags & FLAG_FIN);
	snd_nxt = tcp->snd_nxt;
	if ((__s32)(end - snd_nxt) > 0)
		snd_nxt = end;
	record->kind = TCPIO_SOCKET;
	record->state = state;
	record->tuple = *tuple;
	record->socket_cookie = bpf_get_socket_cookie(skb);
	fill_owner(record, owner);
	fill_totals(record, tcp, snd_nxt, state, owner->role);
	record->socket.old_state = state;
	record->socket.new_state = state;
	submit(context, ring, record);
}

static __always_inline int on_segment(struct __sk_buff *skb, __u8 direction)
{
	bool sent = direction == TCPIO_TRANSMIT;
	struct tcpio_headers headers = {};
	struct bpf_tcp_sock *tcp = NULL;
	struct tcpio_record *record;
	struct tcpio_owner *owner;
	struct context context;
	struct tcpio_tuple tuple;
	struct bpf_sock *sk;
	__u8 state = 0;
	__u16 marks = 0;
	bool stream;
	void *ring;

	sk = skb->sk;
	if (!sk)
		return 1;
	sk = bpf_sk_fullsock(sk);
	if (!sk)
		return 1;
	stream = sk->type == SOCK_STREAM && sk->protocol == IPPROTO_TCP;
	if (!stream && !sent)
		return 1;
	if (!tcpio_decode(&headers, direction, skb, load_skb, ipv6_skb) || !enter(&context))
		return 1;
	owner = bpf_sk_storage_get(MAP(owners), sk, 0, 0);
	tuple = headers.tuple;
	tuple.netns = netns_of(skb, owner);
	if (stream) {
		state = sk->state;
		tcp = bpf_tcp_sock(sk);
	}
	if (!stream) {
		marks = TCPIO_MARK_NO_SOCKET;
	} else if (state == TCP_LISTEN) {
		marks = TCPIO_MARK_LISTENER;
	} else {
		fill_tuple(&tuple, sk, tuple.netns);
		if (!tuple.local_port) /* a closed socket has given it back, and sends its RST after that */
			tuple.local_port = headers.tuple.local_port;
		if (!same_ends(&tuple, &headers.tuple))
			marks = TCPIO_MARK_TRANSLATED;
		if (sent && tcp && is_retransmit(tcp->snd_nxt, &headers, skb->len))
			marks |= TCPIO_MARK_RETRANSMIT;
	}
	if (sent && (headers.flags & (FLAG_SYN | FLAG_ACK)) == FLAG_SYN)
		note_opening(&context, &headers.tuple, owner);
	if (!wanted(&context, &tuple, owner))
		return 1;
	if (sent && tcp && state != TCP_LISTEN && owner && !owner->observed && owner->role) {
		owner->observed = 1;
		announce(&context, skb, &tuple, &headers, tcp, state, owner);
	}
	record = reserve_packet(&context, &ring, &tuple, &headers, direction, skb->len);
	if (!record)
		return 1;
	record->socket_cookie = bpf_get_socket_cookie(skb);
	record->packet.gso_segments = skb->gso_segs;
	record->packet.gso_size = skb->gso_size;
	record->packet.marks = marks;
	record->state = state;
	if (owner)
		fill_owner(record, owner);
	submit(&context, ring, record);
	return 1;
}

int tcpio_ingress(struct __sk_buff *skb)
{
	return on_segment(skb, TCPIO_RECEIVE);
}

int tcpio_egress(struct __sk_buff *skb)
{
	return on_segment(skb, TCPIO_TRANSMIT);
}

int tcpio_create(struct bpf_sock *sk)
{
	struct tcpio_owner *owner;

	if (sk->type != SOCK_STREAM || sk->protocol != IPPROTO_TCP)
		return 1;
	owner = bpf_sk_storage_get(MAP(owners), sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!owner)
		return 1;
	owner->pid = bpf_get_current_pid_tgid() >> 32;
	owner->observed = 1;
	owner->netns = bpf_get_netns_cookie(sk);
	owner->cgroup = bpf_get_current_cgroup_id();
	bpf_get_current_comm(owner->name, sizeof(owner->name));
	return 1;
}

static __always_inline void close(struct bpf_sock_ops *ops, struct bpf_sock *sk, const struct tcpio_owner *owner,
				  __u8 old_state)
{
	struct bpf_tcp_sock *tcp = bpf_tcp_sock(sk);
	struct tcpio_record *record;
	struct context context;
	struct tcpio_tuple tuple;
	void *ring;

	if (!tcp || !enter(&context))
		return;
	fill_tuple(&tuple, sk, netns_of(ops, owner));
	if (!wanted_fact(&context, &tuple, owner))
		return;
	record = reserve_fact(&context, &ring);
	if (!record)
		return;
	record->kind = TCPIO_SOCKET;
	record->state = TCP_CLOSE;
	record->tuple = tuple;
	record->socket_cookie = bpf_get_socket_cookie(ops);
	if (owner)
		fill_owner(record, owner);
	fill_totals(record, tcp, tcp->snd_nxt, old_state, owner ? owner->role : 0);
	record->socket.old_state = old_state;
	record->socket.new_state = TCP_CLOSE;
	submit(&context, ring, record);
}

/* Never sets `reply`, and always returns 1: what others' programs answer stands. */
int tcpio_ops(struct bpf_sock_ops *ops)
{
	__u32 operation = ops->op;
	struct tcpio_owner *owner;
	struct bpf_sock *sk;

	if (operation != BPF_SOCK_OPS_TCP_CONNECT_CB && operation != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB &&
	    operation != BPF_SOCK_OPS_STATE_CB)
		return 1;
	sk = ops->sk; /* full, or none */
	if (!sk)
		return 1;
	if (operation == BPF_SOCK_OPS_STATE_CB) {
		owner = bpf_sk_storage_get(MAP(owners), sk, 0, 0);
		if (ops->args[1] == TCP_CLOSE && ops->args[0] != TCP_LISTEN)
			close(ops, sk, owner, ops->args[0]);
		return 1;
	}
	/* The kernel's own sockets, and those of listeners that nobody knows, have none so far. */
	owner = bpf_sk_storage_get(MAP(owners), sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (owner && !owner->role) { /* at a simultaneous open both operations come */
		owner->role = operation == BPF_SOCK_OPS_TCP_CONNECT_CB ? TCPIO_ROLE_CLIENT : TCPIO_ROLE_SERVER;
		/* Not every SYN-ACK is seen: the first segment of an accepted socket tells its numbers again. */
		owner->observed = owner->role == TCPIO_ROLE_CLIENT;
	}
	bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
	return 1;
}
