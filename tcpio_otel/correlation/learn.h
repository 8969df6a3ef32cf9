/* SPDX-License-Identifier: Apache-2.0 */
/* What a record of kind context changes: where contexts begin. Included by contexts.c. */
#ifndef TCPIO_LEARN_H
#define TCPIO_LEARN_H

#include "contexts.h"

/* Stronger claims win where two begin at the same place: what the application says, then what a request says. */
static int rank(__u8 origin)
{
	return origin == TCPIO_ORIGIN_TAG ? 3 : origin == TCPIO_ORIGIN_PUBLISHED ? 1 : 2;
}

/* Puts a border in its place; returns the border that stood there already, if one did, else NULL. */
static struct border *place_border(struct request *requests, struct contexts *row, int direction, struct border border)
{
	__u32 age = border_of(row, direction, border.seq), *count = &row->count[direction];

	if (age < *count && row->borders[age][direction].seq == border.seq)
		return &row->borders[age][direction];
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

/* Up to `seq` all is this context's, also what came before anybody knew whose it was. */
static void reach(struct request *requests, const struct border *border, int direction, __u32 seq)
{
	struct request *request = &requests[border->number];

	if (border->number < NUMBER_FIRST || !before(request->end[direction], seq) ||
	    (request->unplaced && direction == RECEIVED))
		return;
	request->payload[direction] += seq - request->end[direction];
	request->end[direction] = seq;
}

/* A border was placed at `seq`: what lies before it is the older one's. */
static void complete(struct request *requests, const struct contexts *row, int direction, __u32 seq)
{
	__u32 older = border_of(row, direction, seq) + 1;

	if (older < row->count[direction])
		reach(requests, &row->borders[older][direction], direction, seq);
}

/* From here on nothing is known, in both directions. */
static TCPIO_SELDOM void lose_track(const struct table *table, struct place *place, const struct tcpio_record *record)
{
	struct contexts *row = &table->rows[place->row];
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
	place->serial = record->packet.contexts;
	show_newest(place, row);
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

/* Nobody followed how far a connection came, so all that it has received counts as answered. */
static void start_watching(struct place *place, const struct tcpio_record *record)
{
	place->answer = place->answer_before = place->first = record->context.received_seq;
	place->high = record->context.sent_seq;
	place->sending = place->receiving = 1;
	place->unanswered = 0;
}

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
						  (!row->count[RECEIVED] || !before(place->answer_before, place->known))
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
	int known = has_ids(record), server, unwatched, from_start, used = 0, begun[DIRECTIONS];
	struct request *request = &table->requests[number];
	struct border *there[DIRECTIONS];
	__u32 begin[DIRECTIONS];
	__s32 named = known ? number : NUMBER_NONE;

	server = late && table->flows[(size_t)slot * table->flow_stride + table->server_offset] != 0;
	place->serial = record->context.serial;
	unwatched = server && place->answers == ANSWERS_NEVER;
	if (unwatched)
		start_watching(place, record);
	place_request(place, row, record, server, begin, &from_start);
	if (server) {
		place->answers = ANSWERS_LATE;
		place->known = record->context.received_seq;
	}
	if (known) {
		begin_request(request, record, slot, place->born, begin);
		request->unplaced = (__u8) !!from_start;
	}
	if (unwatched)
		begin[RECEIVED]--; /* at least the last byte that it has read is its own, if it comes again */
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
		if (begun[direction])
			complete(table->requests, row, direction, begin[direction]);
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
		/* A server is told when it has read its request: so much of it has come already. */
		if (last && server && direction == RECEIVED && last->number == number)
			reach(table->requests, last, direction, record->context.received_seq);
	}
	return used || (known && row->shared);
}

#endif
