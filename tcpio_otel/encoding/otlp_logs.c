/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Packet records to `ScopeLogs.log_records`, one after the other.
 *
 * Every piece is written over what the one before it spilled: rows are copied in whole steps, so up to
 * TCPIO_STEP - 1 bytes behind a piece are noise until the next piece comes. `struct words` is what Python made.
 */
#include "native.h"

enum { CACHE_LINE = 64, AHEAD = 4, SIZE_PLACES = 6, SIZE_LIMIT = 1000000 };
#define ASCII_ZEROS 0x3030303030303030ULL
#define ZERO_TO_BLANK 0x1010101010101010ULL
#define TWO_BLANKS 0x2020ULL

struct words {
	struct tcpio_rows text;	      /* by row of the connection: the columns of the body between CPU and BYTES */
	struct tcpio_rows attributes; /* likewise: its attributes */
	struct tcpio_rows ids;	      /* likewise: the ids of its span */
	struct tcpio_rows drops;      /* by drop reason: the attribute; of length 0 until it is made */
	struct tcpio_rows sharing;    /* 0: nothing; 1: contexts interleave; or which contexts a packet reaches over */
	struct tcpio_rows flags;      /* by flags: the last column of the body, and their attributes behind it */
	struct tcpio_rows flag_text;  /* by flags: that column alone */
	struct tcpio_rows severity;   /* 0: INFO, 1: WARN */
	/* Attributes with the value 0, or true. */
	struct tcpio_rows cpu, payload, window, segments, segment_size, retransmit, seq, ack;
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
	const __u8 *bytes = template->bytes;
	size_t at = (size_t) template->lengths[0] - 1;
	__u8 *end;
	__u8 more;

	memcpy(out, bytes, TCPIO_STEP);
	end = put_varint(out + at, value);
	more = (__u8)(end - out - at - 1);
	out[1] = bytes[1] + more;
	out[at - 2] = bytes[at - 2] + more;
	return end;
}

/* Eight decimal digits of a number below 10^8, the first in the lowest byte, each 0 to 9: four, two, one at a time. */
static __u64 eight_digits(__u32 value)
{
	__u64 digits = value / 10000 | (__u64)(value % 10000) << 32, high;

	high = digits * 10486 >> 20 & 0x7f0000007f;
	digits = high | (digits - high * 100) << 16;
	high = digits * 103 >> 10 & 0x000f000f000f000f;
	return high | (digits - high * 10) << 8;
}

/* How many of eight digits are zeros in front of a number; the last digit always counts. */
static int leading_zeros(__u64 digits)
{
	return __builtin_ctzll(digits | 1ULL << 56) / 8;
}

static size_t size_length(__u32 value)
{
	size_t length = SIZE_PLACES + 2;

	for (__u64 limit = SIZE_LIMIT; value >= limit; limit *= 10)
		length++;
	return length;
}

/* The BYTES column: right-aligned to SIZE_PLACES, two blanks behind it. */
static __u8 *put_size(__u8 *out, __u32 value)
{
	__u64 digits, text;
	__u8 *end;

	if (value < SIZE_LIMIT) {
		digits = eight_digits(value);
		text = (digits | ASCII_ZEROS) - (ZERO_TO_BLANK & ((1ULL << 8 * leading_zeros(digits)) - 1));
		text = text >> 16 | TWO_BLANKS << 48;
		memcpy(out, &text, sizeof(text));
		return out + sizeof(text);
	}
	end = out + size_length(value);
	memset(end - 2, ' ', 2);
	for (out = end - 2; value; value /= 10)
		*--out = (__u8)('0' + value % 10);
	return end;
}

/* `LogRecord.body`, the line of tcpio.d, and the attributes of the flags, with which it ends. */
static __u8 *put_body(__u8 *out, const struct words *words, size_t row, const struct tcpio_record *record)
{
	__u64 digits = eight_digits(record->cpu); /* five at most: there is room for a blank */
	int zeros = leading_zeros(digits);
	__u64 cpu = (digits | ASCII_ZEROS) >> 8 * zeros | (__u64)' ' << 8 * (8 - zeros);
	size_t cpu_length = (size_t)(9 - zeros);
	__u32 length =
		(__u32)(cpu_length + (size_t)words->text.lengths[row] + size_length(record->packet.payload_bytes) +
			(size_t)words->flag_text.lengths[record->packet.flags]);

	*out++ = 0x2a;
	out = put_varint(out, length + (length > 0x7F ? 3 : 2));
	*out++ = 0x0a;
	out = put_varint(out, length);
	memcpy(out, &cpu, sizeof(cpu));
	out = tcpio_put_row(out + cpu_length, &words->text, row);
	out = put_size(out, record->packet.payload_bytes);
	return tcpio_put_row(out, &words->flags, record->packet.flags);
}

/* The rows of many connections do not fit the nearest caches: those of a coming record are asked for in time. */
static void fetch(const void *memory, size_t bytes)
{
	for (size_t done = 0; done < bytes; done += CACHE_LINE)
		__builtin_prefetch((const __u8 *)memory + done);
}

static void prefetch(const struct tcpio_rows *rows, size_t row)
{
	fetch(rows->bytes + row * rows->width, rows->width);
	__builtin_prefetch(&rows->lengths[row]);
}

enum { NUMBER_FIRST = 2, TRACE_ID_BYTES = 16, SPAN_ID_BYTES = 8 };

/* The ids of the context that a packet served, or else of its connection's span. */
static __u8 *put_ids(__u8 *out, const struct words *words, size_t row, __s64 number, const __u8 *ids, size_t stride)
{
	const __u8 *context;

	if (number < NUMBER_FIRST)
		return tcpio_put_row(out, &words->ids, row);
	context = ids + (size_t)number * stride;
	out[0] = 0x4a;
	out[1] = TRACE_ID_BYTES;
	memcpy(out + 2, context, TRACE_ID_BYTES);
	out[18] = 0x52;
	out[19] = SPAN_ID_BYTES;
	memcpy(out + 20, context + TRACE_ID_BYTES, SPAN_ID_BYTES);
	return out + 28;
}

/*
 * Encodes records from `first` on, and notes where each ends, counted from `out`. Returns `count`, or the place of a
 * record whose drop reason has no row yet: what is before it is done. `out` has room for the longest rows of all.
 * `order` says which record comes at which place; NULL: they come as they stand.
 * `contexts` are numbers of rows of ids, `stride` bytes apart, and `sharing` rows of words; NULL: none is in a context.
 */
size_t tcpio_encode_logs(const struct words *words, const struct tcpio_record *records, const __s64 *rows,
			 const __s64 *order, const __s64 *contexts, const __s64 *sharing, const __u8 *ids,
			 size_t stride, size_t first, size_t count, __u64 unix_offset_ns, __u64 observed_ns, __u8 *out,
			 __s64 *ends)
{
	__u8 *start = out + (first ? ends[first - 1] : 0);

	for (size_t i = first; i < count; i++) {
		size_t number = order ? (size_t)order[i] : i, row = (size_t)rows[number], length;
		const struct tcpio_record *record = &records[number];
		__u16 marks = record->packet.marks;
		__u16 reason = marks & TCPIO_MARK_DROPPED ? record->packet.drop_reason : 0;
		__u64 unix_ns = record->time_ns + unix_offset_ns;
		__u8 *at = start;

		if (i + AHEAD < count) {
			size_t coming = order ? (size_t)order[i + AHEAD] : i + AHEAD;

			if (order)
				fetch(&records[coming], sizeof(*records));
			prefetch(&words->text, (size_t)rows[coming]);
			prefetch(&words->attributes, (size_t)rows[coming]);
			if (contexts)
				__builtin_prefetch(ids + (size_t)contexts[coming] * stride);
		}
		if (reason && !words->drops.lengths[reason])
			return i;
		at[0] = 0x12; /* log_records; two bytes of its length follow at the end */
		at[3] = 0x09; /* time_unix_nano */
		memcpy(at + 4, &unix_ns, sizeof(unix_ns));
		at = tcpio_put_row(at + 12, &words->severity,
				   (record->packet.flags & 0x04) || (marks & TCPIO_MARK_RETRANSMIT));
		at = put_body(at, words, row, record);
		at = put_integer(at, &words->cpu, record->cpu);
		at = put_integer(at, &words->payload, record->packet.payload_bytes);
		at = put_integer(at, &words->window, record->packet.window);
		if (record->packet.gso_segments > 1) {
			at = put_integer(at, &words->segments, record->packet.gso_segments);
			at = put_integer(at, &words->segment_size, record->packet.gso_size);
		}
		if (marks & TCPIO_MARK_RETRANSMIT)
			at = tcpio_put_row(at, &words->retransmit, 0);
		if (reason)
			at = tcpio_put_row(at, &words->drops, reason);
		at = put_integer(at, &words->seq, record->packet.seq);
		at = put_integer(at, &words->ack, record->packet.ack);
		at = tcpio_put_row(at, &words->attributes, row);
		if (sharing)
			at = tcpio_put_row(at, &words->sharing, (size_t)sharing[number]);
		at = put_ids(at, words, row, contexts ? contexts[number] : 0, ids, stride);
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
