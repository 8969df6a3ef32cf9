/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Packet records to `ScopeLogs.log_records`, one after the other.
 *
 * Every piece is written over what the one before it spilled: rows are copied in whole steps, so up to
 * TCPIO_STEP - 1 bytes behind a piece are noise until the next piece comes. `struct words` is what Python made.
 */
#include "native.h"

enum { CACHE_LINE = 64, AHEAD = 4 };

struct words {
	struct tcpio_rows text;	      /* by row of the connection: the columns of the body between CPU and BYTES */
	struct tcpio_rows attributes; /* likewise: its attributes, and the ids of its span */
	struct tcpio_rows drops;      /* by drop reason: the attribute; of length 0 until it is made */
	struct tcpio_rows flag_text;  /* by flags: the last column of the body */
	struct tcpio_rows flags;      /* by flags: their attributes */
	struct tcpio_rows severity;   /* 0: INFO, 1: WARN */
	/* Attributes with the value 0, or true. */
	struct tcpio_rows cpu, payload, window, segments, retransmit, seq, ack;
	struct tcpio_rows event_name;
};

/* Without a branch on the length, which would be guessed wrong too often; writes eight bytes. */
static __u8 *put_varint(__u8 *out, __u32 value)
{
	int length = (38 - __builtin_clz(value | 1)) / 7;
	__u64 number = value, groups;

	groups = (number & 0x7f) | (number & 0x3f80) << 1 | (number & 0x1fc000) << 2 | (number & 0xfe00000) << 3 |
		 (number & 0xf0000000) << 4;
	groups |= 0x8080808080 & ((1ULL << 8 * (length - 1)) - 1);
	memcpy(out, &groups, sizeof(groups));
	return out + length;
}

/* An integer attribute: its template ends in the value 0, and holds two lengths that the value's varint adds to. */
static __u8 *put_integer(__u8 *out, const struct tcpio_rows *template, __u32 value)
{
	__u8 *number = out + template->lengths[0] - 1, *end;
	__u8 more;

	memcpy(out, template->bytes, TCPIO_STEP);
	end = put_varint(number, value);
	more = (__u8)(end - number - 1);
	out[1] += more;
	number[-2] += more;
	return end;
}

/* Decimal digits to the left of `end`; returns where they start. */
static __u8 *put_digits(__u8 *end, __u32 value)
{
	do {
		*--end = (__u8)('0' + value % 10);
		value /= 10;
	} while (value);
	return end;
}

/* `LogRecord.body`: the line of tcpio.d. */
static __u8 *put_body(__u8 *out, const struct words *words, size_t row, const struct tcpio_record *record)
{
	__u8 cpu[TCPIO_STEP], size[TCPIO_STEP];
	__u8 *cpu_digits = put_digits(cpu + 5, record->cpu);
	size_t cpu_length = (size_t)(cpu + 6 - cpu_digits); /* a blank behind it */
	__u8 *size_digits, *tags = out;
	size_t size_length, length;

	memset(size, ' ', sizeof(size));
	size_digits = put_digits(size + 10, record->packet.payload_bytes);
	if (size_digits > size + 4)
		size_digits = size + 4; /* right-aligned to six places */
	size_length = (size_t)(size + 12 - size_digits);
	length = cpu_length + (size_t)words->text.lengths[row] + size_length +
		 (size_t)words->flag_text.lengths[record->packet.flags];

	*tags++ = 0x2a;
	tags = put_varint(tags, (__u32)length + (length > 0x7F ? 3 : 2));
	*tags++ = 0x0a;
	tags = put_varint(tags, (__u32)length);
	cpu[5] = ' ';
	memcpy(tags, cpu_digits, 8);
	out = tcpio_put_row(tags + cpu_length, &words->text, row);
	memcpy(out, size_digits, 16);
	return tcpio_put_row(out + size_length, &words->flag_text, record->packet.flags);
}

/* The rows of many connections do not fit the nearest caches: ask for those of a coming record while this one is made.
 */
static void prefetch(const struct tcpio_rows *rows, size_t row)
{
	const __u8 *bytes = rows->bytes + row * rows->width;

	for (size_t done = 0; done < rows->width; done += CACHE_LINE)
		__builtin_prefetch(bytes + done);
	__builtin_prefetch(&rows->lengths[row]);
}

/*
 * Encodes records from `first` on, and notes where each ends, counted from `out`. Returns `count`, or the number of a
 * record whose drop reason has no row yet: what is before it is done. `out` has room for the longest rows of all.
 */
size_t tcpio_encode_logs(const struct words *words, const struct tcpio_record *records, const __s64 *rows, size_t first,
			 size_t count, __u64 unix_offset_ns, __u64 observed_ns, __u8 *out, __s64 *ends)
{
	__u8 *start = out + (first ? ends[first - 1] : 0);

	for (size_t i = first; i < count; i++) {
		const struct tcpio_record *record = &records[i];
		size_t row = (size_t)rows[i], length;
		__u16 marks = record->packet.marks;
		__u16 reason = marks & TCPIO_MARK_DROPPED ? record->packet.drop_reason : 0;
		__u64 unix_ns = record->time_ns + unix_offset_ns;
		__u8 *at = start;

		if (i + AHEAD < count) {
			prefetch(&words->text, (size_t)rows[i + AHEAD]);
			prefetch(&words->attributes, (size_t)rows[i + AHEAD]);
		}
		if (reason && !words->drops.lengths[reason])
			return i;
		at[0] = 0x12; /* log_records; two bytes of its length follow at the end */
		at[3] = 0x09; /* time_unix_nano */
		memcpy(at + 4, &unix_ns, sizeof(unix_ns));
		at = tcpio_put_row(at + 12, &words->severity,
				   (record->packet.flags & 0x04) || (marks & TCPIO_MARK_RETRANSMIT));
		at = put_body(at, words, row, record);
		at = tcpio_put_row(at, &words->flags, record->packet.flags);
		at = put_integer(at, &words->cpu, record->cpu);
		at = put_integer(at, &words->payload, record->packet.payload_bytes);
		at = put_integer(at, &words->window, record->packet.window);
		if (record->packet.gso_segments > 1)
			at = put_integer(at, &words->segments, record->packet.gso_segments);
		if (marks & TCPIO_MARK_RETRANSMIT)
			at = tcpio_put_row(at, &words->retransmit, 0);
		if (reason)
			at = tcpio_put_row(at, &words->drops, reason);
		at = put_integer(at, &words->seq, record->packet.seq);
		at = put_integer(at, &words->ack, record->packet.ack);
		at = tcpio_put_row(at, &words->attributes, row);
		at[0] = 0x59; /* observed_time_unix_nano */
		memcpy(at + 1, &observed_ns, sizeof(observed_ns));
		at = tcpio_put_row(at + 9, &words->event_name, 0);

		length = (size_t)(at - start) - 3; /* always between 128 and 16383 */
		start[1] = (__u8)(length | 0x80);
		start[2] = (__u8)(length >> 7);
		start = at;
		ends[i] = start - out;
	}
	return count;
}
