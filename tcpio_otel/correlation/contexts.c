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

/* Lets a packet wait; `places` says which record it is, unless it waited before. */
static TCPIO_SELDOM void wait_for(struct following *following, struct place *place, size_t packet)
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
static TCPIO_SELDOM void settle_waiting(struct following *following, struct place *place)
{
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
		if (undecided(place, &span)) {
			wait_for(following, place, at);
		} else {
			exchange->waits[at] = 0;
			join(following->table, place, record, &span, &exchange->joined, at);
		}
	}
}

static TCPIO_SELDOM void finish(const struct table *table, struct place *place, const struct tcpio_record *record)
{
	int direction = record->packet.direction;
	__u32 end = record->packet.seq + record->packet.payload_bytes;

	place->fin[direction] = end + 1;
	place->finished |= (__u8)(1 << direction);
	if (place->newest[direction].number >= 0)
		reach(table->requests, &place->newest[direction], direction, end);
}

/* Notes how far data has come; true when it is new and was sent. */
static int advance(struct place *place, const struct tcpio_record *record)
{
	__u32 seq = record->packet.seq, ack = record->packet.ack, end = seq + record->packet.payload_bytes;

	if (record->packet.direction == RECEIVED) {
		if (!place->receiving || before(seq, place->first))
			place->first = seq;
		place->receiving = 1;
		return 0;
	}
	if (place->sending && !before(place->high, end))
		return 0;
	if (!place->sending || place->answer != ack)
		place->answer_before = place->sending ? place->answer : ack;
	place->answer = ack;
	place->high = end;
	place->sending = 1;
	return 1;
}

/* Data moves on a connection that may get its contexts late; true when it is clear now that it will not. */
static int await(struct place *place, const struct tcpio_record *record)
{
	__u32 bytes = record->packet.payload_bytes, end = record->packet.seq + bytes;

	if (advance(place, record)) {
		place->turns += place->unanswered && place->turns < PATIENT_TURNS;
		place->unanswered = 0;
	}
	if (record->packet.direction == SENT)
		return place->answers == ANSWERS_PERHAPS && place->turns >= PATIENT_TURNS;
	place->unanswered += bytes;
	/* Until it answers, all that a server receives belongs to what it is asked. */
	if (place->answers == ANSWERS_LATE && place->newest[SENT].number >= 0 && before(place->known, end) &&
	    !(place->sending && before(place->newest[SENT].seq, place->high)))
		place->known = end;
	return place->answers == ANSWERS_PERHAPS && place->unanswered > PATIENT_BYTES;
}

/* How many records ahead a table is asked for what they take of it, so that it has come when their turn does. */
enum { AHEAD_PLACE = 16, AHEAD_REQUEST = 8 };

static inline void fetch_ahead(const struct table *table, const __s64 *slots)
{
	__s64 soon = slots[AHEAD_REQUEST];
	__s32 number;

	__builtin_prefetch(&table->places[slots[AHEAD_PLACE]], 1);
	if (soon < 0)
		return;
	number = table->places[soon].newest[SENT].number;
	if (number >= 0)
		__builtin_prefetch(&table->requests[number].last_ns, 1);
}

static TCPIO_SELDOM void follow_context(struct following *following, const struct tcpio_record *record, __s64 slot)
{
	const struct table *table = following->table;
	struct exchange *exchange = following->exchange;
	size_t context = following->context++;
	struct place *place = &table->places[slot];
	struct contexts *row;

	exchange->taken[context] = 0;
	if (slot < 0)
		return;
	if (place->row < 0) {
		place->row = exchange->free_rows[exchange->rows_used++];
		memset(&table->rows[place->row], 0, sizeof(struct contexts));
	}
	row = &table->rows[place->row];
	exchange->taken[context] = (__u8)learn(table, place, row, record, slot, exchange->numbers[context]);
	show_newest(place, row);
	settle_waiting(following, place);
}

/* Has the socket had contexts of which no record came? */
static inline int is_behind(const struct place *place, const struct tcpio_record *record)
{
	return record->packet.contexts && (__s16)(record->packet.contexts - place->serial) > 0;
}

/* Takes in any packet; `i` says which record it is. */
static TCPIO_SELDOM void follow_packet(struct following *following, struct place *place,
				       const struct tcpio_record *record, size_t i, size_t packet)
{
	struct exchange *exchange = following->exchange;
	struct span span;

	if (place->row >= 0 && is_behind(place, record)) {
		lose_track(following->table, place, record);
		exchange->lost++;
	}
	if (record->packet.flags & FLAG_FIN)
		finish(following->table, place, record);
	if (place->answers && record->packet.payload_bytes && await(place, record)) {
		place->answers = ANSWERS_NEVER;
		settle_waiting(following, place);
	}
	if (place->row < 0 && !place->answers)
		return;
	acknowledge(following->table, place, record);
	if (exchange->apart && exchange->apart[packet - exchange->earlier_count])
		return;
	span = span_of(place, record);
	if (undecided(place, &span)) {
		exchange->places[packet] = (__s32)i;
		wait_for(following, place, packet);
	} else {
		join(following->table, place, record, &span, &exchange->joined, packet);
	}
}

/* Is there nothing to a packet but data or an acknowledgement, and both within the newest contexts, if there are any?
 * So it is with nearly all. */
static inline int is_plain(const struct place *place, const struct tcpio_record *record)
{
	int direction = record->packet.direction;

	if ((record->packet.flags & (FLAG_FIN | FLAG_SYN | FLAG_RST | FLAG_ACK)) != FLAG_ACK ||
	    record->packet.marks & TCPIO_MARK_NO_SOCKET || place->finished | place->answers)
		return 0;
	return place->row < 0 || (!is_behind(place, record) && within(&place->newest[direction], record->packet.seq) &&
				  within(&place->newest[!direction], record->packet.ack - 1));
}

/* Does for a plain packet what follow_packet does, in fewer steps. */
static inline void follow_plain(const struct table *table, struct place *place, const struct tcpio_record *record,
				struct exchange *exchange, size_t packet)
{
	__u32 bytes = record->packet.payload_bytes, seq = record->packet.seq;
	int direction = record->packet.direction;
	__s32 number = place->newest[!direction].number;

	if (place->row < 0)
		return;
	if (number >= 0)
		confirm(&table->requests[number], !direction, record->packet.ack, record->time_ns);
	if (exchange->apart && exchange->apart[packet - exchange->earlier_count])
		return;
	if (bytes)
		number = place->newest[direction].number;
	if (number >= 0)
		join_one(table, number, record, seq, seq + bytes, &exchange->joined, packet);
}

/* Follows records in time order, and joins packets as it goes. */
void tcpio_follow(const struct table *table, const struct tcpio_record *records, const __s64 *slots, size_t count,
		  struct exchange *exchange)
{
	size_t packet = exchange->earlier_count;
	struct following following = {
		.table = table, .records = records, .exchange = exchange, .pass = (__u32)++exchange->passes
	};

	exchange->rows_used = exchange->lost = 0;
	exchange->joined.found = exchange->joined.joined = 0;
	memset(exchange->waits, 0, exchange->joined.room);
	for (size_t i = 0; i < packet; i++)
		wait_for(&following, &table->places[exchange->earlier_slots[i]], i);
	for (size_t i = 0; i < count; i++) {
		const struct tcpio_record *record = &records[i];
		__s64 slot = slots[i];
		struct place *place = &table->places[slot];

		if (i + AHEAD_PLACE < count)
			fetch_ahead(table, &slots[i]);
		if (record->kind != TCPIO_PACKET) {
			if (record->kind == TCPIO_CONTEXT)
				follow_context(&following, record, slot);
			continue;
		}
		if (slot < 0)
			;
		else if (is_plain(place, record))
			follow_plain(table, place, record, exchange, packet);
		else
			follow_packet(&following, place, record, i, packet);
		packet++;
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
		struct span span = span_of(place, &records[i]);

		if (!undecided(place, &span))
			join(table, place, &records[i], &span, joined, i);
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
