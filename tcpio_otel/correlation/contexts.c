/* SPDX-License-Identifier: Apache-2.0 */
/* What `contexts.ContextTable` does with every record: learn where contexts begin, and tell whose each packet is. */
#include <stddef.h>
#include "contexts.h"

enum { FLAG_FIN = 0x01, FLAG_SYN = 0x02, FLAG_RST = 0x04, FLAG_ACK = 0x10 };
enum { RECEIVED = TCPIO_RECEIVE, SENT = TCPIO_TRANSMIT };

/* What Python passes to both functions. */
struct table {
	struct place *places;
	struct contexts *rows;
	struct request *requests;
	const __u8 *flows;
	__u64 flow_stride, server_offset;
};

/* The age of the newest border at or before a sequence number; their count: what lies there is older than any. */
static __u32 border_of(const struct contexts *row, int direction, __u32 seq)
{
	__u32 age = 0;

	while (age < row->count[direction] && !row->borders[age][direction].from_start &&
	       before(seq, row->borders[age][direction].seq))
		age++;
	return age;
}

static struct border *newest(struct contexts *row, int direction)
{
	return row->count[direction] ? &row->borders[0][direction] : NULL;
}

static const struct border *oldest(const struct contexts *row, int direction)
{
	return row->count[direction] ? &row->borders[row->count[direction] - 1][direction] : NULL;
}

/* The bytes that a packet is about: its payload, or the byte that a bare acknowledgement confirms. */
struct span {
	int direction; /* -1: none; it opens or closes the connection */
	__u32 from, to;
	int latest; /* it concerns what is under way, whatever comes later */
};

static struct span span_of(const struct place *place, const struct tcpio_record *record)
{
	int direction = record->packet.direction;
	__u32 seq = record->packet.seq, bytes = record->packet.payload_bytes;
	__u8 flags = record->packet.flags;

	if (bytes)
		return (struct span){ direction, seq, seq + bytes, 0 };
	if (flags & FLAG_RST)
		return (struct span){ direction, seq, seq + 1, 1 };
	/* What meets a TIME_WAIT socket, or none, is about the end. */
	if (flags & (FLAG_SYN | FLAG_FIN) || !(flags & FLAG_ACK) || record->packet.marks & TCPIO_MARK_NO_SOCKET)
		return (struct span){ .direction = -1 };
	if (place->finished >> !direction & 1 && record->packet.ack == place->fin[!direction])
		return (struct span){ .direction = -1 };
	return (struct span){ !direction, record->packet.ack - 1, record->packet.ack, 0 };
}

/*
 * Is it still open whose a packet is? What a server received, and what it confirms, can belong to a context that its
 * application has not told yet; nothing that was sent can, since a context is told before.
 */
static int undecided(const struct place *place, const struct contexts *row, const struct span *span)
{
	const struct border *last;

	if (!place->answers || span->direction != RECEIVED || span->latest)
		return 0;
	if (!row || !row->count[RECEIVED])
		return 1;
	last = &row->borders[0][RECEIVED];
	return !last->open && before(last->seq, span->to) && before(row->known, span->to);
}

/* Stronger claims win where two begin at the same place: what the application says, then what a request says. */
static int rank(__u8 origin)
{
	return origin == TCPIO_ORIGIN_TAG ? 3 : origin == TCPIO_ORIGIN_PUBLISHED ? 1 : 2;
}

/* Puts a border in its place; returns the border that stood there already, if one did, else NULL. */
static struct border *place_border(struct request *requests, struct contexts *row, int direction, struct border border)
{
	__u32 age = border_of(row, direction, border.seq), *count = &row->count[direction];
	struct border *found = &row->borders[age][direction];

	if (age < *count && found->seq == border.seq)
		return found;
	if (*count == KEPT) {
		if (age == *count)
			return NULL; /* older than all that are kept */
		requests[oldest(row, direction)->number].borders--;
		--*count;
	}
	for (__u32 at = *count; at > age; at--)
		row->borders[at][direction] = row->borders[at - 1][direction];
	row->borders[age][direction] = border;
	++*count;
	requests[border.number].borders++;
	return NULL;
}

static void rename_border(struct request *requests, struct border *border, __s32 number, __u8 origin)
{
	requests[border->number].borders--;
	requests[number].borders++;
	border->number = number;
	border->origin = origin;
}

static void supersede(struct request *requests, struct contexts *row, __u64 now_ns)
{
	for (int direction = 0; direction < DIRECTIONS; direction++)
		for (__u32 age = 0; age < row->count[direction]; age++) {
			struct request *request = &requests[row->borders[age][direction].number];

			if (!request->superseded_ns)
				request->superseded_ns = now_ns;
		}
}

/* From here on nothing is known, in both directions. */
static void lose_track(const struct table *table, struct contexts *row, const struct tcpio_record *record)
{
	int direction = record->packet.direction;
	__u32 seq = record->packet.seq, other = record->packet.ack;
	struct border border = { .number = NUMBER_NONE, .origin = TCPIO_ORIGIN_TAG, .open = 1 };

	supersede(table->requests, row, record->time_ns);
	for (int way = 0; way < DIRECTIONS; way++) {
		struct border *there;

		border.seq = way == direction ? seq : other;
		there = place_border(table->requests, row, way, border);
		if (there)
			rename_border(table->requests, there, NUMBER_NONE, TCPIO_ORIGIN_TAG);
	}
	row->serial = record->packet.contexts;
}

static int same_ids(const struct request *one, const struct request *other)
{
	return !memcmp(one->trace_id, other->trace_id, sizeof(one->trace_id) + sizeof(one->span_id));
}

static int has_ids(const struct tcpio_record *record)
{
	static const __u8 none[24];

	return memcmp(record->context.trace_id, none, 16) && memcmp(record->context.span_id, none, 8);
}

static void begin_request(struct request *request, const struct tcpio_record *record, __s64 slot, __u64 born,
			  const __u32 begin[DIRECTIONS])
{
	*request = (struct request){ .slot = slot,
				     .born = born,
				     .began_ns = record->time_ns,
				     .origin = record->context.origin,
				     .marks = record->context.context_marks };
	memcpy(request->trace_id, record->context.trace_id, sizeof(request->trace_id));
	memcpy(request->span_id, record->context.span_id, sizeof(request->span_id));
	for (int direction = 0; direction < DIRECTIONS; direction++)
		request->begin[direction] = request->end[direction] = request->acked[direction] = begin[direction];
}

/* Does a context with these ids go on, rather than begin? The application told it, and the request's head tells it too.
 */
static int goes_on(const struct table *table, struct contexts *row, const struct request *request)
{
	for (int direction = 0; direction < DIRECTIONS; direction++) {
		const struct border *last = newest(row, direction);

		if (!last || last->number < NUMBER_FIRST || !same_ids(&table->requests[last->number], request))
			return 0;
	}
	return 1;
}

/* Where two contexts begin at the same place: whose is it? Who clears a tag takes back no more than a tag. */
static int prevails(const struct tcpio_record *record, const struct border *border, int known)
{
	if (!known && record->context.origin == TCPIO_ORIGIN_TAG)
		return border->origin == TCPIO_ORIGIN_TAG;
	return rank(record->context.origin) >= rank(border->origin);
}

enum { FAR_BACK = 1 << 30 };

/* What a client is told and what it asks begin together; a server is told when it has read what it is asked, which
 * began where it had answered what came before, or, if it has sent nothing so far, with the connection. */
static void place_request(const struct place *place, const struct contexts *row, const struct tcpio_record *record,
			  int server, __u32 begin[DIRECTIONS], int *from_start)
{
	const struct border *first = oldest(row, RECEIVED);

	begin[SENT] = record->context.sent_seq;
	begin[RECEIVED] = record->context.received_seq;
	*from_start =
		record->context.context_marks & TCPIO_CONTEXT_EARLY || (server && !place->sending && !place->receiving);
	/* A TLS server may send its tickets when the request is there already and the application has not read it. */
	if (server && place->sending)
		begin[RECEIVED] = place->answer == record->context.received_seq &&
						  (!row->count[RECEIVED] || !before(place->answer_before, row->known))
					  ? place->answer_before
					  : place->answer;
	else if (server && !*from_start)
		begin[RECEIVED] = first ? first->seq : place->first;
	else if (*from_start)
		begin[RECEIVED] = first ? first->seq : record->context.received_seq - FAR_BACK;
}

/*
 * Takes a context in. `number` is free for it; returns whether it was used.
 */
static int learn(const struct table *table, struct place *place, struct contexts *row,
		 const struct tcpio_record *record, __s64 slot, __s32 number)
{
	int late = record->context.origin == TCPIO_ORIGIN_TAG || record->context.origin == TCPIO_ORIGIN_PUBLISHED;
	int known = has_ids(record), server, from_start, used = 0, begun[DIRECTIONS];
	struct request *request = &table->requests[number];
	struct border *there[DIRECTIONS];
	__u32 begin[DIRECTIONS];
	__s32 named = known ? number : NUMBER_NONE;

	server = late && table->flows[(size_t)slot * table->flow_stride + table->server_offset] != 0;
	row->serial = record->context.serial;
	place_request(place, row, record, server, begin, &from_start);
	if (server) {
		place->answers = ANSWERS_LATE;
		row->known = record->context.received_seq;
	}
	if (known) {
		begin_request(request, record, slot, place->born, begin);
		request->unplaced = (__u8) !!from_start;
	}
	if (record->context.context_marks & TCPIO_CONTEXT_SHARED)
		row->shared = 1;
	if (row->shared)
		named = NUMBER_INTERLEAVED;
	else if (known && goes_on(table, row, request)) {
		for (int direction = 0; direction < DIRECTIONS; direction++)
			newest(row, direction)->open |= !late;
		return 0;
	}
	supersede(table->requests, row, record->time_ns);
	for (int direction = 0; direction < DIRECTIONS; direction++) {
		struct border border = {
			.seq = begin[direction], .origin = record->context.origin, .open = !late, .number = named
		};

		border.from_start = direction == RECEIVED && from_start && !row->count[RECEIVED];
		there[direction] = place_border(table->requests, row, direction, border);
		begun[direction] = !there[direction];
	}
	for (int direction = 0; direction < DIRECTIONS; direction++) {
		struct border *border = there[direction];

		if (!border)
			continue;
		border->open |= !late;
		/* Asked again before there was an answer: whose the answers are is not to be known from here. */
		if (begun[!direction])
			rename_border(table->requests, border, NUMBER_INTERLEAVED, TCPIO_ORIGIN_TAG);
		else if (prevails(record, border, known))
			rename_border(table->requests, border, named, record->context.origin);
	}
	for (int direction = 0; direction < DIRECTIONS; direction++) {
		struct border *last = newest(row, direction);

		used |= last && known && last->number == number;
		if (last)
			table->requests[last->number].superseded_ns = 0;
	}
	return used || (known && row->shared);
}

static inline __attribute__((always_inline)) void see(struct request *request, const struct tcpio_record *record,
						      const struct span *span)
{
	__u64 now_ns = record->time_ns, since_ns = request->last_ns;
	int direction = record->packet.direction;
	__u32 segments = record->packet.gso_segments > 1 ? record->packet.gso_segments : 1;

	if (since_ns && now_ns > since_ns && now_ns - since_ns > request->gap_ns)
		request->gap_ns = now_ns - since_ns;
	if (now_ns > since_ns)
		request->last_ns = now_ns;
	request->packets[direction] += segments;
	if (record->packet.marks & TCPIO_MARK_RETRANSMIT && direction == SENT)
		request->retransmits += segments;
	if (record->packet.payload_bytes) {
		/* What the other end had sent before it heard of the request answers nothing. */
		if (!(request->begun >> direction & 1) &&
		    (!request->begun || before(request->begin[!direction], record->packet.ack))) {
			request->begun |= (__u8)(1 << direction);
			request->first_ns[direction] = now_ns;
			if (request->unplaced && direction == RECEIVED)
				request->begin[direction] = request->end[direction] = span->from;
		}
		if (before(request->end[direction], span->to)) {
			request->payload[direction] +=
				span->to -
				(before(request->end[direction], span->from) ? span->from : request->end[direction]);
			request->end[direction] = span->to;
		}
	}
}

/* An acknowledgement, bare or with data, is noted with the request whose bytes it confirms. */
static void acknowledge(struct request *requests, const struct place *place, const struct contexts *row,
			const struct tcpio_record *record)
{
	int direction = !record->packet.direction;
	__u32 ack = record->packet.ack, age;
	struct request *request;

	if (!(record->packet.flags & FLAG_ACK) || record->packet.flags & (FLAG_SYN | FLAG_RST))
		return;
	if (place->finished >> direction & 1 && ack == place->fin[direction])
		ack--; /* the FIN is nobody's */
	age = border_of(row, direction, ack - 1);
	if (age == row->count[direction])
		return;
	request = &requests[row->borders[age][direction].number];
	if (!before(request->acked[direction], ack) && !(request->unplaced && direction == RECEIVED))
		return;
	request->acked[direction] = ack;
	request->acked_ns[direction] = record->time_ns;
}

/* Numbers of contexts by packet, and, for those that reach over several, which these are. */
struct joined {
	__s64 *numbers;
	__s32 *spans;	     /* 1 + the place in `sets`; 0: no more than one */
	__s64 (*sets)[KEPT]; /* oldest first, then -1 */
	__u64 found;	     /* sets */
	__u64 joined;	     /* packets of which anything is known */
};

/* A packet reaches from the border of age `first`, or from before all of them, to that of age `last`. */
static __attribute__((noinline)) void join_several(const struct table *table, const struct contexts *row,
						   const struct tcpio_record *record, const struct span *span,
						   __u32 first, __u32 last, struct joined *joined, size_t at)
{
	__u32 from = first < row->count[span->direction] ? first : row->count[span->direction] - 1;
	__s64 *set = joined->sets[joined->found++];

	for (int i = 0; i < KEPT; i++)
		set[i] = -1;
	joined->numbers[at] = row->borders[from][span->direction].number;
	joined->spans[at] = (__s32)joined->found;
	for (__u32 age = from + 1; age-- > last;) {
		const struct border *one = &row->borders[age][span->direction];
		struct span part = *span;

		if (age < first && before(part.from, one->seq))
			part.from = one->seq;
		if (age > last)
			part.to = row->borders[age - 1][span->direction].seq;
		*set++ = one->number;
		if (one->number >= NUMBER_FIRST)
			see(&table->requests[one->number], record, &part);
	}
}

/* Whose a packet is whose context is decided; where nobody's, nothing is written. */
static inline __attribute__((always_inline)) void join(const struct table *table, const struct contexts *row,
						       const struct tcpio_record *record, const struct span *span,
						       struct joined *joined, size_t at)
{
	__u32 first, last;

	if (!row || span->direction < 0)
		return;
	first = border_of(row, span->direction, span->from);
	last = first ? border_of(row, span->direction, span->to - 1) : 0;
	if (last == row->count[span->direction])
		return;
	joined->joined++;
	if (first == last) {
		joined->numbers[at] = row->borders[last][span->direction].number;
		if (joined->numbers[at] >= NUMBER_FIRST)
			see(&table->requests[joined->numbers[at]], record, span);
		return;
	}
	join_several(table, row, record, span, first, last, joined, at);
}

/* The call of tcpio_follow that is under way. */
struct following {
	const struct table *table;
	const struct tcpio_record *records;
	struct joined *joined;
	__s32 *next;
	__u8 *waits;
	__u32 pass;
};

static struct contexts *row_of(const struct table *table, const struct place *place)
{
	return place->row < 0 ? NULL : &table->rows[place->row];
}

static void wait_for(struct following *following, struct place *place, size_t at)
{
	if (place->pass != following->pass) {
		place->pass = following->pass;
		place->first_waiting = -1;
	}
	if (place->first_waiting < 0)
		place->first_waiting = (__s32)at;
	else
		following->next[place->last_waiting] = (__s32)at;
	place->last_waiting = (__s32)at;
	following->next[at] = -1;
	following->waits[at] = 1;
}

/* A context came: of what has waited on this connection, join what is decided now. */
static void settle_waiting(struct following *following, struct place *place)
{
	const struct contexts *row = row_of(following->table, place);
	__s32 at;

	if (place->pass != following->pass)
		return;
	at = place->first_waiting;
	place->first_waiting = -1;
	while (at >= 0) {
		const struct tcpio_record *record = &following->records[at];
		struct span span = span_of(place, record);
		__s32 next = following->next[at];

		if (undecided(place, row, &span)) {
			wait_for(following, place, (size_t)at);
		} else {
			following->waits[at] = 0;
			join(following->table, row, record, &span, following->joined, (size_t)at);
		}
		at = next;
	}
}

static inline void finish(struct place *place, const struct tcpio_record *record)
{
	int direction = record->packet.direction;

	place->fin[direction] = record->packet.seq + record->packet.payload_bytes + 1;
	place->finished |= (__u8)(1 << direction);
}

/* Notes how far data has come; true when it is new and was sent. No branch asks for the direction: it cannot be
 * foretold. */
static inline int advance(struct place *place, const struct tcpio_record *record)
{
	__u32 seq = record->packet.seq, ack = record->packet.ack, end = seq + record->packet.payload_bytes;
	__u8 data = record->packet.payload_bytes != 0, sent = data & (record->packet.direction == SENT);
	__u8 fresh = sent & (!place->sending | before(place->high, end));
	__u8 answers = fresh & (!place->sending | (place->answer != ack));
	__u8 received = data & !sent, lower = received & (!place->receiving | before(seq, place->first));

	place->answer_before = answers ? place->sending ? place->answer : ack : place->answer_before;
	place->answer = fresh ? ack : place->answer;
	place->high = fresh ? end : place->high;
	place->first = lower ? seq : place->first;
	place->sending |= sent;
	place->receiving |= received;
	return fresh;
}

/* The same for a connection that may get its contexts late; true when it is clear now that it will not. */
static int await(struct place *place, struct contexts *row, const struct tcpio_record *record, int fresh)
{
	__u32 bytes = record->packet.payload_bytes, end = record->packet.seq + bytes;

	if (fresh) {
		place->turns += place->unanswered && place->turns < PATIENT_TURNS;
		place->unanswered = 0;
	}
	if (record->packet.direction == SENT)
		return place->answers == ANSWERS_PERHAPS && place->turns >= PATIENT_TURNS;
	place->unanswered += bytes;
	/* Until it answers, all that a server receives belongs to what it is asked. */
	if (place->answers == ANSWERS_LATE && row && row->count[SENT] && before(row->known, end) &&
	    !(place->sending && before(newest(row, SENT)->seq, place->high)))
		row->known = end;
	return place->answers == ANSWERS_PERHAPS && place->unanswered > PATIENT_BYTES;
}

/* How many records ahead a table is asked for what they take of it, so that it has come when their turn does. */
enum { AHEAD_PLACE = 24, AHEAD_ROW = 16, AHEAD_REQUEST = 8 };

static inline void fetch_ahead(const struct table *table, const __s64 *slots)
{
	__s64 place = slots[AHEAD_PLACE], row = slots[AHEAD_ROW], request = slots[AHEAD_REQUEST];

	if ((place | row | request) < 0)
		return;
	__builtin_prefetch(&table->places[place], 1);
	row = table->places[row].row;
	request = table->places[request].row;
	if (row >= 0)
		__builtin_prefetch(&table->rows[row], 1);
	if (request >= 0)
		__builtin_prefetch(&table->requests[table->rows[request].borders[0][SENT].number].last_ns, 1);
}

/* What Python passes besides the records: rows and numbers that are free, and room for what there is to say. */
struct exchange {
	const __s32 *numbers;	/* a free one for each context among the records */
	__u8 *taken;		/* by context: whether it was used */
	const __s32 *free_rows; /* as many */
	__s32 *next;		/* scratch, by record */
	__u8 *waits;		/* by record: its context may still come */
	const __u8 *apart;	/* by record: another wait is not over, so join it another time; NULL: none */
	struct joined joined;
	__u64 rows_used, lost;
	__u64 pass;
};

static void follow_context(struct following *following, struct exchange *exchange, struct place *place,
			   const struct tcpio_record *record, __s64 slot, size_t context)
{
	const struct table *table = following->table;

	if (place->row < 0) {
		place->row = exchange->free_rows[exchange->rows_used++];
		memset(&table->rows[place->row], 0, sizeof(struct contexts));
	}
	exchange->taken[context] =
		(__u8)learn(table, place, &table->rows[place->row], record, slot, exchange->numbers[context]);
	settle_waiting(following, place);
}

/*
 * Follows records in time order, and joins packets as it goes. The first `waiting` of them are packets that it was
 * given before and that still wait.
 */
void tcpio_follow(const struct table *table, const struct tcpio_record *records, const __s64 *slots, size_t count,
		  size_t waiting, struct exchange *exchange)
{
	struct following following = { .table = table,
				       .records = records,
				       .joined = &exchange->joined,
				       .next = exchange->next,
				       .waits = exchange->waits,
				       .pass = (__u32)exchange->pass };
	const struct table tables = *table; /* so that it is not read again and again */
	const __u8 *apart = exchange->apart;
	size_t context = 0;

	memset(exchange->waits, 0, count);
	memset(exchange->joined.numbers, 0, count * sizeof(*exchange->joined.numbers)); /* NUMBER_NONE */
	memset(exchange->joined.spans, 0, count * sizeof(*exchange->joined.spans));
	for (size_t i = 0; i < count; i++) {
		const struct tcpio_record *record = &records[i];
		__s64 slot = slots[i];
		struct contexts *row;
		struct place *place;
		struct span span;
		int fresh;

		if (i + AHEAD_PLACE < count)
			fetch_ahead(&tables, &slots[i]);
		if (slot < 0) {
			if (record->kind == TCPIO_CONTEXT)
				exchange->taken[context++] = 0;
			continue;
		}
		place = &tables.places[slot];
		if (i < waiting) {
			wait_for(&following, place, i);
			continue;
		}
		if (record->kind != TCPIO_PACKET) {
			if (record->kind == TCPIO_CONTEXT)
				follow_context(&following, exchange, place, record, slot, context++);
			continue;
		}
		row = row_of(&tables, place);
		if (row && record->packet.contexts && (__s16)(record->packet.contexts - row->serial) > 0) {
			lose_track(table, row, record);
			exchange->lost++;
		}
		if (record->packet.flags & FLAG_FIN)
			finish(place, record);
		fresh = advance(place, record);
		if (place->answers && record->packet.payload_bytes && await(place, row, record, fresh)) {
			place->answers = ANSWERS_NEVER;
			settle_waiting(&following, place);
		}
		if (!row && !place->answers)
			continue;
		if (row)
			acknowledge(tables.requests, place, row, record);
		if (apart && apart[i])
			continue;
		span = span_of(place, record);
		if (undecided(place, row, &span))
			wait_for(&following, place, i);
		else
			join(&tables, row, record, &span, &exchange->joined, i);
	}
}

/* Joins packets that did not wait for a context, but for something else. */
void tcpio_join(const struct table *table, const struct tcpio_record *records, const __s64 *slots, size_t count,
		struct joined *joined)
{
	for (size_t i = 0; i < count; i++) {
		const struct place *place = &table->places[slots[i]];
		const struct contexts *row = row_of(table, place);
		struct span span = span_of(place, &records[i]);

		joined->numbers[i] = NUMBER_NONE;
		joined->spans[i] = 0;
		if (undecided(place, row, &span))
			row = NULL;
		join(table, row, &records[i], &span, joined, i);
	}
}

/* The structures that Python lays out too: their sizes, and where some of what is far behind stands in them. */
void tcpio_context_layout(__s64 *layout)
{
	layout[0] = sizeof(struct place);
	layout[1] = sizeof(struct contexts);
	layout[2] = sizeof(struct request);
	layout[3] = sizeof(struct joined);
	layout[4] = sizeof(struct exchange);
	layout[5] = offsetof(struct place, last_waiting);
	layout[6] = offsetof(struct contexts, borders);
	layout[7] = offsetof(struct request, state);
	layout[8] = offsetof(struct request, last_ns);
	layout[9] = offsetof(struct request, unplaced);
}
