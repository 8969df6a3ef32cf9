/*
 * The probe's reading of HTTP heads, compiled for this machine under sanitizers and fed by libFuzzer: http.h and the
 * part of context.h that drives it, with the kernel's helpers replaced by stand-ins. The input is a stream of bytes and
 * how it is cut into segments. A slow parser, which sees the stream and shares no code with the probe's, says what
 * requests there are: what the probe reports must be among them, and where none of the probe's limits applies it must
 * be all of them. The limits: a method that it knows, a first line that is whole in the request's first chunk, no
 * folded lines, up to eight blanks on either side of a value, lines of less than 126 bytes, as many lines and chunks as
 * it takes, and no interruption at the wrong moment. Behind a request that one of them hides, it may miss all others
 * until the peer has answered.
 *
 * Input: the sequence number of the first byte (four bytes), the number of steps (one), the steps (three bytes each:
 * what, and a length), and the stream, whose rest goes out in one segment once the steps are done.
 */
#include <assert.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <linux/bpf.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>

#define SEC(name)
#define __uint(name, value) int(*name)[value]
#define __type(name, value) value *name
#define __noinline __attribute__((noinline))
#define barrier() asm volatile("" ::: "memory")
#define BPF_CORE_READ(from, ...) ((void)(from), 0) /* of what this does not test */

#define HEADER_BYTES 52
#define STREAM_BYTES 16384
#define REQUESTS 512
#define REPORTS 1024

struct sock;
struct tcp_sock {
	uint64_t bytes_sent;
	uint64_t bytes_received;
	uint32_t rcv_nxt;
};
struct scratch {
	uint64_t socket;
};

static void *bpf_map_lookup_elem(void *map, const void *key);

#include "record.h"
#include "http.h"
#include "packet.h"
#include "filter.h"

/* The kernel's part: one socket, one segment at a time, and a ring that is never full. */

struct context {
	int unused;
};

static const uint8_t *payload; /* of the segment that is on its way */
static uint32_t payload_bytes;
static int owners;
static struct tcpio_owner socket_owner;
static bool interrupted_loading, interrupted_reporting, interrupted_keeping; /* another program takes this CPU's head */
static uint64_t now_ns;

static long bpf_skb_load_bytes(const struct __sk_buff *skb, __u32 offset, void *to, __u32 bytes);
static void *bpf_sk_storage_get(void *map, void *sk, void *value, __u64 flags);
static void submit(const struct context *context, void *ring, struct tcpio_record *record);

static struct bpf_sock *bpf_sk_fullsock(struct bpf_sock *sk)
{
	return sk;
}

static struct tcp_sock *bpf_skc_to_tcp_sock(void *sk)
{
	return sk;
}

static uint64_t bpf_ktime_get_boot_ns(void)
{
	return ++now_ns;
}

static uint64_t bpf_get_current_pid_tgid(void)
{
	return 1;
}

static void bpf_ringbuf_discard(void *record, __u64 flags)
{
	(void)record, (void)flags;
}

static bool enter(struct context *context)
{
	(void)context;
	return true;
}

static bool enter_with_scratch(struct context *context, struct scratch **scratch)
{
	(void)context, (void)scratch;
	return false;
}

static struct tcpio_record *reserve_fact(const struct context *context, void **ring);

static void fill_tuple(struct tcpio_tuple *tuple, const struct sock *sk)
{
	(void)tuple, (void)sk;
}

static void fill_owner(struct tcpio_record *record, const struct tcpio_owner *owner)
{
	(void)record, (void)owner;
}

static bool wanted_fact(const struct context *context, const struct tcpio_tuple *tuple, const struct tcpio_owner *owner)
{
	(void)context, (void)tuple, (void)owner;
	return true;
}

#define SOCK_STREAM 1
#define TCP_SYN_SENT 2
#define TCP_SYN_RECV 3
#define TCP_CLOSE 7
#define TCP_LISTEN 10
#define FLAG_SYN 0x02
#define FLAG_ACK 0x10

#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wunused-function"
#pragma clang diagnostic ignored "-Wunused-variable"
#pragma clang diagnostic ignored "-Wunused-const-variable"
#include "context.h"
#pragma clang diagnostic pop

static struct tcpio_head this_cpus_head;
static struct unfinished sockets_unfinished;
static bool has_unfinished;

static void *bpf_map_lookup_elem(void *map, const void *key)
{
	(void)key;
	return map == &heads ? &this_cpus_head : NULL;
}

/* What another socket's head leaves behind. */
static void interrupt(void)
{
	static const char decoy[] = "\ntraceparent: 00-eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee-eeeeeeeeeeeeeeee-01\r\n\r\n";
	struct tcpio_head *head = &this_cpus_head;

	head->user = bpf_ktime_get_boot_ns() << 1;
	memset(head->trace_id, 0xee, sizeof(head->trace_id));
	memset(head->span_id, 0xee, sizeof(head->span_id));
	memset(head->text, 'e', TCPIO_TEXT_BYTES);
	memcpy(head->text + TCPIO_TAIL_BYTES - 1, decoy, sizeof(decoy) - 1);
	head->text_bytes = TCPIO_TAIL_BYTES + sizeof(decoy) - 2;
	head->facts = TCPIO_HEAD_SEEN | TCPIO_HEAD_TRACEPARENT | TCPIO_HEAD_ENDED | TCPIO_HEAD_SIZED;
	head->length_bytes = 3;
	head->end = TCPIO_TAIL_BYTES + 1;
	head->last_line_feed = TCPIO_TAIL_BYTES - 1;
}

static struct tcpio_record *reserve_fact(const struct context *context, void **ring)
{
	static struct tcpio_record record;

	(void)context, (void)ring;
	memset(&record, 0, sizeof(record));
	if (interrupted_reporting) {
		interrupted_reporting = false;
		interrupt();
	}
	return &record;
}

static long bpf_skb_load_bytes(const struct __sk_buff *skb, __u32 offset, void *to, __u32 bytes)
{
	assert(skb->len == HEADER_BYTES + payload_bytes && offset >= HEADER_BYTES);
	offset -= HEADER_BYTES;
	if (!bytes || offset > payload_bytes || bytes > payload_bytes - offset)
		return -1;
	memcpy(to, payload + offset, bytes);
	if (interrupted_loading && to == this_cpus_head.text + TCPIO_TAIL_BYTES) {
		interrupted_loading = false;
		interrupt();
	}
	return 0;
}

static void *bpf_sk_storage_get(void *map, void *sk, void *value, __u64 flags)
{
	(void)sk, (void)value;
	if (map == &owners)
		return &socket_owner;
	assert(map == &unfinished_heads);
	if (interrupted_keeping && flags) {
		interrupted_keeping = false;
		interrupt();
	}
	if (!has_unfinished && flags)
		memset(&sockets_unfinished, 0, sizeof(sockets_unfinished));
	has_unfinished |= flags;
	return has_unfinished ? &sockets_unfinished : NULL;
}

/* What was reported: ids from a place in the stream on, or that there are none from there on. */

struct ids {
	uint8_t origin; /* 0: there are none */
	uint8_t trace_id[16];
	uint8_t span_id[8];
};

static struct report {
	size_t at;
	uint32_t ack;
	bool shared; /* of HTTP/2: fuzz_http2.c looks at those */
	struct ids ids;
} reports[REPORTS];
static size_t report_count;

static struct {
	uint32_t seq;	  /* of the stream's first byte */
	uint32_t ack;	  /* what its sender has received */
	size_t delivered; /* of the stream, by the way that the probe watches or by another */
	bool sent;	  /* by the host on which the probe runs */
	size_t host_sent; /* what that host has sent, what it has received */
	size_t host_received;
} place;

/* What the kernel knows when a segment comes by. */
static struct tcp_sock kernels_numbers(void)
{
	return (struct tcp_sock){ .bytes_sent = place.host_sent,
				  .bytes_received = place.host_received,
				  .rcv_nxt = place.sent ? place.ack : place.seq + (uint32_t)place.delivered };
}

static void submit(const struct context *context, void *ring, struct tcpio_record *record)
{
	struct report *report = &reports[report_count++];
	uint32_t seq = place.sent ? record->context.sent_seq : record->context.received_seq;

	(void)context, (void)ring;
	assert(report_count < REPORTS);
	memset(report, 0, sizeof(*report));
	report->at = (uint32_t)(seq - place.seq);
	report->ack = place.sent ? record->context.received_seq : record->context.sent_seq;
	report->shared = record->context.context_marks == TCPIO_CONTEXT_SHARED;
	memcpy(report->ids.trace_id, record->context.trace_id, 16);
	memcpy(report->ids.span_id, record->context.span_id, 8);
	assert(memcmp(report->ids.span_id, "\xee\xee\xee\xee\xee\xee\xee\xee", 8)); /* another socket's */
	for (int i = 0; i < 16; i++)
		if (report->ids.trace_id[i])
			report->ids.origin = record->context.origin;
}

/* The report that holds for a byte of the stream; NULL: none does. */
static const struct report *report_for(size_t at)
{
	const struct report *found = NULL;

	for (size_t i = 0; i < report_count; i++)
		if (reports[i].at <= at && !reports[i].shared && (!found || reports[i].at >= found->at))
			found = &reports[i];
	return found;
}

static bool same_ids(const struct ids *one, const struct ids *other)
{
	return one->origin == other->origin && !memcmp(one->trace_id, other->trace_id, 16) &&
	       !memcmp(one->span_id, other->span_id, 8);
}

/* The slow parser. It reads a stream from the start of a request on, again each time that more of it is known. */

struct request {
	size_t start;
	size_t line_end; /* where its first line ends; 0: not yet */
	size_t head_end; /* where its body begins; 0: not yet */
	size_t body_bytes;
	bool unclear; /* the body's length cannot be told */
	bool sized;
	bool odd; /* the probe's limits allow it to see less in this head than there is, though never more */
	struct ids ids;
	/* Known only when it was found. */
	uint32_t ack;
	bool expected; /* no limit of the probe's allows it to miss this request */
};

static const char lower_hex[] = "0123456789abcdef";

static bool read_hex(const char *text, size_t digits, uint8_t *to)
{
	bool any = false;

	for (size_t i = 0; i < digits; i++) {
		const char *digit = text[i] ? strchr(lower_hex, text[i]) : NULL;

		if (!digit)
			return false;
		any |= digit != lower_hex;
		to[i / 2] = (uint8_t)(to[i / 2] << 4 | (digit - lower_hex));
	}
	return any;
}

static bool all_hex(const char *text, size_t digits)
{
	uint8_t ignored[16] = { 0 };

	return read_hex(text, digits, ignored) || (strspn(text, "0") >= digits);
}

/* W3C Trace Context section 3.2. The value is terminated by a zero, and so is what follows. */
static struct ids read_traceparent(const char *value, size_t bytes)
{
	struct ids none = { 0 }, ids = { .origin = TCPIO_ORIGIN_TRACEPARENT };

	if (bytes < 55 || value[2] != '-' || value[35] != '-' || value[52] != '-')
		return none;
	if (!all_hex(value, 2) || !strncmp(value, "ff", 2) || !all_hex(value + 53, 2))
		return none;
	if (bytes > 55 && (!strncmp(value, "00", 2) || value[55] != '-'))
		return none;
	if (!read_hex(value + 3, 32, ids.trace_id) || !read_hex(value + 36, 16, ids.span_id))
		return none;
	return ids;
}

/* B3's single header: {32 or 16 digits}-{16}[-{0|1|d}[-{16}]]. Ids that are all zero are none. */
static struct ids read_b3(const char *value, size_t bytes)
{
	struct ids none = { 0 }, ids = { .origin = TCPIO_ORIGIN_B3 };
	size_t digits = bytes > 32 && value[32] == '-' ? 32 : 16;

	if (bytes < digits + 17 || value[digits] != '-')
		return none;
	if (!read_hex(value, digits, ids.trace_id + 16 - digits / 2) || !read_hex(value + digits + 1, 16, ids.span_id))
		return none;
	value += digits + 17;
	bytes -= digits + 17;
	if (!bytes)
		return ids;
	if (bytes < 2 || value[0] != '-' || !strchr("01d", value[1]) || !value[1])
		return none;
	if (bytes == 2 || (bytes == 19 && value[2] == '-' && all_hex(value + 3, 16)))
		return ids;
	return none;
}

static bool is_blank(uint8_t byte)
{
	return byte == ' ' || byte == '\t';
}

/* Where the line that begins at `at` ends, its line feed included; 0: not before `end`. */
static size_t line_end(const uint8_t *stream, size_t at, size_t end)
{
	for (; at < end; at++)
		if (stream[at] == '\n')
			return at + 1;
	return 0;
}

/* A line without its end. */
static size_t line_bytes(const uint8_t *stream, size_t at, size_t end)
{
	size_t bytes = end - at - 1;

	return bytes && stream[at + bytes - 1] == '\r' ? bytes - 1 : bytes;
}

/* METHOD SP target SP HTTP/1.0 or HTTP/1.1. */
static bool is_request_line(const uint8_t *line, size_t bytes)
{
	const uint8_t *space = memchr(line, ' ', bytes);

	if (!space || space == line || bytes < 10)
		return false;
	if (memcmp(line + bytes - 9, " HTTP/1.0", 9) && memcmp(line + bytes - 9, " HTTP/1.1", 9))
		return false;
	return space < line + bytes - 9;
}

/* Is a line the header `name`? */
static bool is_header(const uint8_t *line, size_t bytes, const char *name)
{
	return bytes > strlen(name) && !strncasecmp((const char *)line, name, strlen(name)) &&
	       line[strlen(name)] == ':';
}

/* The value of the header whose line begins at `at`, lines that are folded onto it included (RFC 9112 section 5.2);
 * terminated by a zero. */
static size_t header_value(char *value, const uint8_t *stream, size_t at, size_t end)
{
	size_t bytes = 0, first = 0, next = line_end(stream, at, end);
	size_t from = at + (size_t)((const uint8_t *)memchr(stream + at, ':', next - at) - (stream + at)) + 1;

	memcpy(value, stream + from, line_bytes(stream, at, next) - (from - at));
	bytes = line_bytes(stream, at, next) - (from - at);
	while (next < end && is_blank(stream[next]) && line_end(stream, next, end)) {
		at = next;
		next = line_end(stream, at, end);
		memcpy(value + bytes, stream + at, line_bytes(stream, at, next));
		bytes += line_bytes(stream, at, next);
	}
	while (bytes && is_blank((uint8_t)value[bytes - 1]))
		bytes--;
	while (first < bytes && is_blank((uint8_t)value[first]))
		first++;
	memmove(value, value + first, bytes - first);
	value[bytes - first] = 0;
	return bytes - first;
}

/* Are there more blanks than the probe skips, before or behind a value? */
static bool has_many_blanks(const uint8_t *line, size_t bytes)
{
	const uint8_t *colon = memchr(line, ':', bytes);
	size_t before = 0, behind = 0;

	while (colon + 1 + before < line + bytes && is_blank(colon[1 + before]))
		before++;
	while (behind < bytes && is_blank(line[bytes - 1 - behind]))
		behind++;
	return before > 8 || behind > 8;
}

/* A length of one to nine digits. */
static bool read_length(const char *value, size_t bytes, size_t *length)
{
	*length = 0;
	for (size_t i = 0; i < bytes; i++) {
		if (value[i] < '0' || value[i] > '9')
			return false;
		*length = *length * 10 + (size_t)(value[i] - '0');
		if (i == 9)
			return false;
	}
	return bytes;
}

/* Reads the request that begins at `start`, of a stream of which the bytes up to `end` are known; false: it is none. */
static bool read_request(struct request *request, const uint8_t *stream, size_t start, size_t end)
{
	static char value[STREAM_BYTES + 1];
	size_t at = line_end(stream, start, end), next, traceparents = 0, b3s = 0, lengths = 0;
	struct ids traceparent = { 0 }, b3 = { 0 };

	memset(request, 0, sizeof(*request));
	request->start = start;
	if (!at)
		return true;
	if (!is_request_line(stream + start, line_bytes(stream, start, at)))
		return false;
	request->line_end = at;
	for (; (next = line_end(stream, at, end)); at = next) {
		const uint8_t *line = stream + at;
		size_t bytes = line_bytes(stream, at, next);

		if (!bytes) {
			request->head_end = next;
			break;
		}
		if (is_header(line, bytes, "traceparent")) {
			traceparents++;
			traceparent = read_traceparent(value, header_value(value, stream, at, end));
		} else if (is_header(line, bytes, "b3")) {
			b3s++;
			b3 = read_b3(value, header_value(value, stream, at, end));
		} else if (is_header(line, bytes, "content-length")) {
			request->unclear |=
				lengths++ || has_many_blanks(line, bytes) ||
				!read_length(value, header_value(value, stream, at, end), &request->body_bytes);
		} else if (is_header(line, bytes, "transfer-encoding")) {
			request->unclear = true;
		} else {
			request->odd |= is_blank(line[0]); /* a head with folded lines has no ids for the probe */
			continue;
		}
		request->odd |= has_many_blanks(line, bytes) || bytes >= TCPIO_TAIL_BYTES - 2;
	}
	request->sized = lengths;
	if (traceparents == 1)
		request->ids = traceparent;
	if (!traceparents && b3s == 1)
		request->ids = b3;
	return true;
}

/* What the slow parser knows of the whole connection. */

static struct {
	struct request requests[REQUESTS];
	size_t count;
	bool open;	/* the last request's head is not complete */
	size_t next;	/* where a request can begin */
	size_t reached; /* how far bytes have come without a gap */
	bool begun;	/* a request was seen: before that, one can begin with any segment */
	bool waiting;	/* no request can begin before the peer has answered */
	bool strayed;	/* what stands at `next` is no request */
	bool lost;	/* one of the probe's limits applies until the peer has answered */
	bool other;	/* HTTP/2: the probe stops for good */
} seen;

static size_t least(size_t one, size_t other)
{
	return one < other ? one : other;
}

/* A method that the probe knows; for a start it takes whatever begins like one. */
static bool begins_request(const uint8_t *start, size_t count, bool exactly)
{
	static const char *const methods[] = { "GET ",	 "POST ",    "PUT ",   "HEAD ",	  "DELETE ",
					       "PATCH ", "OPTIONS ", "TRACE ", "CONNECT " };

	for (size_t i = 0; i < sizeof(methods) / sizeof(*methods); i++) {
		size_t bytes = exactly ? strlen(methods[i]) : least(count, 4);

		if (bytes <= count && !memcmp(start, methods[i], bytes))
			return true;
	}
	return false;
}

/* Follows a segment, the bytes from `start` to `end`, that takes the probe's time in at most `chunks` pieces. */
static void follow(const uint8_t *stream, size_t start, size_t end, size_t chunks)
{
	size_t in_order = seen.next > seen.reached ? seen.next : seen.reached, from;

	if (!seen.begun && !seen.open) {
		if (end - start >= 10 && !memcmp(stream + start, "HTTP/1", 6))
			seen.other = true; /* it looks like an answer, and which end asks is not known yet */
		if (start || place.delivered)
			return; /* not the first: it can lie anywhere */
		if (end - start >= 4 && !memcmp(stream + start, "PRI ", 4))
			seen.other = true;
		if (!begins_request(stream + start, end - start, false))
			return;
		seen.next = in_order = start;
	}
	if (seen.waiting || end <= in_order)
		return;
	if (start > in_order) { /* a head cannot be read on; another request can still come */
		seen.waiting = seen.open;
		seen.lost |= seen.open;
		seen.open = false;
		return;
	}
	seen.reached = end;
	from = in_order;
	while (seen.open || seen.next < end) {
		struct request *request = &seen.requests[seen.count];
		struct request before = { 0 };
		size_t pieces, stop;

		if (!seen.open && (stream[seen.next] == '\n' || stream[seen.next] == '\r')) {
			/* Empty lines before a request do not count (RFC 9112 section 2.2), though the probe knows
			 * nothing of it. */
			seen.lost = true;
			seen.next++;
			from = seen.next;
			continue;
		}
		if (seen.open)
			before = *--request;
		else
			seen.count++;
		assert(seen.count < REQUESTS);
		if (!read_request(request, stream, seen.open ? request->start : seen.next, end)) {
			seen.lost = true;
			seen.count--;
			seen.open = false;
			seen.waiting = seen.strayed = seen.begun;
			return;
		}
		request->ack = seen.open ? before.ack : place.ack;
		stop = request->head_end ? request->head_end : end;
		pieces = (stop - from + TCPIO_CHUNK_BYTES - 1) / TCPIO_CHUNK_BYTES;
		if (seen.open)
			request->expected = before.expected;
		else
			request->expected = !seen.lost && !seen.other &&
					    begins_request(stream + from, end - from, true) && request->line_end &&
					    request->line_end - from <= least(end - from, TCPIO_CHUNK_BYTES);
		request->expected &= !request->odd && pieces <= chunks;
		chunks -= least(chunks, pieces);
		seen.begun = true;
		seen.lost |= !request->expected;
		seen.open = !request->head_end;
		if (seen.open)
			return;
		seen.waiting = request->unclear;
		if (seen.waiting)
			return;
		from = seen.next = request->head_end + request->body_bytes;
	}
}

static void check_report(const struct report *report)
{
	for (size_t i = 0; i < seen.count; i++)
		if (seen.requests[i].start == report->at) {
			assert(same_ids(&seen.requests[i].ids, &report->ids));
			assert(seen.requests[i].ack == report->ack);
			return;
		}
	assert(!"ids where no request begins");
}

/* What is reported by now must be true, and what can be expected must be reported. */
static void check(size_t line_feeds)
{
	const struct report *report;

	for (size_t i = 0; i < report_count; i++)
		if (report_for(reports[i].at) == &reports[i] && reports[i].ids.origin)
			check_report(&reports[i]);
	for (size_t i = 0; i < seen.count; i++) {
		const struct request *request = &seen.requests[i];
		const struct ids none = { 0 };

		if (!request->line_end)
			continue;
		report = report_for(request->start);
		if (report && report->ids.origin)
			assert(report->at == request->start); /* it is not another request's */
		if (request->expected && line_feeds <= TCPIO_WORDS)
			assert(same_ids(&request->ids, report ? &report->ids : &none));
	}
	if (seen.strayed) {
		report = report_for(seen.next);
		assert(!report || !report->ids.origin);
	}
}

/* The connection: segments of the stream, and what its peer sends. */

static void carry(const uint8_t *bytes, size_t count, uint32_t seq, uint32_t ack, bool sent)
{
	static struct bpf_sock sk;
	uint8_t direction = sent ? TCPIO_TRANSMIT : TCPIO_RECEIVE;
	struct tcpio_headers headers = { .seq = seq, .ack = ack, .header_bytes = HEADER_BYTES };
	struct __sk_buff skb = { .sk = &sk, .len = (uint32_t)(HEADER_BYTES + count) };
	struct tcp_sock numbers;

	payload = bytes;
	payload_bytes = (uint32_t)count;
	if (sent)
		place.host_sent += count;
	numbers = kernels_numbers();
	if (may_hold_request(&skb, &headers, direction, &socket_owner.stream, &numbers))
		read_requests(&skb, &headers, direction, &socket_owner.stream);
}

static void answer(const char *line)
{
	carry((const uint8_t *)line, strlen(line), place.ack, place.seq + (uint32_t)place.delivered, !place.sent);
	place.ack += (uint32_t)strlen(line);
	if (place.sent)
		place.host_received += strlen(line);
}

enum step {
	STEP_SEGMENT,  /* the next bytes */
	STEP_LONG,     /* likewise, and many */
	STEP_AGAIN,    /* the last bytes, once more */
	STEP_OVERLAP,  /* likewise, and the next ones behind them */
	STEP_GAP,      /* the next bytes take another way */
	STEP_ANSWER,   /* the peer answers */
	STEP_ANNOUNCE, /* the peer says that it will */
	STEP_PEER,     /* the peer sends something else */
	STEP_KINDS,
	STEP_INTERRUPTED_LOADING = 0x20, /* another program runs in between */
	STEP_INTERRUPTED_REPORTING = 0x40,
	STEP_INTERRUPTED_KEEPING = 0x80,
};

static void run(const uint8_t *steps, size_t step_count, const uint8_t *stream, size_t size)
{
	size_t line_feeds = 0;

	for (size_t i = 0; i < size; i++)
		line_feeds += stream[i] == '\n';
	for (size_t i = 0; i <= step_count; i++) {
		uint8_t what = i < step_count ? steps[3 * i] : STEP_SEGMENT;
		size_t length = i < step_count ? steps[3 * i + 1] + (size_t)256 * steps[3 * i + 2] : size;
		size_t start = place.delivered, end = place.delivered, chunks = CHUNKS;

		switch (what % STEP_KINDS) {
		case STEP_SEGMENT:
			end += i < step_count ? length % 256 : length;
			break;
		case STEP_LONG:
			end += length;
			break;
		case STEP_AGAIN:
			start -= least(start, length);
			break;
		case STEP_OVERLAP:
			start -= least(start, length % 256);
			end += length / 256;
			break;
		case STEP_GAP:
			length = least(size - place.delivered, length % 256);
			place.delivered += length;
			place.host_sent += place.sent ? length : 0;
			place.host_received += place.sent ? 0 : length;
			continue;
		case STEP_ANSWER:
			/* To a request whose length is known a peer answers when it has all of it: to lose count of
			 * that one, and then to be told so too early, would be a limit on top of a limit. */
			if (seen.open || (!seen.waiting && seen.next > place.delivered))
				continue;
			answer("HTTP/1.1 200 OK\r\n");
			seen.next = seen.reached = place.delivered;
			seen.waiting = seen.strayed = seen.lost = false;
			seen.begun = true;
			continue;
		case STEP_ANNOUNCE:
			answer("HTTP/1.1 100 Continue\r\n\r\n");
			continue;
		case STEP_PEER:
			if (seen.begun)
				answer("GET / HTTP/1.1\r\n\r\n");
			continue;
		}
		end = least(end, size);
		if (end == start)
			continue;
		interrupted_loading = what & STEP_INTERRUPTED_LOADING;
		interrupted_reporting = what & STEP_INTERRUPTED_REPORTING;
		interrupted_keeping = what & STEP_INTERRUPTED_KEEPING;
		chunks -= interrupted_loading;
		carry(stream + start, end - start, place.seq + (uint32_t)start, place.ack, place.sent);
		if ((what & STEP_INTERRUPTED_REPORTING && !interrupted_reporting) ||
		    (what & STEP_INTERRUPTED_KEEPING && !interrupted_keeping))
			chunks = 0; /* too late for another try */
		follow(stream, start, end, chunks);
		if (end > place.delivered) {
			place.host_received += place.sent ? 0 : end - place.delivered;
			place.delivered = end;
		}
		check(line_feeds);
		place.ack += 3;
	}
}

/* Takes an input apart, and starts a connection; false: it is none. */
static bool begin(const uint8_t **data, size_t *size, size_t *steps)
{
	if (*size < 5)
		return false;
	memcpy(&place.seq, *data, 4);
	*steps = (*data)[4] % 64;
	*data += 5;
	*size -= 5;
	if (*size < 3 * *steps || *size - 3 * *steps > STREAM_BYTES)
		return false;
	*size -= 3 * *steps;
	place.ack = ~place.seq;
	place.delivered = place.host_sent = place.host_received = 0;
	place.sent = place.seq & 1;
	memset(&socket_owner, 0, sizeof(socket_owner));
	has_unfinished = false;
	report_count = 0;
	return true;
}

#ifndef ENTRY
#define ENTRY LLVMFuzzerTestOneInput
#endif

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int ENTRY(const uint8_t *data, size_t size)
{
	size_t steps;

	if (!begin(&data, &size, &steps))
		return 0;
	memset(&seen, 0, sizeof(seen));
	run(data, steps, data + 3 * steps, size);
	return 0;
}

#ifdef PRINTS_REPORTS
static void print_hex(const uint8_t *bytes, size_t count)
{
	for (size_t i = 0; i < count; i++)
		printf("%02x", bytes[i]);
}

/* Reads inputs, a length of four bytes before each, and prints for each what is reported in the end: where in the
 * stream, and the ids; none where a context ends. */
int main(void)
{
	static uint8_t data[5 + 3 * 64 + STREAM_BYTES];
	uint32_t size;

	while (fread(&size, sizeof(size), 1, stdin) == 1) {
		assert(size <= sizeof(data) && fread(data, 1, size, stdin) == size);
		LLVMFuzzerTestOneInput(data, size);
		for (size_t i = 0; i < report_count; i++) {
			const struct report *report = &reports[i];

			if (!report->shared && report_for(report->at) != report)
				continue;
			printf("%zu:", report->at);
			print_hex(report->ids.trace_id, report->ids.origin ? 16 : 0);
			printf(":");
			print_hex(report->ids.span_id, report->ids.origin ? 8 : 0);
			printf(" ");
		}
		printf("\n");
	}
	return 0;
}
#endif
