/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * Where trace contexts begin on a connection: told by the application (a socket option), found in the head of an HTTP/1
 * request or in a header block of HTTP/2, or published for the thread that sends. Included by tcpio.bpf.c once, behind
 * its maps and helpers.
 *
 * Only ids leave the kernel. Which packets belong to a context is decided in user space, by sequence number.
 */
#ifndef TCPIO_CONTEXT_H
#define TCPIO_CONTEXT_H

#include "http2.h"

#define OPTION_LEVEL 0x6f74656c /* "otel" */
#define OPTION_CONTEXT 1
#define OPTION_SHARED_CONTEXT 2
#define OPTION_BYTES 24
#define TAKEN (-1) /* as a length: the kernel's own code does not see the option */
/* Tags in a row with nothing sent or received in between; what comes beyond is a program that floods us. */
#define IDLE_TAGS 8

/* At segments with data, from a connection's first on, before it is no HTTP: a proxy may speak first. */
#define LOOKS 32

#define CHUNKS 6   /* of one segment: as many requests, or so much of a long head */
#define FRAMES 128 /* in a chunk of HTTP/2: 64 KiB hold more, but not of small requests as programs send them */

/* What `report_context` is told of the ids. */
#define KNOWN 1
#define KNOWN_SHARED 2

struct identifiers {
	__u8 trace_id[16];
	__u8 span_id[8];
};

/* What is kept of a head that goes on in another segment. */
struct unfinished {
	__u32 seq; /* where its request begins */
	__u32 ack;
	__u32 length_bytes;
	__u32 line; /* where in the tail its last line begins, with the line feed before it */
	__u8 tail[TCPIO_TAIL_BYTES];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct tcpio_head);
} heads SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct unfinished);
} unfinished_heads SEC(".maps");

/* The layout is OpenTelemetry eBPF Instrumentation's; the agent puts that project's own map in the place of this one.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, __u64); /* thread id below, process id above */
	__type(value, struct identifiers);
} published_contexts SEC(".maps");

/* Set before loading: the map above is the real one, and cgroup_skb may ask who sends (from 6.10 on). */
const volatile bool reads_published SEC(".rodata.published") = false;

/* Room for a context of a socket; counted even where there is none, so that its loss shows. Counted after the record
 * has its time, as a packet reads the count before it gets its own: so whatever knows of a context is younger. */
static __always_inline struct tcpio_record *reserve_context(const struct context *context, void **ring,
							    struct tcp_sock *tp, struct tcpio_owner *owner)
{
	struct tcpio_record *record;

	record = reserve_fact(context, ring);
	owner->contexts++;
	if (!record)
		return NULL;
	record->kind = TCPIO_CONTEXT;
	record->context.serial = owner->contexts;
	record->state = BPF_CORE_READ(tp, inet_conn.icsk_inet.sk.__sk_common.skc_state);
	record->socket_cookie = BPF_CORE_READ(tp, inet_conn.icsk_inet.sk.__sk_common.skc_cookie.counter);
	fill_tuple(&record->tuple, (struct sock *)tp);
	fill_owner(record, owner);
	return record;
}

/* Heads of HTTP requests. */

static __always_inline struct tcpio_head *this_head(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&heads, &zero);
}

/* Global functions, which the verifier walks once each. */
__noinline int scan_head(__u32 reserved)
{
	struct tcpio_head *head = this_head();

	if (!head)
		return 0;
	tcpio_scan(head);
	head->last_line_feed = tcpio_last_break(head);
	return (int)reserved;
}

__noinline int judge_line(__u32 start)
{
	struct tcpio_head *head = this_head();

	return head ? tcpio_judge_line(head, start) : 1;
}

__noinline int judge_head(__u32 reserved)
{
	struct tcpio_head *head = this_head();

	if (!head)
		return 0;
	if (head->words > TCPIO_WORDS) {
		head->facts |= TCPIO_HEAD_FULL;
		return 0;
	}
	for (__u32 slot = 0; slot < TCPIO_WORDS; slot++) {
		if (slot >= head->words)
			break;
		for (__u32 byte = 0; byte < 8; byte++)
			if (head->found[slot].starts >> (8 * byte + 7) & 1 &&
			    judge_line((__u32)head->found[slot].word * 8 + byte + 1))
				return 0;
	}
	return (int)reserved;
}

/* Brings `bytes` bytes of a segment into this CPU's head, behind what is left of the chunk before; false: it cannot. */
static __always_inline bool load_chunk(struct tcpio_head *head, struct __sk_buff *skb, __u32 offset, __u32 bytes,
				       const struct unfinished *before)
{
	__u64 *after;

	if (before) {
		__builtin_memcpy(head->text, before->tail, TCPIO_TAIL_BYTES);
		head->first_line = before->line;
		head->length_bytes = before->length_bytes;
	} else {
		__builtin_memset(head->text, 0, TCPIO_TAIL_BYTES);
		head->first_line = TCPIO_TAIL_BYTES;
	}
	if (!bytes || bytes > TCPIO_CHUNK_BYTES ||
	    bpf_skb_load_bytes(skb, offset, head->text + TCPIO_TAIL_BYTES, ((bytes - 1) & (TCPIO_CHUNK_BYTES - 1)) + 1))
		return false;
	head->text_bytes = TCPIO_TAIL_BYTES + bytes;
	after = (void *)(head->text + TCPIO_TAIL_BYTES + ((bytes - 1) & (TCPIO_CHUNK_BYTES - 1)) + 1);
	__builtin_memset(after, 0, 16);
	return true;
}

/* Keeps the line with which a chunk ends, if it is not too long to matter. */
static __always_inline void keep_tail(const struct tcpio_head *head, struct unfinished *unfinished)
{
	__u32 start = head->text_bytes - TCPIO_TAIL_BYTES, line = head->last_line_feed;

	if (line < start)
		start = line;
	if (start > TCPIO_CHUNK_BYTES)
		return;
	__builtin_memcpy(unfinished->tail, head->text + start, TCPIO_TAIL_BYTES);
	unfinished->line = line - start;
	unfinished->length_bytes = head->length_bytes;
}

static __always_inline bool has_ids(const struct tcpio_head *head)
{
	__u32 facts = head->facts;

	if (facts & TCPIO_HEAD_SEEN)
		return (facts & (TCPIO_HEAD_TRACEPARENT | TCPIO_HEAD_AMBIGUOUS)) == TCPIO_HEAD_TRACEPARENT;
	return (facts & (TCPIO_HEAD_B3 | TCPIO_HEAD_B3_AMBIGUOUS)) == TCPIO_HEAD_B3;
}

/* Is there anything to report? A request begins: its ids, or that the one before has ended. It goes on: ids that were
 * missing so far, or that those reported are not the only ones. */
static __always_inline bool is_news(const struct tcpio_head *head, const struct tcpio_stream *before, bool first,
				    bool known)
{
	__u32 ambiguous = TCPIO_HEAD_SEEN | TCPIO_HEAD_AMBIGUOUS;

	if (head->facts & TCPIO_HEAD_FULL)
		return before->in_context;
	if (first || !before->in_context)
		return known || before->in_context;
	if (!(before->facts & TCPIO_HEAD_SEEN))
		ambiguous |= TCPIO_HEAD_B3_AMBIGUOUS;
	return (head->facts ^ before->facts) & ambiguous;
}

static __always_inline void fill_ids(struct tcpio_record *record, const struct tcpio_head *head)
{
	bool traceparent = head->facts & TCPIO_HEAD_SEEN;

	record->context.origin = traceparent ? TCPIO_ORIGIN_TRACEPARENT : TCPIO_ORIGIN_B3;
	__builtin_memcpy(record->context.trace_id, traceparent ? head->trace_id : head->b3_trace_id, 16);
	__builtin_memcpy(record->context.span_id, traceparent ? head->span_id : head->b3_span_id, 8);
}

static __always_inline void place_context(struct tcpio_record *record, __u8 direction, __u32 seq, __u32 ack)
{
	bool sent = direction == TCPIO_TRANSMIT;

	record->context.sent_seq = sent ? seq : ack;
	record->context.received_seq = sent ? ack : seq;
}

/* Does the rest of HTTP/2's preface stand here? A global function, for the stack's sake. */
__noinline int is_preface(struct __sk_buff *skb, __u32 offset)
{
	__u64 first, second;
	__u32 third;

	return !bpf_skb_load_bytes(skb, offset + 4, &first, sizeof(first)) && first == TCPIO_PREFACE_1 &&
	       !bpf_skb_load_bytes(skb, offset + 12, &second, sizeof(second)) && second == TCPIO_PREFACE_2 &&
	       !bpf_skb_load_bytes(skb, offset + 20, &third, sizeof(third)) && third == TCPIO_PREFACE_3;
}

/* Does a request begin here, at `seq`? Notes it where the preface of HTTP/2 does, or something else. */
static __always_inline bool opens_request(struct __sk_buff *skb, __u32 offset, struct tcpio_stream *stream,
					  __u8 direction, __u32 seq, __u32 bytes)
{
	__u32 word = 0, mask = ~0U;
	bool method;

	if (bytes < sizeof(word)) {
		bytes = (tcpio_opaque(bytes - 1) & 3) + 1; /* older verifiers do not see that it is not 0 */
		mask = (1U << 8 * bytes) - 1;
		if (bpf_skb_load_bytes(skb, offset, &word, bytes))
			return false;
	} else if (bpf_skb_load_bytes(skb, offset, &word, sizeof(word))) {
		return false;
	}
	method = tcpio_is_method(word, mask);
	if (!method && word != TCPIO_PREFACE && stream->state == TCPIO_STREAM_UNKNOWN)
		return false;
	stream->state = word == TCPIO_PREFACE ? TCPIO_STREAM_OTHER : TCPIO_STREAM_WAITING;
	stream->direction = direction + 1;
	if (word == TCPIO_PREFACE && is_preface(skb, offset)) {
		stream->state = TCPIO_STREAM_FRAMES;
		stream->next = seq + TCPIO_PREFACE_BYTES;
		stream->answer = stream->facts = 0;
	}
	return method;
}

/* The full socket of a segment and what is kept with it; false: there is none. */
static __always_inline bool find_owner(struct __sk_buff *skb, struct bpf_sock **sk, struct tcpio_owner **owner)
{
	*sk = skb->sk;
	if (!*sk)
		return false;
	*sk = bpf_sk_fullsock(*sk);
	if (!*sk)
		return false;
	*owner = bpf_sk_storage_get(&owners, *sk, 0, 0);
	return *owner;
}

/* Reports a context whose ids stand in this CPU's head, or that there is none from here on. A global function, so that
 * what calls it can do with less stack. `user` says who wrote the head: true if it was still that one afterwards. */
__noinline int report_context(struct __sk_buff *skb, __u64 user, __u32 sent_seq, __u32 received_seq, __u32 known)
{
	struct tcpio_head *head = this_head();
	struct tcpio_record *record;
	struct tcpio_owner *owner;
	struct context context;
	struct tcp_sock *tp;
	struct bpf_sock *sk;
	void *ring;

	if (!head || !enter(&context) || !find_owner(skb, &sk, &owner))
		return 1;
	tp = bpf_skc_to_tcp_sock(sk);
	if (!tp)
		return 1;
	record = reserve_context(&context, &ring, tp, owner);
	if (!record)
		return 1;
	record->context.sent_seq = sent_seq;
	record->context.received_seq = received_seq;
	record->context.origin = TCPIO_ORIGIN_TRACEPARENT;
	record->context.context_marks = known == KNOWN_SHARED ? TCPIO_CONTEXT_SHARED : 0;
	if (known)
		fill_ids(record, head);
	barrier();
	if (known && head->user != user) {
		owner->contexts--;
		bpf_ringbuf_discard(record, BPF_RB_NO_WAKEUP);
		return 0;
	}
	submit(&context, ring, record);
	return 1;
}

/* Reads the next chunk of a head in a segment, if there is one, and reports the context that it tells; 0 when there is
 * nothing more to read. A global function: the verifier walks it once, however often it is called. */
__noinline int read_chunk(struct __sk_buff *skb, __u32 header_bytes, __u32 seq, __u32 ack, __u32 direction)
{
	__u64 user = bpf_ktime_get_boot_ns() << 1 | (direction & 1);
	bool sent = direction == TCPIO_TRANSMIT, first, request = false, known = false, news;
	struct tcpio_head *head = this_head();
	struct unfinished *kept = NULL;
	struct tcpio_stream moved;
	struct tcpio_owner *owner;
	struct bpf_sock *sk;
	__u32 bytes, at;

	if (!head || !find_owner(skb, &sk, &owner) || skb->len < header_bytes)
		return 0;
	bytes = skb->len - header_bytes;
	moved = owner->stream;
	if (tcpio_stream_skips(&moved, seq)) {
		owner->stream.in_context = 0;
		seq = moved.next;
		if (moved.in_context)
			report_context(skb, 0, sent ? seq : ack, sent ? ack : seq, false);
		return 0;
	}
	at = tcpio_stream_at(&moved, seq, bytes);
	if (at >= bytes) {
		owner->stream = moved;
		return 0;
	}
	bytes -= at;
	if (bytes > TCPIO_CHUNK_BYTES)
		bytes = TCPIO_CHUNK_BYTES;
	seq += at;
	first = moved.state != TCPIO_STREAM_HEAD;
	if (first)
		moved.answer = ack;
	if (!first) {
		kept = bpf_sk_storage_get(&unfinished_heads, sk, 0, 0);
		if (!kept) {
			owner->stream.state = TCPIO_STREAM_WAITING;
			return 0;
		}
	}
	if (!first || opens_request(skb, header_bytes + at, &moved, direction, seq, bytes)) {
		head->user = user;
		barrier();
		head->facts = first ? 0 : moved.facts;
		if (!load_chunk(head, skb, header_bytes + at, bytes, kept))
			return 0;
		scan_head(0);
		request = !first || tcpio_is_request(head);
		if (request)
			judge_head(0);
		known = request && has_ids(head);
		barrier();
		if (head->user != user)
			return 1; /* interrupted: once more */
	}
	news = is_news(head, &moved, first, known);
	if (request) {
		tcpio_stream_move(&moved, head, seq, bytes);
		moved.direction = direction + 1;
		if (moved.state == TCPIO_STREAM_HEAD) {
			if (!kept)
				kept = bpf_sk_storage_get(&unfinished_heads, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
			if (!kept) {
				owner->stream.state = TCPIO_STREAM_WAITING;
				return 0;
			}
			if (first) {
				kept->seq = seq;
				kept->ack = ack;
			}
		}
	}
	if (!first) {
		kept = bpf_sk_storage_get(&unfinished_heads, sk, 0, 0);
		if (!kept)
			return 0;
		seq = kept->seq;
		ack = kept->ack;
	}
	if (news) {
		moved.in_context = known;
		if (!report_context(skb, user, sent ? seq : ack, sent ? ack : seq, known))
			return 1;
	}
	if (request && moved.state == TCPIO_STREAM_HEAD && kept)
		keep_tail(head, kept);
	barrier();
	if (request && head->user != user) { /* too late for another try */
		moved.state = TCPIO_STREAM_WAITING;
		if (moved.in_context)
			report_context(skb, user, sent ? seq : ack, sent ? ack : seq, false);
		moved.in_context = false;
	}
	owner->stream = moved;
	return request || moved.state == TCPIO_STREAM_FRAMES;
}

__noinline int scan_block(__u32 reserved)
{
	struct tcpio_head *head = this_head();

	if (!head)
		return 0;
	tcpio_scan_block(head);
	tcpio_find_literal(head);
	return (int)reserved;
}

/* Reads a header block, as much of it as the segment holds behind `offset`, and reports the context that it tells.
 * `frame` is its frame's length, with flags in the lowest byte and the direction in place of the lowest flag. 0 when it
 * was interrupted. */
__noinline int read_block(struct __sk_buff *skb, __u32 offset, __u32 frame, __u32 begin, __u32 ack)
{
	__u64 user = bpf_ktime_get_boot_ns() << 1 | (frame & 1);
	__u32 bytes = frame >> 8, before = 0;
	struct tcpio_head *head = this_head();
	__u8 padding = 0;

	if (!head)
		return 1;
	if (frame & TCPIO_FRAME_PADDED) {
		if (bpf_skb_load_bytes(skb, offset, &padding, sizeof(padding)))
			return 1;
		before = sizeof(padding);
	}
	if (frame & TCPIO_FRAME_PRIORITY)
		before += 5;
	offset += before;
	before += padding;
	if (bytes < before || offset >= skb->len)
		return 1;
	bytes -= before;
	if (bytes > skb->len - offset)
		bytes = skb->len - offset;
	if (bytes > TCPIO_CHUNK_BYTES)
		bytes = TCPIO_CHUNK_BYTES;
	if (bytes < TCPIO_LITERAL_BYTES)
		return 1;
	head->user = user;
	barrier();
	if (!load_chunk(head, skb, offset, bytes, NULL))
		return 1;
	scan_block(0);
	barrier();
	if (head->user != user)
		return 0;
	if (!(head->facts & TCPIO_HEAD_TRACEPARENT))
		return 1;
	if ((frame & 1) == TCPIO_TRANSMIT)
		return report_context(skb, user, begin, ack, KNOWN_SHARED);
	return report_context(skb, user, ack, begin, KNOWN_SHARED);
}

/* Follows the frames of HTTP/2 through a segment; 0 when there is nothing more to read. */
__noinline int read_frames(struct __sk_buff *skb, __u32 header_bytes, __u32 seq, __u32 ack, __u32 direction)
{
	struct tcpio_stream *stream;
	struct tcpio_owner *owner;
	struct bpf_sock *sk;
	__u32 bytes;

	if (!find_owner(skb, &sk, &owner) || skb->len < header_bytes)
		return 0;
	bytes = skb->len - header_bytes;
	stream = &owner->stream;
	for (__u32 i = 0; i < FRAMES; i++) {
		__u32 at = stream->next - seq, begin, frame, taken;
		__u64 start[2] = {};
		__u8 type;

		if (at >= bytes) {
			if ((__s32)at < -TCPIO_FRAME_LATE)
				stream->state = TCPIO_STREAM_OTHER;
			return 0;
		}
		taken = (tcpio_opaque(tcpio_frame_wants(stream, bytes - at) - 1) & (sizeof(start) - 1)) + 1;
		if (bpf_skb_load_bytes(skb, header_bytes + at, start, taken))
			return 0;
		begin = stream->next + taken - TCPIO_FRAME_BYTES;
		if (!tcpio_frame_read(stream, start[0], taken, &frame, &type) || type != TCPIO_FRAME_HEADERS)
			continue;
		frame = (frame & ~1U) | (direction & 1);
		at += header_bytes + taken;
		if (!read_block(skb, at, frame, begin, ack))
			read_block(skb, at, frame, begin, ack);
	}
	return 1;
}

/* Stops reading a segment in which there is more than is read of one. */
static __noinline void give_up(struct __sk_buff *skb, const struct tcpio_headers *headers, __u32 direction,
			       struct tcpio_stream *stream)
{
	__u32 bytes = skb->len - headers->header_bytes, at = tcpio_stream_at(stream, headers->seq, bytes);
	bool sent = direction == TCPIO_TRANSMIT;

	if (at >= bytes)
		return;
	stream->state = TCPIO_STREAM_WAITING;
	at += headers->seq;
	if (stream->in_context)
		report_context(skb, 0, sent ? at : headers->ack, sent ? headers->ack : at, false);
	stream->in_context = false;
}

/* Reads the requests that begin or go on in a segment. */
static __always_inline void read_requests(struct __sk_buff *skb, const struct tcpio_headers *headers, __u8 direction,
					  struct tcpio_stream *stream)
{
	for (int i = 0; i < CHUNKS; i++) {
		int more = stream->state == TCPIO_STREAM_FRAMES
				   ? read_frames(skb, headers->header_bytes, headers->seq, headers->ack, direction)
				   : read_chunk(skb, headers->header_bytes, headers->seq, headers->ack, direction);

		if (!more)
			return;
	}
	give_up(skb, headers, direction, stream);
}

/* Can the answer that ends a request begin here? */
static __always_inline bool may_answer(const struct tcpio_headers *headers, const struct tcpio_stream *stream)
{
	if (stream->state == TCPIO_STREAM_BODY && (__s32)(headers->ack - stream->next) <= 0)
		return false;
	return (stream->state == TCPIO_STREAM_BODY || stream->state == TCPIO_STREAM_WAITING) &&
	       (__s32)(headers->seq - stream->answer) >= 0;
}

/* The start of an answer tells where a request has ended whose length its head did not, or of which something went by
 * unseen, or whose connection was not known; 1xx announces, it answers not. */
static __noinline void hear_answer(struct __sk_buff *skb, const struct tcpio_headers *headers, __u8 direction,
				   struct tcpio_stream *stream)
{
	struct {
		__u32 http;
		__u8 rest[8];
	} start;

	if (bpf_skb_load_bytes(skb, headers->header_bytes, &start, sizeof(start)) || start.http != TCPIO_ANSWER ||
	    start.rest[0] != '/' || start.rest[1] != '1' || start.rest[4] != ' ' || start.rest[5] < '2' ||
	    start.rest[5] > '5')
		return;
	stream->next = headers->ack;
	stream->answer = headers->seq;
	stream->state = TCPIO_STREAM_BODY;
	stream->direction = 2 - direction;
}

/* Is this the first that a connection carries in its direction? Where more was sent before, a request can be under way.
 */
static __always_inline bool is_first_data(const struct tcpio_headers *headers, __u32 bytes, __u8 direction,
					  const struct tcp_sock *tp)
{
	if (direction == TCPIO_TRANSMIT) /* the kernel has counted it already */
		return tp->bytes_sent == bytes;
	return !tp->bytes_received && headers->seq == tp->rcv_nxt;
}

/* Does the first request that is seen of a connection begin with this segment, or in front of it, as its answer says? A
 * connection whose start was seen is looked at for a while, and then is no HTTP: how often so far is kept in place of
 * the facts that there are none of yet. */
static __always_inline bool opens_connection(struct __sk_buff *skb, const struct tcpio_headers *headers, __u8 direction,
					     struct tcpio_stream *stream, const struct tcp_sock *tp)
{
	__u32 bytes = skb->len - headers->header_bytes, word = 0;
	bool first = is_first_data(headers, bytes, direction, tp);

	if (first || stream->facts)
		stream->facts++;
	if (stream->facts > LOOKS) {
		stream->state = TCPIO_STREAM_OTHER;
		return false;
	}
	if (bytes < sizeof(word))
		return first;
	if (bpf_skb_load_bytes(skb, headers->header_bytes, &word, sizeof(word)))
		return false;
	if (word == TCPIO_ANSWER) {
		hear_answer(skb, headers, direction, stream);
		return false;
	}
	return first && (tcpio_is_method(word, ~0U) || word == TCPIO_PREFACE);
}

/* Anything for `read_requests` in this segment? For most it takes a few comparisons to say no. */
static __always_inline bool may_hold_request(struct __sk_buff *skb, const struct tcpio_headers *headers, __u8 direction,
					     struct tcpio_stream *stream, const struct tcp_sock *tp)
{
	__u32 bytes = skb->len - headers->header_bytes;

	if (skb->len <= headers->header_bytes || stream->state == TCPIO_STREAM_OTHER)
		return false;
	if (stream->state == TCPIO_STREAM_UNKNOWN)
		return opens_connection(skb, headers, direction, stream, tp);
	if (stream->direction != direction + 1) {
		if (may_answer(headers, stream))
			hear_answer(skb, headers, direction, stream);
		return false;
	}
	if (tcpio_stream_skips(stream, headers->seq))
		return stream->in_context;
	return tcpio_stream_at(stream, headers->seq, bytes) < bytes || stream->state == TCPIO_STREAM_FRAMES;
}

/* Published contexts. */

/* Does the thread that runs hold this socket, and so send for itself? In a softirq that comes in between, nobody does.
 */
static __always_inline bool sends_itself(struct tcp_sock *tp)
{
	return BPF_CORE_READ(tp, inet_conn.icsk_inet.sk.sk_lock.owned);
}

/* Notes when the thread that sends new data serves another context than the one that sent before. */
static __noinline void read_published(const struct context *context, const struct tcpio_headers *headers,
				      struct tcp_sock *tp, struct tcpio_owner *owner)
{
	__u64 thread = bpf_get_current_pid_tgid(), span;
	const struct identifiers *now;
	struct identifiers ids = {};
	struct tcpio_record *record;
	void *ring;

	if (!sends_itself(tp))
		return;
	now = bpf_map_lookup_elem(&published_contexts, &thread);
	if (now)
		ids = *now;
	__builtin_memcpy(&span, ids.span_id, sizeof(span));
	if (span == owner->published)
		return;
	owner->published = span;
	record = reserve_context(context, &ring, tp, owner);
	if (!record)
		return;
	record->context.origin = TCPIO_ORIGIN_PUBLISHED;
	__builtin_memcpy(record->context.trace_id, ids.trace_id, 16);
	__builtin_memcpy(record->context.span_id, ids.span_id, 8);
	place_context(record, TCPIO_TRANSMIT, headers->seq, headers->ack);
	submit(context, ring, record);
}

/* The socket option. */

/* A kernel pointer to a socket that no helper gives one for: its address takes the way through memory. */
static __always_inline struct sock *kernel_socket(struct scratch *scratch, struct bpf_sock *sk)
{
	*(struct bpf_sock *volatile *)&scratch->socket = sk;
	return (struct sock *)*(volatile __u64 *)&scratch->socket;
}

/* Reports what the application says; false when it says nothing that makes sense. */
static __always_inline bool take_tag(struct bpf_sock *sk, const __u8 value[OPTION_BYTES], bool shared)
{
	__u64 parts[3];
	struct tcpio_record *record;
	struct tcpio_owner *owner;
	struct tcpio_tuple tuple;
	struct context context;
	struct scratch *scratch;
	struct tcp_sock *tp;
	__u32 sent, received;
	void *ring;
	__u8 state;

	__builtin_memcpy(parts, value, sizeof(parts));
	if (sk->type != SOCK_STREAM || sk->protocol != IPPROTO_TCP || !enter_with_scratch(&context, &scratch) ||
	    !(parts[0] | parts[1]) != !parts[2])
		return false;
	tp = (struct tcp_sock *)kernel_socket(scratch, sk);
	state = BPF_CORE_READ(tp, inet_conn.icsk_inet.sk.__sk_common.skc_state);
	if (state == TCP_LISTEN || state == TCP_CLOSE)
		return false;
	owner = bpf_sk_storage_get(&owners, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!owner)
		return false;
	sent = BPF_CORE_READ(tp, write_seq);
	received = BPF_CORE_READ(tp, rcv_nxt);
	owner->idle_tags = owner->contexts && owner->tagged_at == sent + received ? owner->idle_tags + 1 : 0;
	owner->tagged_at = sent + received;
	if (owner->idle_tags > IDLE_TAGS) {
		owner->idle_tags = IDLE_TAGS + 1;
		return false;
	}
	fill_tuple(&tuple, (struct sock *)tp);
	if (!wanted_fact(&context, &tuple, owner))
		return true;
	record = reserve_context(&context, &ring, tp, owner);
	if (!record)
		return true;
	record->context.origin = TCPIO_ORIGIN_TAG;
	record->context.context_marks = (shared ? TCPIO_CONTEXT_SHARED : 0) |
					(state == TCP_SYN_SENT || state == TCP_SYN_RECV ? TCPIO_CONTEXT_EARLY : 0);
	record->context.sent_seq = sent;
	record->context.received_seq = received;
	__builtin_memcpy(record->context.trace_id, parts, 16);
	__builtin_memcpy(record->context.span_id, &parts[2], 8);
	submit(&context, ring, record);
	return true;
}

/* Runs at every setsockopt of the host. Before 6.5 the kernel refuses an option longer than a page unless its length is
 * set to 0, which means that it goes on with the caller's own; for a shorter one that would undo what others' programs
 * did. */
SEC("cgroup/setsockopt")
int tcpio_option(struct bpf_sockopt *ctx)
{
	__u8 *value = ctx->optval, *end = ctx->optval_end;
	struct bpf_sock *sk = ctx->sk;

	/* Another agent's program may have taken it before: it is for all of them. */
	if (ctx->level == OPTION_LEVEL && (ctx->optlen == OPTION_BYTES || ctx->optlen == TAKEN) &&
	    value + OPTION_BYTES <= end && sk &&
	    (ctx->optname == OPTION_CONTEXT || ctx->optname == OPTION_SHARED_CONTEXT) &&
	    take_tag(sk, value, ctx->optname == OPTION_SHARED_CONTEXT))
		ctx->optlen = TAKEN;
	else if (ctx->optlen > end - value)
		ctx->optlen = 0;
	return 1;
}

#endif
