/* SPDX-License-Identifier: Apache-2.0 */
/* What `rows.RowStore` asks of every record: which row is its own, and whether that row still tells the truth. */
#include "native.h"

#define HEADER_BYTES 36 /* the tuple in the headers: both addresses, then both ports */

static int header_differs(const struct tcpio_record *record, const __u8 *header)
{
	return memcmp(header, record->packet.header_local_address, 32) ||
	       memcmp(header + 32, &record->packet.header_local_port, 4);
}

/*
 * Fills `numbers` with row numbers and `stale` with whether the row must be made first; returns how many must.
 * `flow_versions` lie `flow_stride` bytes apart; the store has rows for `capacity` slots.
 */
size_t tcpio_row_numbers(const struct tcpio_record *records, const __s64 *slots, size_t count,
			 const __u8 *flow_versions, size_t flow_stride, size_t capacity, const __u64 *row_versions,
			 const __u8 *row_headers, __s64 *numbers, __u8 *stale)
{
	size_t found = 0;

	for (size_t i = 0; i < count; i++) {
		const struct tcpio_record *record = &records[i];
		size_t slot = (size_t)slots[i];
		int translated = (record->packet.marks & TCPIO_MARK_TRANSLATED) != 0;
		size_t number = (slot + (translated ? capacity : 0)) * 2 + record->packet.direction;
		__u64 version;

		memcpy(&version, flow_versions + slot * flow_stride, sizeof(version));
		stale[i] = row_versions[number] != version ||
			   (translated && header_differs(record, row_headers + number * HEADER_BYTES));
		found += stale[i];
		numbers[i] = (__s64)number;
	}
	return found;
}
