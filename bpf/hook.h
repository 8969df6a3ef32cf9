/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * What every hook does, whichever loader compiles it: where it stands, who is filtered, room in the ring. UAPI headers
 * only. Whoever includes it has declared the maps and helpers before, and says by MAP(name) what a helper is given.
 */
#ifndef TCPIO_HOOK_H
#define TCPIO_HOOK_H

#define AF_INET6 10
#define SOCK_STREAM 1

#define TCP_SYN_SENT 2
#define TCP_SYN_RECV 3
#define TCP_TIME_WAIT 6
#define TCP_CLOSE 7
#define TCP_LISTEN 10
#define TCP_NEW_SYN_RECV 12

#define FLAG_FIN 0x01
#define FLAG_SYN 0x02
#define FLAG_ACK 0x10

/* Where one hook stands: its CPU, the counters of that CPU, and the agent's wishes. */
struct context {
	__u32 cpu;
	struct tcpio_counters *counters;
	struct tcpio_control *control;
};

static __always_inline bool enter(struct context *context)
{
	__u32 zero = 0;

	context->cpu = bpf_get_smp_processor_id();
	context->counters = bpf_map_lookup_elem(MAP(counters), &context->cpu);
	context->control = bpf_map_lookup_elem(MAP(control), &zero);
	return context->counters && context->control;
}

/* A program can be interrupted by another on its CPU, so counting is atomic. */
#define COUNT(counter) __sync_fetch_and_add(&(counter), 1)

/* Room for one record on this CPU's ring, zeroed and stamped; NULL when there is none, or none for a packet. The stamp
 * is taken after the reservation: whatever the reader does not find reserved yet is younger than its look at the clock.
 */
static __always_inline struct tcpio_record *reserve(const struct context *context, void **ring, bool packet)
{
	struct tcpio_record *record;

	*ring = bpf_map_lookup_elem(MAP(rings), &context->cpu);
	if (!*ring)
		return NULL;
	if (packet && bpf_ringbuf_query(*ring, BPF_RB_AVAIL_DATA) >= context->control->packet_bytes)
		return NULL;
	record = bpf_ringbuf_reserve(*ring, sizeof(*record), 0);
	if (!record)
		return NULL;
	__builtin_memset(record, 0, sizeof(*record));
	record->time_ns = bpf_ktime_get_boot_ns();
	record->cpu = context->cpu;
	return record;
}

/* Waking costs ten times the probe: only the record that crosses the mark wakes the reader, a timer does the rest. */
static __always_inline void submit(const struct context *context, void *ring, struct tcpio_record *record)
{
	__u64 available = bpf_ringbuf_query(ring, BPF_RB_AVAIL_DATA);
	__u32 mark = context->control->wakeup_bytes;
	__u32 stride = sizeof(*record) + BPF_RINGBUF_HDR_SZ;

	bpf_ringbuf_submit(record,
			   available >= mark && available - stride < mark ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP);
}

static __always_inline void fill_owner(struct tcpio_record *record, const struct tcpio_owner *owner)
{
	record->pid = owner->pid;
	__builtin_memcpy(record->process_name, owner->name, sizeof(record->process_name));
	record->packet.cgroup = owner->cgroup; /* at the end, where a socket's record has them too */
	record->packet.cgroup_v1 = owner->cgroup_v1;
}

static __always_inline bool same_ends(const struct tcpio_tuple *one, const struct tcpio_tuple *other)
{
	__u64 a[4], b[4];

	__builtin_memcpy(a, one, sizeof(a));
	__builtin_memcpy(b, other, sizeof(b));
	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3] && one->local_port == other->local_port &&
	       one->peer_port == other->peer_port;
}

static __always_inline void own_key(struct tcpio_own_key *key, const __u8 client[16], __u16 client_port,
				    const __u8 server[16], __u16 server_port)
{
	__builtin_memcpy(key->client_address, client, 16);
	__builtin_memcpy(key->server_address, server, 16);
	key->client_port = client_port;
	key->server_port = server_port;
}

/* The agent's own connections, at both ends. Its own end is known by process; when that end sends its SYN, the
 * tuple on the wire is noted, and the other end, should it be on this host, is known by that. */
static __always_inline bool own_connection(const struct context *context, const struct tcpio_tuple *tuple,
					   const struct tcpio_owner *owner)
{
	struct tcpio_control *control = context->control;
	struct tcpio_own_key key;

	if (owner && owner->pid && owner->pid == control->agent_tgid)
		return true;
	if (control->own_ports[tcpio_index(tuple->local_port)]) {
		own_key(&key, tuple->peer_address, tuple->peer_port, tuple->local_address, tuple->local_port);
		if (bpf_map_lookup_elem(MAP(own_connections), &key))
			return true;
	}
	/* The agent's end once its owner is gone: a TIME_WAIT socket. */
	if (control->own_ports[tcpio_index(tuple->peer_port)]) {
		own_key(&key, tuple->local_address, tuple->local_port, tuple->peer_address, tuple->peer_port);
		if (bpf_map_lookup_elem(MAP(own_connections), &key))
			return true;
	}
	return false;
}

/* On a SYN that leaves: one of the agent's is noted, and one of anybody else's takes the tuple back, should the agent
 * have had it before. */
static __always_inline void note_opening(const struct context *context, const struct tcpio_tuple *headers,
					 const struct tcpio_owner *owner)
{
	bool ours = owner && owner->pid && owner->pid == context->control->agent_tgid;
	struct tcpio_own_key key;
	__u8 one = 1;

	if (!ours && !context->control->own_ports[tcpio_index(headers->peer_port)])
		return;
	own_key(&key, headers->local_address, headers->local_port, headers->peer_address, headers->peer_port);
	if (ours) {
		bpf_map_update_elem(MAP(own_connections), &key, &one, BPF_ANY);
		context->control->own_ports[tcpio_index(headers->peer_port)] = 1;
	} else {
		bpf_map_delete_elem(MAP(own_connections), &key);
	}
}

static __always_inline bool wanted_netns(const struct context *context, const struct tcpio_tuple *tuple)
{
	return !context->control->netns || context->control->netns == tuple->netns;
}

/* Counts one packet; true when nothing filters it. */
static __always_inline bool wanted(const struct context *context, const struct tcpio_tuple *tuple,
				   const struct tcpio_owner *owner)
{
	COUNT(context->counters->seen);
	if (own_connection(context, tuple, owner)) {
		COUNT(context->counters->filtered_own);
		return false;
	}
	if (!wanted_netns(context, tuple)) {
		COUNT(context->counters->filtered_netns);
		return false;
	}
	if (!tcpio_wanted_port(context->control, tuple)) {
		COUNT(context->counters->filtered_port);
		return false;
	}
	if (context->control->network_filter && !tcpio_wanted_network(MAP(networks), tuple)) {
		COUNT(context->counters->filtered_cidr);
		return false;
	}
	return true;
}

static __always_inline bool wanted_fact(const struct context *context, const struct tcpio_tuple *tuple,
					const struct tcpio_owner *owner)
{
	return !own_connection(context, tuple, owner) && wanted_netns(context, tuple) &&
	       tcpio_wanted_port(context->control, tuple) &&
	       (!context->control->network_filter || tcpio_wanted_network(MAP(networks), tuple));
}

/* Room for a packet that is wanted, its headers filled in; NULL, and counted, when there is none. */
static __always_inline struct tcpio_record *reserve_packet(const struct context *context, void **ring,
							   const struct tcpio_tuple *tuple,
							   const struct tcpio_headers *headers, __u8 direction,
							   __u32 total_bytes)
{
	struct tcpio_record *record = reserve(context, ring, true);

	if (!record) {
		COUNT(context->counters->lost);
		return NULL;
	}
	COUNT(context->counters->submitted);
	record->tuple = *tuple;
	tcpio_fill_packet(record, headers, direction, total_bytes);
	return record;
}

static __always_inline struct tcpio_record *reserve_fact(const struct context *context, void **ring)
{
	struct tcpio_record *record = reserve(context, ring, false);

	if (!record)
		COUNT(context->counters->lost_facts);
	return record;
}

static __always_inline long load_skb(const void *packet, __u32 offset, void *to, __u32 size)
{
	return bpf_skb_load_bytes(packet, offset, to, size);
}

/* snd_nxt moves on after a segment was sent, so what lies before it went out already. A keep-alive probe lies there
 * too, but carries nothing; the SYN-ACK of a simultaneous open answers, it does not repeat. */
static __always_inline bool is_retransmit(__u32 snd_nxt, const struct tcpio_headers *headers, __u32 total_bytes)
{
	__u8 syn_fin = headers->flags & (FLAG_SYN | FLAG_FIN);

	return (total_bytes > headers->header_bytes || syn_fin) &&
	       (headers->flags & (FLAG_SYN | FLAG_ACK)) != (FLAG_SYN | FLAG_ACK) && (__s32)(headers->seq - snd_nxt) < 0;
}

#endif
