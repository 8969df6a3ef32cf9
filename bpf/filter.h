/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * What the agent tells the probe through mapped memory, and the filters that stand in it: UAPI headers only.
 * tcpio_otel/capture/control.py holds the same layout; a test compares the two through the object's BTF.
 */
#ifndef TCPIO_FILTER_H
#define TCPIO_FILTER_H

#include "http.h"

/* Key of the longest-prefix-match map of wanted networks; IPv4 prefixes are 96 bits longer than they are written. */
struct tcpio_network {
	__u32 prefix_bits;
	__u8 address[16];
};

struct tcpio_control {
	__u32 agent_tgid;     /* the probe fills it in: the agent cannot know its id outside its pid namespace */
	__u32 port_filter;    /* 0: every port passes */
	__u32 network_filter; /* 0: every address passes */
	__u32 netns;	      /* the only network namespace that passes, by inode; 0: every one does */
	__u32 wakeup_bytes;   /* a ring that fills beyond this wakes the agent */
	__u32 sees_syn_acks;  /* the probe fills it in: egress shows IPv6 SYN-ACKs of request sockets */
	__u32 http_headers;   /* look for trace contexts in the heads of HTTP requests */
	__u32 packet_bytes;   /* a ring that is fuller takes no more packets: the rest is for records of other kinds */
	__u64 tcp_v4_rcv[2];  /* addresses of the kernel's code: first, one past the last; 0: unknown */
	__u64 tcp_v6_rcv[2];
	__u64 sock_edemux;     /* address of the function that lets go of a reply's socket; 0: unknown */
	__u64 ports[1024];     /* one bit a port */
	__u8 own_ports[65536]; /* 1: a server port of the agent's own connections; kept by the probe */
};

/* Whose a socket is: kept with it, and inherited by the sockets that it accepts. What stands behind the name serves
 * hooks that can read no kernel structure, and is 0 elsewhere. */
struct tcpio_owner {
	__u32 pid;
	__u32 observed; /* the probe has reported this socket, or saw it being made */
	__u8 name[16];
	__u32 netns;  /* the low half of the namespace's cookie; 0: unknown */
	__u32 role;   /* enum tcpio_role */
	__u32 cgroup; /* as in the record */
	__u32 cgroup_v1;
	struct tcpio_stream stream;
	__u16 contexts;	 /* that were reported, or should have been */
	__u16 idle_tags; /* how many in a row came with nothing sent or received in between */
	__u32 tagged_at; /* the sum of both sequence numbers at the last tag */
	__u64 published; /* the span id that was last read from the map of published contexts */
	__u64 placed;	 /* address of the kernel's css_set from which the cgroups were read: a process that moves gets
			    another */
};

enum tcpio_role {
	TCPIO_ROLE_UNKNOWN = 0,
	TCPIO_ROLE_CLIENT = 1,
	TCPIO_ROLE_SERVER = 2,
};

/* The agent's own connections, by the tuple on the wire. */
struct tcpio_own_key {
	__u8 client_address[16];
	__u8 server_address[16];
	__u16 client_port;
	__u16 server_port;
};

/* A port as an index whose bound older verifiers see too: they lose it where a compiler keeps it in a wide register. */
static __always_inline __u32 tcpio_index(__u16 port)
{
	__u32 index = port;

	asm volatile("" : "+r"(index));
	return index & 0xffff;
}

static __always_inline bool tcpio_bit(const __u64 *bits, __u16 index)
{
	return bits[tcpio_index(index) >> 6] >> (index & 63) & 1;
}

static __always_inline bool tcpio_wanted_port(const struct tcpio_control *control, const struct tcpio_tuple *tuple)
{
	return !control->port_filter || tcpio_bit(control->ports, tuple->local_port) ||
	       tcpio_bit(control->ports, tuple->peer_port);
}

/* Does `networks` hold a prefix of either address? */
static __always_inline bool tcpio_wanted_network(void *networks, const struct tcpio_tuple *tuple)
{
	struct tcpio_network network = { .prefix_bits = 128 };

	__builtin_memcpy(network.address, tuple->local_address, 16);
	if (bpf_map_lookup_elem(networks, &network))
		return true;
	__builtin_memcpy(network.address, tuple->peer_address, 16);
	return bpf_map_lookup_elem(networks, &network) != NULL;
}

#endif
