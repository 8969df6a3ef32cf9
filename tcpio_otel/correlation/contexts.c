/* SPDX-License-Identifier: Apache-2.0 */
/* What `contexts.ContextTable` does with every record: learn where contexts begin, and tell whose each packet is. */
#include <stddef.h>
#include "contexts.h"
#include "join.h"
#include "learn.h"

/* What Python passes besides the records of a batch: rows and numbers that are free, and room for what there is to say.
 * Packets are numbered as they come: those that already wait first, then the batch's. */
struct exchange {
	const struct tcpio_record *earlier; /* packets that it was given before and that still wait, and their slots */
	const __s64 *earlier_slots;
	__u64 earlier_count;
	const __s32 *numbers;	/* a free one for each context among the records */
	__u8 *taken;		/* by context: whether it was used */
	const __s32 *free_rows; /* as many */
	const __u8 *apart;	/* by packet of the batch: another wait is not over, so join it later; NULL: none */
	__s32 *next;		/* scratch, by packet */
	__s32 *places;		/* likewise: where a packet that waits stands among the records */
	__u8 *waits;		/* by packet: its context may still come */
	struct joined joined;
	/* Set here. */
	__u64 rows_used, lost;
	__u64 passes;
};

/* The call of tcpio_follow that is under way. */
struct following {
	const struct table *table;
	const struct tcpio_record *records;
	struct exchange *exchange;
	size_t context; /* how many came */
	__u32 pass;
};

static struct contexts *row_of(const struct table *table, const struct place *place)
{
	return place->row < 0 ? NULL : &table->rows[place->row];
}

/* Lets a packet wait; `places` says which record it is, unless it waited before. */
static void wait_for(struct following *following, struct place *place, size_t packet)
{
	struct exchange *exchange = following->exchange;

	if (place->pass != following->pass) {
		place->pass = following->pass;
		place->first_waiting = -1;
	}
	if (place->first_waiting < 0)
		place->first_waiting = (__s32)packet;
	else
		exchange->next[place->last_waiting] = (__s32)packet;
	place->last_waiting = (__s32)packet;
	exchange->next[packet] = -1;
	exchange->waits[packet] = 1;
}

/* A context came: of what has waited on this connection, join what is decided now. */
static void settle_waiting(struct following *following, struct place *place)
{
	const struct contexts *row = row_of(following->table, place);
	struct exchange *exchange = following->exchange;
	__s32 packet;

	if (place->pass != following->pass)
		return;
	packet = place->first_waiting;
	place->first_waiting = -1;
	while (packet >= 0) {
		size_t at = (size_t)packet;
		const struct tcpio_record *record = at < exchange->earlier_count
							    ? &exchange->earlier[at]
							    : &following->records[exchange->places[at]];
		struct span span = span_of(place, record);

		packet = exchange->next[at];
		if (undecided(place, row, &span)) {
			wait_for(following, place, at);
		} else {
			exchange->waits[at] = 0;
			join(following->table, row, record, &span, &exchange->joined, at);
		}
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

static void follow_context(struct following *following, const struct tcpio_record *record, __s64 slot)
{
	const struct table *table = following->table;
	struct exchange *exchange = following->exchange;
	size_t context = following->context++;
	struct place *place = &table->places[slot];

	if (place->row < 0) {
		place->row = exchange->free_rows[exchange->rows_used++];
		memset(&table->rows[place->row], 0, sizeof(struct contexts));
	}
	exchange->taken[context] =
		(__u8)learn(table, place, &table->rows[place->row], record, slot, exchange->numbers[context]);
	settle_waiting(following, place);
}

/* Follows records in time order, and joins packets as it goes. */
void tcpio_follow(const struct table *table, const struct tcpio_record *records, const __s64 *slots, size_t count,
		  struct exchange *exchange)
{
	const struct table tables = *table; /* so that it is not read again and again */
	const __u8 *apart = exchange->apart;
	size_t earlier = exchange->earlier_count, packet = earlier;
	struct following following = {
		.table = &tables, .records = records, .exchange = exchange, .pass = (__u32)++exchange->passes
	};

	exchange->rows_used = exchange->lost = 0;
	exchange->joined.found = exchange->joined.joined = 0;
	memset(exchange->waits, 0, exchange->joined.room);
	for (size_t i = 0; i < earlier; i++)
		wait_for(&following, &tables.places[exchange->earlier_slots[i]], i);
	for (size_t i = 0; i < count; i++) {
		const struct tcpio_record *record = &records[i];
		__s64 slot = slots[i];
		struct contexts *row;
		struct place *place;
		struct span span;
		size_t at;
		int fresh;

		if (i + AHEAD_PLACE < count)
			fetch_ahead(&tables, &slots[i]);
		if (record->kind != TCPIO_PACKET) {
			if (record->kind != TCPIO_CONTEXT)
				continue;
			if (slot < 0)
				exchange->taken[following.context++] = 0;
			else
				follow_context(&following, record, slot);
			continue;
		}
		at = packet++;
		if (slot < 0)
			continue;
		place = &tables.places[slot];
		row = row_of(&tables, place);
		if (row && record->packet.contexts && (__s16)(record->packet.contexts - row->serial) > 0) {
			lose_track(&tables, row, record);
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
		if (apart && apart[at - earlier])
			continue;
		span = span_of(place, record);
		if (undecided(place, row, &span)) {
			exchange->places[at] = (__s32)i;
			wait_for(&following, place, at);
		} else {
			join(&tables, row, record, &span, &exchange->joined, at);
		}
	}
}

/* Joins packets that did not wait for a context, but for something else. */
void tcpio_join(const struct table *table, const struct tcpio_record *records, const __s64 *slots, size_t count,
		struct joined *joined)
{
	joined->room = count;
	joined->found = joined->joined = 0;
	for (size_t i = 0; i < count; i++) {
		const struct place *place = &table->places[slots[i]];
		const struct contexts *row = row_of(table, place);
		struct span span = span_of(place, &records[i]);

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
