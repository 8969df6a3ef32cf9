/* SPDX-License-Identifier: Apache-2.0 */
/* What `table.ConnectionTable` does with every record: sift out those that tell something, and count them all. */
#include "native.h"

enum { FLAG_FIN = 0x01, FLAG_SYN = 0x02, FLAG_RST = 0x04 };

static int may_change_state(const struct tcpio_record *record)
{
	return record->kind != TCPIO_PACKET || record->packet.flags & (FLAG_FIN | FLAG_SYN | FLAG_RST) ||
	       record->packet.marks & TCPIO_MARK_RETRANSMIT || !record->packet.window;
}

/* The process of a connection, as it stands in the table. */
struct owner {
	__u32 pid;
	__u32 cgroup;
	__u32 cgroup_v1;
};

/* Does a packet name this owner, or none at all? */
static int is_of(const struct tcpio_record *record, const struct owner *owner)
{
	return !record->pid || (record->pid == owner->pid && record->packet.cgroup == owner->cgroup &&
				record->packet.cgroup_v1 == owner->cgroup_v1);
}

/*
 * Fills `rows` with the records that must be looked at one by one, and returns how many these are: those that are
 * more than plain data, and what follows them on a connection, or comes to one that is marked in `attentive` anyway
 * (by slot; marks are added); and those that name another process, or another cgroup of it, than `owners`, which lie
 * `stride` bytes apart. Records without a slot are passed by.
 */
size_t tcpio_sift(const struct tcpio_record *records, const __s64 *slots, size_t count, __u8 *attentive,
		  const __u8 *owners, size_t stride, __s64 *rows)
{
	size_t found = 0;

	for (size_t i = 0; i < count; i++) {
		const struct tcpio_record *record = &records[i];
		__s64 slot = slots[i];
		struct owner owner;

		if (slot < 0 || record->kind == TCPIO_CONTEXT)
			continue;
		memcpy(&owner, owners + (size_t)slot * stride, sizeof(owner));
		if (may_change_state(record))
			attentive[slot] |= record->kind == TCPIO_PACKET;
		else if (!attentive[slot] && is_of(record, &owner))
			continue;
		rows[found++] = (__s64)i;
	}
	return found;
}

/* How far an end's sequence numbers came: payload, SYN and FIN, each counted once whatever was repeated. */
static void follow(const struct tcpio_record *record, __u32 *high, __s64 *progress)
{
	__u8 flags = record->packet.flags;
	__u32 end = record->packet.seq + record->packet.payload_bytes + !!(flags & FLAG_SYN) + !!(flags & FLAG_FIN);
	__s32 ahead;

	/* What takes no place says nothing of where an end begins: a keep-alive's number is one too low. */
	if (flags & FLAG_RST || end == record->packet.seq)
		return;
	if (!*progress && !*high)
		*high = record->packet.seq;
	else if (flags & FLAG_SYN)
		return; /* repeated, or astray */
	ahead = (__s32)(end - *high);
	if (ahead > 0) {
		*high = end;
		*progress += ahead;
	}
}

/*
 * Counts packet records into their slots; `packets`, `payload`, `high` and `progress` are by slot and direction, at
 * 2 * slot + direction.
 */
void tcpio_count(const struct tcpio_record *records, const __s64 *slots, size_t count, __s64 *last_seen, __s64 *packets,
		 __s64 *payload, __u32 *high, __s64 *progress)
{
	for (size_t i = 0; i < count; i++) {
		const struct tcpio_record *record = &records[i];
		__s64 slot = slots[i];
		size_t cell = 2 * (size_t)slot + record->packet.direction;

		if (slot < 0 || record->kind != TCPIO_PACKET)
			continue;
		last_seen[slot] = (__s64)record->time_ns;
		packets[cell] += record->packet.gso_segments > 1 ? record->packet.gso_segments : 1;
		payload[cell] += record->packet.payload_bytes;
		follow(record, &high[cell], &progress[cell]);
	}
}
