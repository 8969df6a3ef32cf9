/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * From the bytes of an IP packet to its TCP header: UAPI headers only, so that any loader and a host compiler take it.
 */
#ifndef TCPIO_PACKET_H
#define TCPIO_PACKET_H

#define TCPIO_IPV6_EXTENSIONS 8 /* more than any stack sends in good faith */

struct tcpio_headers {
	struct tcpio_tuple tuple; /* as seen from the end that sent (or received) the packet; netns 0 */
	__u32 seq;
	__u32 ack;
	__u32 header_bytes; /* IP and TCP headers together */
	__u16 window;
	__u8 flags;
};

/* Copies `size` bytes at `offset` from the start of the IP header; 0 on success. */
typedef long (*tcpio_load)(const void *packet, __u32 offset, void *to, __u32 size);

/* tcpio_ipv6_payload with its `load` bound: a function of its own in BPF, so that the verifier walks it once. */
typedef __u32 (*tcpio_ipv6)(const void *packet, __u8 next);

static __always_inline void tcpio_map_ipv4(__u8 address[16], __be32 ipv4)
{
	__builtin_memset(address, 0, 10);
	address[10] = address[11] = 0xff;
	__builtin_memcpy(address + 12, &ipv4, 4);
}

/* The offset of the TCP header behind an IPv6 header and its extensions (RFC 8200, section 4); 0: not TCP, or a
 * fragment other than the first. */
static __always_inline __u32 tcpio_ipv6_payload(const void *packet, tcpio_load load, __u8 next)
{
	__u32 offset = sizeof(struct ipv6hdr);
	struct {
		__u8 next;
		__u8 length;
		__be16 fragment;
	} extension;

	for (int i = 0; i < TCPIO_IPV6_EXTENSIONS; i++) {
		if (next == IPPROTO_TCP)
			return offset;
		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS &&
		    next != IPPROTO_FRAGMENT && next != IPPROTO_AH)
			return 0;
		if (load(packet, offset, &extension, sizeof(extension)))
			return 0;
		if (next == IPPROTO_FRAGMENT) {
			if (extension.fragment & __builtin_bswap16(0xfff8))
				return 0;
			offset += 8;
		} else if (next == IPPROTO_AH) {
			offset += (extension.length + 2) * 4;
		} else {
			offset += (extension.length + 1) * 8;
		}
		next = extension.next;
	}
	return next == IPPROTO_TCP ? offset : 0;
}

/* Decodes an IPv4 or IPv6 packet that this end sent or received; false when it holds no readable TCP header. */
static __always_inline bool tcpio_decode(struct tcpio_headers *headers, __u8 direction, const void *packet,
					 tcpio_load load, tcpio_ipv6 ipv6_payload)
{
	bool sent = direction == TCPIO_TRANSMIT;
	__u8 *source = sent ? headers->tuple.local_address : headers->tuple.peer_address;
	__u8 *destination = sent ? headers->tuple.peer_address : headers->tuple.local_address;
	union {
		__u8 first;
		struct iphdr v4;
		struct ipv6hdr v6;
	} ip;
	struct tcphdr tcp;
	__u8 bits[2];
	__u32 offset;

	if (load(packet, 0, &ip.v4, sizeof(ip.v4)))
		return false;
	if (ip.first >> 4 == 4) {
		if (ip.v4.protocol != IPPROTO_TCP || ip.v4.frag_off & __builtin_bswap16(0x1fff))
			return false;
		offset = ip.v4.ihl * 4;
		if (offset < sizeof(ip.v4))
			return false;
		tcpio_map_ipv4(source, ip.v4.saddr);
		tcpio_map_ipv4(destination, ip.v4.daddr);
	} else if (ip.first >> 4 == 6) {
		if (load(packet, 0, &ip.v6, sizeof(ip.v6)))
			return false;
		offset = ip.v6.nexthdr == IPPROTO_TCP ? sizeof(ip.v6) : ipv6_payload(packet, ip.v6.nexthdr);
		if (!offset)
			return false;
		__builtin_memcpy(source, &ip.v6.saddr, 16);
		__builtin_memcpy(destination, &ip.v6.daddr, 16);
	} else {
		return false;
	}
	if (load(packet, offset, &tcp, sizeof(tcp)))
		return false;
	__builtin_memcpy(bits, (__u8 *)&tcp + 12, 2);
	if (bits[0] >> 4 < 5)
		return false;
	headers->tuple.local_port = __builtin_bswap16(sent ? tcp.source : tcp.dest);
	headers->tuple.peer_port = __builtin_bswap16(sent ? tcp.dest : tcp.source);
	headers->tuple.netns = 0;
	headers->seq = __builtin_bswap32(tcp.seq);
	headers->ack = __builtin_bswap32(tcp.ack_seq);
	headers->window = __builtin_bswap16(tcp.window);
	headers->flags = bits[1];
	headers->header_bytes = offset + (bits[0] >> 4) * 4;
	return true;
}

/* Writes the headers into a packet record. `total_bytes` is the packet's length from the IP header on. */
static __always_inline void tcpio_fill_packet(struct tcpio_record *record, const struct tcpio_headers *headers,
					      __u8 direction, __u32 total_bytes)
{
	record->kind = TCPIO_PACKET;
	record->packet.direction = direction;
	record->packet.seq = headers->seq;
	record->packet.ack = headers->ack;
	record->packet.window = headers->window;
	record->packet.flags = headers->flags;
	record->packet.payload_bytes = total_bytes > headers->header_bytes ? total_bytes - headers->header_bytes : 0;
	record->packet.header_local_port = headers->tuple.local_port;
	record->packet.header_peer_port = headers->tuple.peer_port;
	__builtin_memcpy(record->packet.header_local_address, headers->tuple.local_address, 16);
	__builtin_memcpy(record->packet.header_peer_address, headers->tuple.peer_address, 16);
}

#endif
