/* SPDX-License-Identifier: Apache-2.0 */
/* What `contexts.ContextTable` does with every record: learn where contexts begin, and tell whose each packet is. */
#include <stddef.h>
#include "contexts.h"
#include "join.h"
#include "learn.h"

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

static void finish(const struct table *table, struct place *place, struct contexts *row,
		   const struct tcpio_record *record)
{
	int direction = record->packet.direction;
	__u32 end = record->packet.seq + record->packet.payload_bytes;

	place->fin[direction] = end + 1;
	place->finished |= (__u8)(1 << direction);
	if (row && row->count[direction])
		reach(table->requests, newest(row, direction), direction, end);
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
			finish(&tables, place, row, record);
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
