/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * Trace context in HTTP/2: a traceparent that stands literally in a header block. UAPI types only, as http.h.
 *
 * Frames are followed by their lengths (RFC 9113 section 4.1), from the client's preface on. Header blocks are not
 * decoded, as that needs all of those before: `tcpio_find_literal` looks for a field whose name and value are both
 * written out, without Huffman coding (RFC 7541 sections 5.2 and 6.2), as gRPC's C core does. No other field can hold
 * these bytes by its rules: neither a zero nor a vertical tab is allowed in a value (RFC 9113 section 8.2.1).
 */
#ifndef TCPIO_HTTP2_H
#define TCPIO_HTTP2_H

#include "http.h"

#define TCPIO_FRAME_BYTES 9 /* of a frame, before its payload */
#define TCPIO_FRAME_HEADERS 1
#define TCPIO_FRAME_PADDED 0x08
#define TCPIO_FRAME_PRIORITY 0x20
/* Where a frame begins may be on its way when what comes behind it is here. Beyond this it will not come any more, and
 * sequence numbers must not come round to it. */
#define TCPIO_FRAME_LATE (1 << 20)

/* The rest of the client's preface, RFC 9113 section 3.4, as a little-endian machine reads it. */
#define TCPIO_PREFACE_BYTES 24
#define TCPIO_PREFACE_1 0x322f50545448202aULL /* * HTTP/2 */
#define TCPIO_PREFACE_2 0x4d530a0d0a0d302eULL /* .0\r\n\r\nSM */
#define TCPIO_PREFACE_3 0x0a0d0a0dU

/* A field: a representation that is followed by a name, both lengths, name and value. */
#define TCPIO_LITERAL_NAME 11
#define TCPIO_LITERAL_VALUE 55
#define TCPIO_LITERAL_BYTES (3 + TCPIO_LITERAL_NAME + TCPIO_LITERAL_VALUE)

/* The place in TCPIO_STREAM_FRAMES, where other members of the stream are free: `next` is the next byte of a frame's
 * header, of which `in_context` bytes have come already: length and type in `answer`, flags in `facts`. */

/* How many of the `left` bytes in a segment belong to the frame's header. */
static __always_inline __u32 tcpio_frame_wants(const struct tcpio_stream *stream, __u32 left)
{
	__u32 wants = TCPIO_FRAME_BYTES - stream->in_context;

	return left < wants ? left : wants;
}

/* Adds those, of which `start` holds the first eight, zeros behind; true once the header is complete. Then `frame` is
 * the payload's length, its flags in the lowest byte, and `type` its type. */
static __always_inline bool tcpio_frame_read(struct tcpio_stream *stream, __u64 start, __u32 bytes, __u32 *frame,
					     __u8 *type)
{
	__u32 have = stream->in_context;
	/* Eight bytes would be as many bits as a shift cannot do at once. */
	__u64 header = (__u64)stream->answer << 32 | (__u64)stream->facts << 24 |
		       __builtin_bswap64(start) >> 4 * have >> 4 * have;

	stream->next += bytes;
	stream->in_context += bytes;
	stream->answer = header >> 32;
	stream->facts = (__u8)(header >> 24);
	if (stream->in_context < TCPIO_FRAME_BYTES)
		return false;
	*frame = (stream->answer & ~0xffU) | stream->facts;
	*type = (__u8)stream->answer;
	stream->next += *frame >> 8;
	stream->answer = 0;
	stream->facts = stream->in_context = 0;
	return true;
}

/* Finds where a name of eleven letters begins with "tra", by words and without a branch. */
static __always_inline void tcpio_scan_block(struct tcpio_head *head)
{
	const __u64 *words = (const __u64 *)(head->text + TCPIO_TAIL_BYTES);
	__u64 now = words[0];

	head->words = 0;
	for (__u32 word = 0; word < TCPIO_CHUNK_BYTES / 8; word++) {
		__u64 next = words[word + 1], starts;
		__u32 slot = head->words & (2 * TCPIO_WORDS - 1);

		if (TCPIO_TAIL_BYTES + word * 8 >= head->text_bytes)
			break;
		starts = tcpio_zeros(now ^ TCPIO_EACH(TCPIO_LITERAL_NAME)) &
			 tcpio_zeros((now >> 8 | next << 56) ^ TCPIO_EACH('t')) &
			 tcpio_zeros((now >> 16 | next << 48) ^ TCPIO_EACH('r')) &
			 tcpio_zeros((now >> 24 | next << 40) ^ TCPIO_EACH('a'));
		head->found[slot].starts = starts;
		head->found[slot].word = word;
		head->words += (__u32)tcpio_any(starts);
		now = next;
	}
}

/* Reads the ids of the only such field in the text. */
static __always_inline void tcpio_find_literal(struct tcpio_head *head)
{
	__u64 starts = head->found[0].starts;
	__u32 at = (__u32)head->found[0].word * 8;
	const __u8 *field, *value;
	__u8 flags;

	head->facts = 0;
	if (head->words != 1 || starts & (starts - 1))
		return;
	for (__u32 byte = 1; byte < 8; byte++)
		at += byte * (__u32)(starts >> (8 * byte + 7) & 1);
	at = tcpio_opaque(at);
	if (!at || at >= TCPIO_CHUNK_BYTES || TCPIO_TAIL_BYTES + at - 1 + TCPIO_LITERAL_BYTES > head->text_bytes)
		return;
	field = head->text + TCPIO_TAIL_BYTES + at - 1;
	value = field + 3 + TCPIO_LITERAL_NAME;
	if ((field[0] & ~0x40 && field[0] != 0x10) || tcpio_word(field + 2) != TCPIO_TRACEPAR || field[10] != 'e' ||
	    field[11] != 'n' || field[12] != 't' || field[13] != TCPIO_LITERAL_VALUE)
		return;
	if (value[0] != '0' || value[1] != '0' || value[2] != '-' || value[35] != '-' || value[52] != '-' ||
	    tcpio_hex(head->trace_id, value + 3, 16) != TCPIO_HEX_SOME ||
	    tcpio_hex(head->span_id, value + 36, 8) != TCPIO_HEX_SOME ||
	    tcpio_hex(&flags, value + 53, 1) & TCPIO_HEX_BAD)
		return;
	head->facts = TCPIO_HEAD_SEEN | TCPIO_HEAD_TRACEPARENT;
}

#endif
