/*
 * The probe's own decoding and filters, compiled for this machine under sanitizers and fed by libFuzzer. The input is
 * a packet from its IP header on. What the code reads beyond the packet is refused, as the kernel refuses it.
 */
#include <assert.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <linux/bpf.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>

struct packet {
	const uint8_t *bytes;
	size_t size;
};

/* One network, as the kernel's longest-prefix match would hold it. */
struct network {
	uint8_t address[16];
	uint32_t prefix_bits;
};

static const uint8_t found;

static const void *bpf_map_lookup_elem(void *map, const void *key);

#include "record.h"
#include "packet.h"
#include "filter.h"

static bool same_prefix(const uint8_t *one, const uint8_t *other, uint32_t bits)
{
	for (uint32_t bit = 0; bit < bits; bit++)
		if ((one[bit / 8] ^ other[bit / 8]) >> (7 - bit % 8) & 1)
			return false;
	return true;
}

static const void *bpf_map_lookup_elem(void *map, const void *key)
{
	const struct network *network = map;
	const struct tcpio_network *wanted = key;

	assert(wanted->prefix_bits == 128);
	return same_prefix(network->address, wanted->address, network->prefix_bits) ? &found : NULL;
}

static long load(const void *from, __u32 offset, void *to, __u32 size)
{
	const struct packet *packet = from;

	if (offset > packet->size || size > packet->size - offset)
		return -1;
	memcpy(to, packet->bytes + offset, size);
	return 0;
}

static __u32 ipv6_payload(const void *packet, __u8 next)
{
	return tcpio_ipv6_payload(packet, load, next);
}

static uint32_t number(const uint8_t *bytes, int size)
{
	uint32_t value = 0;

	while (size--)
		value = value << 8 | *bytes++;
	return value;
}

/* Everything that a decoded packet says must stand in its bytes. */
static void check(const struct packet *packet, const struct tcpio_headers *sent, const struct tcpio_headers *received)
{
	uint32_t data_offset, tcp;
	bool ipv4 = packet->bytes[0] >> 4 == 4;
	const uint8_t *header;

	assert(sent->header_bytes == received->header_bytes);
	assert(!memcmp(sent->tuple.local_address, received->tuple.peer_address, 16));
	assert(!memcmp(sent->tuple.peer_address, received->tuple.local_address, 16));
	assert(sent->tuple.local_port == received->tuple.peer_port);
	assert(sent->tuple.peer_port == received->tuple.local_port);
	/* The TCP header ends where the headers end, and its own length leads back to its start; in bytes that repeat
	 * more than one start can look right, and IPv4 says which it is. */
	for (data_offset = 20; data_offset <= 60; data_offset += 4) {
		tcp = sent->header_bytes - data_offset;
		header = packet->bytes + tcp;
		if (ipv4 ? tcp != (packet->bytes[0] & 15) * 4u : tcp < 40)
			continue;
		if (tcp + 20 <= packet->size && header[12] >> 4 == data_offset / 4 &&
		    number(header, 2) == sent->tuple.local_port && number(header + 2, 2) == sent->tuple.peer_port &&
		    number(header + 4, 4) == sent->seq && number(header + 8, 4) == sent->ack &&
		    header[13] == sent->flags && number(header + 14, 2) == sent->window)
			break;
	}
	assert(data_offset <= 60);
	if (ipv4) {
		assert(!memcmp(sent->tuple.local_address + 12, packet->bytes + 12, 4));
		assert(!memcmp(sent->tuple.peer_address + 12, packet->bytes + 16, 4));
	} else {
		assert(!memcmp(sent->tuple.local_address, packet->bytes + 8, 16));
		assert(!memcmp(sent->tuple.peer_address, packet->bytes + 24, 16));
	}
}

static void check_filters(const uint8_t *data, const struct tcpio_tuple *tuple)
{
	static struct tcpio_control control;
	struct network network = { .prefix_bits = data[0] % 129 };
	uint16_t port = number(data + 1, 2);

	memcpy(network.address, data[3] & 1 ? tuple->local_address : tuple->peer_address, 16);
	network.address[15] ^= data[4];
	assert(tcpio_wanted_network(&network, tuple) ==
	       (same_prefix(network.address, tuple->local_address, network.prefix_bits) ||
		same_prefix(network.address, tuple->peer_address, network.prefix_bits)));
	assert(tcpio_wanted_port(&control, tuple));
	control.port_filter = 1;
	control.ports[port >> 6] = 1ull << (port & 63);
	assert(tcpio_wanted_port(&control, tuple) == (tuple->local_port == port || tuple->peer_port == port));
	control.ports[port >> 6] = 0;
	control.port_filter = 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct packet packet = { data, size };
	struct tcpio_headers sent, received;
	struct tcpio_record record = { 0 };
	bool decoded;

	decoded = tcpio_decode(&sent, TCPIO_TRANSMIT, &packet, load, ipv6_payload);
	assert(decoded == tcpio_decode(&received, TCPIO_RECEIVE, &packet, load, ipv6_payload));
	if (!decoded)
		return 0;
	check(&packet, &sent, &received);
	check_filters(data, &sent.tuple);
	tcpio_fill_packet(&record, &sent, TCPIO_TRANSMIT, size);
	assert(record.packet.payload_bytes == (size > sent.header_bytes ? size - sent.header_bytes : 0));
	assert(record.packet.header_local_port == sent.tuple.local_port);
	return 0;
}
