/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * Trace context in the heads of HTTP/1 requests: W3C traceparent, or b3 as a single header. Needs UAPI types only, so
 * that a host compiler takes it too.
 *
 * A head is read in chunks, as segments bring it. `tcpio_scan` finds where lines begin that may matter, by words and
 * without a branch, because verifiers count branches. `tcpio_judge` reads those lines: a name stands at the start of a
 * line (RFC 9112 section 5), before the empty line, and its value is as W3C Trace Context (section 3.2) or B3 want it,
 * or there is none. `tcpio_stream_*` keep the place in the stream, so that what looks like a request inside a body is
 * not taken for one.
 */
#ifndef TCPIO_HTTP_H
#define TCPIO_HTTP_H

#define TCPIO_CHUNK_BYTES 4096
#define TCPIO_TAIL_BYTES 128 /* of an unfinished line that are kept for its next chunk; longer lines do not matter */
#define TCPIO_TEXT_BYTES (TCPIO_TAIL_BYTES + TCPIO_CHUNK_BYTES)
#define TCPIO_BEYOND 160 /* what a look at a line can read behind the text */
#define TCPIO_WORDS                                                                                                    \
	64 /* of eight bytes, in which a line begins that may matter; a request with more is not read on               \
	    */

enum tcpio_head_fact {
	TCPIO_HEAD_SEEN = 1 << 0,      /* a traceparent, good or not */
	TCPIO_HEAD_AMBIGUOUS = 1 << 1, /* a second one: they count as none */
	TCPIO_HEAD_B3_SEEN = 1 << 2,
	TCPIO_HEAD_B3_AMBIGUOUS = 1 << 3,
	TCPIO_HEAD_SIZED = 1 << 4,     /* Content-Length */
	TCPIO_HEAD_UNBOUNDED = 1 << 5, /* the body's length is not to be known from the head */
	/* Those above are remembered from chunk to chunk. */
	TCPIO_HEAD_TRACEPARENT = 1 << 8, /* good ids */
	TCPIO_HEAD_B3 = 1 << 9,
	TCPIO_HEAD_ENDED = 1 << 10, /* the empty line was reached */
	TCPIO_HEAD_FULL = 1 << 11,  /* more lines than can be looked at */
};

struct tcpio_head {
	__u64 user;	      /* who writes here: a program that was interrupted finds another's number */
	__u32 text_bytes;     /* how far the text goes, the tail before it included */
	__u32 first_break;    /* 1 + the word in which the first line feed stands; 0: there is none */
	__u32 last_break;     /* likewise, the last */
	__u32 last_line_feed; /* where that stands exactly */
	__u32 words;	      /* in which lines begin that may matter */
	__u32 end;	      /* where the body begins, once TCPIO_HEAD_ENDED */
	__u32 facts;	      /* enum tcpio_head_fact */
	__u32 first_line;     /* lines whose line feed stands before this were read with the chunk before */
	__u32 length_bytes;   /* Content-Length */
	__u32 at;	      /* a number on its way through memory */
	__u8 trace_id[16];
	__u8 span_id[8];
	__u8 b3_trace_id[16];
	__u8 b3_span_id[8];
	__u8 b3_parent_id[8];
	struct {
		__u64 starts; /* the highest bit of each byte that is a line feed before a line that may matter */
		__u64 word;
	} found[2 * TCPIO_WORDS]; /* what comes beyond the first half goes astray */
	__u8 text[TCPIO_TEXT_BYTES + TCPIO_BEYOND] __attribute__((aligned(8)));
};

#define TCPIO_EACH(byte) (0x0101010101010101ULL * (byte))
#define TCPIO_HIGH TCPIO_EACH(0x80)

/* The highest bit of each byte that is zero (Hacker's Delight, section 6-1: exact, no carry from byte to byte). */
static __always_inline __u64 tcpio_zeros(__u64 word)
{
	return ~(((word & ~TCPIO_HIGH) + ~TCPIO_HIGH) | word) & TCPIO_HIGH;
}

/* 1 if a word has any bit set, without a branch: the compiler must not see what it is, or it would make one. */
static __always_inline __u64 tcpio_any(__u64 word)
{
	word |= -word;
	asm volatile("" : "+r"(word));
	return word >> 63;
}

static __always_inline __u64 tcpio_word(const __u8 *bytes)
{
	__u64 word;

	__builtin_memcpy(&word, bytes, sizeof(word));
	return word;
}

/* Notes a line feed before a letter that a name of interest begins with, or before the end of an empty line. `next` is
 * the word behind `now`, which is the text's word number `word`. */
static __always_inline void tcpio_scan_word(struct tcpio_head *head, __u32 word, __u64 now, __u64 next)
{
	__u64 breaks = tcpio_zeros(now ^ TCPIO_EACH('\n'));
	__u64 after = now >> 8 | next << 56, lower = after | TCPIO_EACH(0x20);
	__u64 starts = breaks & (tcpio_zeros(lower ^ TCPIO_EACH('t')) | tcpio_zeros(lower ^ TCPIO_EACH('b')) |
				 tcpio_zeros(lower ^ TCPIO_EACH('c')) | tcpio_zeros(after ^ TCPIO_EACH('\r')) |
				 tcpio_zeros(after ^ TCPIO_EACH('\n')) | tcpio_zeros(after ^ TCPIO_EACH(' ')) |
				 tcpio_zeros(after ^ TCPIO_EACH('\t')));
	__u32 line = (__u32)tcpio_any(breaks), none_yet = 1 - (__u32)tcpio_any(head->first_break);
	__u32 slot = head->words & (2 * TCPIO_WORDS - 1);

	head->first_break += (word + 1) * (line & none_yet);
	head->last_break += (word + 1 - head->last_break) * line;
	head->found[slot].starts = starts;
	head->found[slot].word = word;
	head->words += (__u32)tcpio_any(starts);
}

/* Finds the lines of the text. */
static __always_inline void tcpio_scan(struct tcpio_head *head)
{
	const __u64 *words = (const __u64 *)head->text;
	__u64 now = words[0];

	head->first_break = head->last_break = head->words = 0;
	for (__u32 word = 0; word < TCPIO_TEXT_BYTES / 8; word++) {
		__u64 next = words[word + 1];

		if (word * 8 >= head->text_bytes)
			break;
		tcpio_scan_word(head, word, now, next);
		now = next;
	}
}

/* What a digit is worth, hexadecimal and in lower case; 16 and more: it is none. Without a branch, as above. */
static __always_inline __u32 tcpio_nibble(__u32 byte)
{
	__u32 digit = byte - '0', letter = byte - 'a';
	__u32 no_digit = digit | (9 - digit), no_letter = letter | (5 - letter); /* negative where out of range */

	asm volatile("" : "+r"(no_digit), "+r"(no_letter));
	no_digit = (__u32)((__s32)no_digit >> 31);
	no_letter = (__u32)((__s32)no_letter >> 31);
	return (digit & ~no_digit) | ((letter + 10) & ~no_letter) | (no_digit & no_letter & 16);
}

enum tcpio_hex_result {
	TCPIO_HEX_SOME = 1, /* not all zero */
	TCPIO_HEX_BAD = 2,  /* not hexadecimal in lower case */
};

static __always_inline __u32 tcpio_hex(__u8 *to, const __u8 *text, __u32 bytes)
{
	__u32 bad = 0, any = 0;

	for (__u32 i = 0; i < bytes; i++) {
		__u32 high = tcpio_nibble(text[2 * i]), low = tcpio_nibble(text[2 * i + 1]);

		bad |= (high | low) >> 4;
		any |= high | low;
		to[i] = (__u8)(high << 4 | (low & 15));
	}
	return (__u32)tcpio_any(any) | (bad ? TCPIO_HEX_BAD : 0);
}

static __always_inline bool tcpio_blank(__u8 byte)
{
	return byte == ' ' || byte == '\t';
}

/* A number without its history: verifiers walk what follows once, not once for every value that it can have. */
static __always_inline __u32 tcpio_forget(struct tcpio_head *head, __u32 number)
{
	*(volatile __u32 *)&head->at = number;
	return *(volatile __u32 *)&head->at & 127;
}

/* Where a line goes on behind up to eight blanks. What is read of a line lies in its first 128 bytes. */
static __always_inline __u32 tcpio_skip_blanks(struct tcpio_head *head, const __u8 *line, __u32 at)
{
	for (int i = 0; i < 8; i++) {
		if (!tcpio_blank(line[at & 127]))
			break;
		at++;
	}
	return tcpio_forget(head, at);
}

/* Does the line end here, blanks apart? */
static __always_inline bool tcpio_ends(struct tcpio_head *head, const __u8 *line, __u32 at)
{
	at = tcpio_skip_blanks(head, line, at);
	return line[at] == '\n' || (line[at] == '\r' && line[(at + 1) & 127] == '\n');
}

/* Eight letters, or less with `mask`, whatever their case. */
static __always_inline bool tcpio_spells(const __u8 *text, __u64 name, __u64 mask)
{
	return ((tcpio_word(text) | TCPIO_EACH(0x20)) & mask) == name;
}

#define TCPIO_ALL (~0ULL)
#define TCPIO_THREE 0xffffffULL
#define TCPIO_SIX 0xffffffffffffULL
/* As a little-endian machine reads them. */
#define TCPIO_TRACEPAR 0x7261706563617274ULL
#define TCPIO_ENT 0x746e65ULL
#define TCPIO_CONTENT_ 0x2d746e65746e6f63ULL
#define TCPIO_LENGTH 0x6874676e656cULL
#define TCPIO_TRANSFER 0x726566736e617274ULL
#define TCPIO_ENCODING 0x676e69646f636e65ULL

/* W3C Trace Context section 3.2: version 00 ends after the flags, a later one may go on behind a dash. */
static __always_inline void tcpio_judge_traceparent(struct tcpio_head *head, const __u8 *line)
{
	const __u8 *value = line + (tcpio_skip_blanks(head, line, sizeof("traceparent:") - 1) & 31);
	__u8 version, flags;

	if (head->facts & TCPIO_HEAD_SEEN) {
		head->facts |= TCPIO_HEAD_AMBIGUOUS;
		return;
	}
	head->facts |= TCPIO_HEAD_SEEN;
	if (tcpio_hex(&version, value, 1) & TCPIO_HEX_BAD || tcpio_hex(&flags, value + 53, 1) & TCPIO_HEX_BAD ||
	    tcpio_hex(head->trace_id, value + 3, 16) != TCPIO_HEX_SOME ||
	    tcpio_hex(head->span_id, value + 36, 8) != TCPIO_HEX_SOME)
		return;
	if (version == 0xff || value[2] != '-' || value[35] != '-' || value[52] != '-')
		return;
	if (!tcpio_ends(head, value, 55) && (!version || value[55] != '-'))
		return;
	head->facts |= TCPIO_HEAD_TRACEPARENT;
}

/* Behind B3's span id: nothing, or the sampling state, and nothing behind that or a parent's id. */
static __always_inline bool tcpio_b3_ends(struct tcpio_head *head, const __u8 *value, __u32 at)
{
	if (tcpio_ends(head, value, at))
		return true;
	if (value[at] != '-' || (value[at + 1] != '0' && value[at + 1] != '1' && value[at + 1] != 'd'))
		return false;
	if (tcpio_ends(head, value, at + 2))
		return true;
	return value[at + 2] == '-' && !(tcpio_hex(head->b3_parent_id, value + at + 3, 8) & TCPIO_HEX_BAD) &&
	       tcpio_ends(head, value, at + 19);
}

/* B3 as a single header: a trace id of 16 bytes, or of 8, to which zeros are added in front. */
static __always_inline void tcpio_judge_b3(struct tcpio_head *head, const __u8 *line)
{
	const __u8 *value = line + (tcpio_skip_blanks(head, line, sizeof("b3:") - 1) & 31);
	bool good;

	if (head->facts & TCPIO_HEAD_B3_SEEN) {
		head->facts |= TCPIO_HEAD_B3_AMBIGUOUS;
		return;
	}
	head->facts |= TCPIO_HEAD_B3_SEEN;
	__builtin_memset(head->b3_trace_id, 0, 8);
	if (value[32] == '-')
		good = tcpio_hex(head->b3_trace_id, value, 16) == TCPIO_HEX_SOME &&
		       tcpio_hex(head->b3_span_id, value + 33, 8) == TCPIO_HEX_SOME && tcpio_b3_ends(head, value, 49);
	else
		good = value[16] == '-' && tcpio_hex(head->b3_trace_id + 8, value, 8) == TCPIO_HEX_SOME &&
		       tcpio_hex(head->b3_span_id, value + 17, 8) == TCPIO_HEX_SOME && tcpio_b3_ends(head, value, 33);
	if (good)
		head->facts |= TCPIO_HEAD_B3;
}

/* More than a number of nine digits, or a second one, and the body's end is not known. */
static __always_inline void tcpio_judge_length(struct tcpio_head *head, const __u8 *line)
{
	__u32 at = tcpio_skip_blanks(head, line, sizeof("content-length:") - 1), length = 0, digits = 0;

	for (; digits < 9; digits++) {
		__u32 digit = line[(at + digits) & 127] - (__u32)'0';

		if (digit > 9)
			break;
		length = length * 10 + digit;
	}
	if (!digits || !tcpio_ends(head, line, tcpio_forget(head, at + digits)) || head->facts & TCPIO_HEAD_SIZED)
		head->facts |= TCPIO_HEAD_UNBOUNDED;
	head->facts |= TCPIO_HEAD_SIZED;
	head->length_bytes = length;
}

/* A number that the compiler knows nothing of: what it makes of one that is a multiple of eight, verifiers do not
 * follow. */
static __always_inline __u32 tcpio_opaque(__u32 number)
{
	asm volatile("" : "+r"(number));
	return number;
}

/* Where the text's last line feed stands; 0: nowhere. The text never begins with one. */
static __always_inline __u32 tcpio_last_break(const struct tcpio_head *head)
{
	__u32 word = tcpio_opaque(head->last_break - 1), last = 0;

	if (word >= TCPIO_TEXT_BYTES / 8)
		return 0;
	word = tcpio_opaque(word * 8);
	for (__u32 byte = 0; byte < 8; byte++)
		if (head->text[word + byte] == '\n')
			last = word + byte;
	return last;
}

/* Reads the line at `start`, if all of it is here; true once there is nothing more to read. */
static __always_inline bool tcpio_judge_line(struct tcpio_head *head, __u32 start)
{
	const __u8 *line;

	if (start >= TCPIO_TEXT_BYTES || start > head->last_line_feed)
		return true;
	if (start <= head->first_line)
		return false;
	line = head->text + start;
	if (line[0] == '\n' || (line[0] == '\r' && line[1] == '\n')) {
		head->facts |= TCPIO_HEAD_ENDED;
		head->end = start + (line[0] == '\n' ? 1 : 2);
		return true;
	}
	if (tcpio_blank(line[0])) /* folded onto the line before, whichever that is */
		head->facts |= TCPIO_HEAD_AMBIGUOUS | TCPIO_HEAD_B3_AMBIGUOUS | TCPIO_HEAD_UNBOUNDED;
	else if (tcpio_spells(line, TCPIO_TRACEPAR, TCPIO_ALL) && tcpio_spells(line + 8, TCPIO_ENT, TCPIO_THREE) &&
		 line[11] == ':')
		tcpio_judge_traceparent(head, line);
	else if ((line[0] | 0x20) == 'b' && line[1] == '3' && line[2] == ':')
		tcpio_judge_b3(head, line);
	else if (tcpio_spells(line, TCPIO_CONTENT_, TCPIO_ALL) && tcpio_spells(line + 8, TCPIO_LENGTH, TCPIO_SIX) &&
		 line[7] == '-' && line[14] == ':')
		tcpio_judge_length(head, line);
	else if (tcpio_spells(line, TCPIO_TRANSFER, TCPIO_ALL) && line[8] == '-' &&
		 tcpio_spells(line + 9, TCPIO_ENCODING, TCPIO_ALL) && line[17] == ':')
		head->facts |= TCPIO_HEAD_UNBOUNDED;
	return false;
}

/* Is the text's first line one of HTTP/1.0 or 1.1? */
static __always_inline bool tcpio_is_request(const struct tcpio_head *head)
{
	__u32 word = tcpio_opaque(head->first_break - 1), end = 0;
	const __u8 *version;
	bool method = false;

	if (word >= TCPIO_TEXT_BYTES / 8)
		return false;
	word = tcpio_opaque(word * 8);
	for (__u32 byte = 0; byte < 8; byte++)
		if (!end && head->text[word + byte] == '\n')
			end = word + byte;
	if (end < TCPIO_TAIL_BYTES + 13 || end >= head->text_bytes || end >= TCPIO_TEXT_BYTES)
		return false;
	if (head->text[end - 1] == '\r')
		end--;
	version = head->text + end - 9;
	for (__u32 byte = 3; byte < 8; byte++) /* where the method ends, which is another blank than the version's */
		if (head->text[TCPIO_TAIL_BYTES + byte] == ' ' && TCPIO_TAIL_BYTES + byte < end - 9)
			method = true;
	return method && version[0] == ' ' && version[1] == 'H' && version[2] == 'T' && version[3] == 'T' &&
	       version[4] == 'P' && version[5] == '/' && version[6] == '1' && version[7] == '.' &&
	       (version[8] == '0' || version[8] == '1');
}

/*
 * The place in one direction of a connection. `next` is a sequence number: where the head goes on, or where the body
 * ends and another request can begin.
 */
enum tcpio_stream_state {
	TCPIO_STREAM_UNKNOWN = 0, /* no request was seen: one may begin with any segment */
	TCPIO_STREAM_HEAD = 1,	  /* a head is under way, and goes on at `next` */
	TCPIO_STREAM_BODY = 2,	  /* nothing begins before `next` */
	TCPIO_STREAM_WAITING = 3, /* the body's end is not known: nothing begins before the peer has answered */
	TCPIO_STREAM_OTHER = 4,	  /* another protocol: no request will begin */
	TCPIO_STREAM_FRAMES = 5,  /* HTTP/2: a frame's header goes on at `next`, see http2.h */
};

struct tcpio_stream {
	__u32 next;
	__u32 answer;	 /* the peer's answer to the request that began last does not begin before this */
	__u8 state;	 /* enum tcpio_stream_state */
	__u8 direction;	 /* 1 + enum tcpio_direction of requests; 0: not known */
	__u8 in_context; /* a context was reported, and its end was not */
	__u8 facts;	 /* enum tcpio_head_fact of the head so far, those that outlast a chunk; see also LOOKS */
};

/* Does a segment come before what should begin at `next`? Then that is on its way, and nothing can be read before. */
static __always_inline bool tcpio_stream_skips(const struct tcpio_stream *stream, __u32 seq)
{
	return stream->state == TCPIO_STREAM_BODY && (__s32)(stream->next - seq) < 0;
}

/* Where in a segment's payload there is something to read; `bytes` and more: nowhere. */
static __always_inline __u32 tcpio_stream_at(struct tcpio_stream *stream, __u32 seq, __u32 bytes)
{
	__s32 ahead = (__s32)(stream->next - seq);

	if (stream->state == TCPIO_STREAM_UNKNOWN)
		return 0;
	if (stream->state == TCPIO_STREAM_BODY)
		return (__u32)ahead;
	if (stream->state != TCPIO_STREAM_HEAD)
		return bytes;
	if (ahead < 0) { /* something is missing */
		stream->state = TCPIO_STREAM_WAITING;
		return bytes;
	}
	return (__u32)ahead;
}

/* The first four bytes of what can be the method of a request, or HTTP/2's preface. */
#define TCPIO_WORD(a, b, c, d) ((__u32)(a) | (__u32)(b) << 8 | (__u32)(c) << 16 | (__u32)(d) << 24)
#define TCPIO_PREFACE TCPIO_WORD('P', 'R', 'I', ' ')
#define TCPIO_ANSWER TCPIO_WORD('H', 'T', 'T', 'P')

static __always_inline bool tcpio_is_method(__u32 word, __u32 mask)
{
	return !((word ^ TCPIO_WORD('G', 'E', 'T', ' ')) & mask) || !((word ^ TCPIO_WORD('P', 'O', 'S', 'T')) & mask) ||
	       !((word ^ TCPIO_WORD('P', 'U', 'T', ' ')) & mask) || !((word ^ TCPIO_WORD('H', 'E', 'A', 'D')) & mask) ||
	       !((word ^ TCPIO_WORD('D', 'E', 'L', 'E')) & mask) || !((word ^ TCPIO_WORD('P', 'A', 'T', 'C')) & mask) ||
	       !((word ^ TCPIO_WORD('O', 'P', 'T', 'I')) & mask) || !((word ^ TCPIO_WORD('T', 'R', 'A', 'C')) & mask) ||
	       !((word ^ TCPIO_WORD('C', 'O', 'N', 'N')) & mask);
}

/* Draws the conclusions from a chunk of a head, `bytes` long from sequence number `seq` on, once it has been judged. */
static __always_inline void tcpio_stream_move(struct tcpio_stream *stream, const struct tcpio_head *head, __u32 seq,
					      __u32 bytes)
{
	__u32 facts = head->facts;

	stream->facts = (__u8)facts;
	if (facts & TCPIO_HEAD_ENDED) {
		stream->next = seq + (head->end - TCPIO_TAIL_BYTES);
		if (facts & TCPIO_HEAD_SIZED)
			stream->next += head->length_bytes;
		stream->state = facts & TCPIO_HEAD_UNBOUNDED ? TCPIO_STREAM_WAITING : TCPIO_STREAM_BODY;
	} else if (facts & TCPIO_HEAD_FULL) {
		stream->state = TCPIO_STREAM_WAITING;
	} else {
		stream->next = seq + bytes;
		stream->state = TCPIO_STREAM_HEAD;
	}
}

#endif
