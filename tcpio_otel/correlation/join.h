/* SPDX-License-Identifier: Apache-2.0 */
/* Whose each packet is, and what that adds to the sums of its request. Included by contexts.c. */
#ifndef TCPIO_JOIN_H
#define TCPIO_JOIN_H

#include "contexts.h"

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
static int undecided(const struct place *place, const struct span *span)
{
	const struct border *last = &place->newest[RECEIVED];

	if (!place->answers || span->direction != RECEIVED || span->latest)
		return 0;
	if (last->number < 0)
		return 1;
	return !last->open && before(last->seq, span->to) && before(place->known, span->to);
}

/* That a packet was about a request. */
static __always_inline void see(struct request *request, const struct tcpio_record *record)
{
	__u64 now_ns = record->time_ns, since_ns = request->last_ns;
	int direction = record->packet.direction;
	__u32 segments = record->packet.gso_segments + !record->packet.gso_segments;

	if (now_ns > since_ns) {
		if (since_ns && now_ns - since_ns > request->gap_ns)
			request->gap_ns = now_ns - since_ns;
		request->last_ns = now_ns;
	}
	request->packets[direction] += segments;
	if (record->packet.marks & TCPIO_MARK_RETRANSMIT && direction == SENT)
		request->retransmits += segments;
}

/* That it carried these bytes of it. */
static __always_inline void see_bytes(struct request *request, const struct tcpio_record *record, __u32 from, __u32 to)
{
	int direction = record->packet.direction;

	/* What the other end had sent before it heard of the request answers nothing. */
	if (!(request->begun >> direction & 1) &&
	    (!request->begun || before(request->begin[!direction], record->packet.ack))) {
		request->begun |= (__u8)(1 << direction);
		request->first_ns[direction] = record->time_ns;
		if (request->unplaced && direction == RECEIVED)
			request->begin[direction] = request->end[direction] = from;
	}
	/* What is missing before it was lost on its way, and comes yet. */
	if (before(request->end[direction], to)) {
		request->payload[direction] += to - request->end[direction];
		request->end[direction] = to;
	}
	if (request->unplaced && direction == RECEIVED && before(from, request->begin[direction])) {
		request->payload[direction] += request->begin[direction] - from;
		request->begin[direction] = from;
	}
}

static __always_inline void see_part(const struct table *table, __s32 number, const struct tcpio_record *record,
				     __u32 from, __u32 to)
{
	if (number < NUMBER_FIRST)
		return;
	see(&table->requests[number], record);
	if (record->packet.payload_bytes)
		see_bytes(&table->requests[number], record, from, to);
}

/* That so much of what was sent in a direction has arrived. */
static __always_inline void confirm(struct request *request, int direction, __u32 ack, __u64 now_ns)
{
	int further = before(request->acked[direction], ack) | (request->unplaced & (direction == RECEIVED));

	/* No branch: every other packet confirms nothing new, and which do cannot be foretold. */
	request->acked[direction] = further ? ack : request->acked[direction];
	request->acked_ns[direction] = further ? now_ns : request->acked_ns[direction];
}

/* An acknowledgement, bare or with data, is noted with the request whose bytes it confirms. */
static inline void acknowledge(const struct table *table, const struct place *place, const struct tcpio_record *record)
{
	int direction = !record->packet.direction;
	const struct border *border = &place->newest[direction];
	__u32 ack = record->packet.ack;

	if (border->number < 0 || !(record->packet.flags & FLAG_ACK) || record->packet.flags & (FLAG_SYN | FLAG_RST))
		return;
	if (place->finished >> direction & 1 && ack == place->fin[direction])
		ack--; /* the FIN is nobody's */
	if (!within(border, ack - 1)) {
		const struct contexts *row = &table->rows[place->row];
		__u32 age = border_of(row, direction, ack - 1);

		if (age == row->count[direction])
			return;
		border = &row->borders[age][direction];
	}
	confirm(&table->requests[border->number], direction, ack, record->time_ns);
}

/* Numbers of contexts by packet, and, for those that reach over several, which these are. */
struct joined {
	__s64 *numbers;
	__s32 *spans;	     /* 1 + the place in `sets`; 0: no more than one */
	__s64 (*sets)[KEPT]; /* oldest first, then -1 */
	__u64 room;	     /* packets that there can be */
	__u64 found;	     /* sets */
	__u64 joined;	     /* packets of which anything is known */
};

/* A packet reaches from the border of age `first`, or from before all of them, to that of age `last`. */
static TCPIO_SELDOM void join_several(const struct table *table, const struct contexts *row,
				      const struct tcpio_record *record, const struct span *span, __u32 first,
				      __u32 last, struct joined *joined, size_t at)
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
		see_part(table, one->number, record, part.from, part.to);
	}
}

/* Where all are nobody's, what stands in the arrays does not matter. */
static TCPIO_SELDOM void clear(struct joined *joined)
{
	memset(joined->numbers, 0, joined->room * sizeof(*joined->numbers)); /* NUMBER_NONE */
	memset(joined->spans, 0, joined->room * sizeof(*joined->spans));
}

/* The context of one packet. */
static __always_inline void join_one(const struct table *table, __s32 number, const struct tcpio_record *record,
				     __u32 from, __u32 to, struct joined *joined, size_t at)
{
	if (!joined->joined++)
		clear(joined);
	joined->numbers[at] = number;
	see_part(table, number, record, from, to);
}

/* The same where the newest context is not all that it is about. */
static TCPIO_SELDOM void join_older(const struct table *table, const struct contexts *row,
				    const struct tcpio_record *record, const struct span *span, struct joined *joined,
				    size_t at)
{
	__u32 first = border_of(row, span->direction, span->from), last = border_of(row, span->direction, span->to - 1);

	if (last == row->count[span->direction])
		return;
	if (first == last) {
		join_one(table, row->borders[last][span->direction].number, record, span->from, span->to, joined, at);
		return;
	}
	if (!joined->joined++)
		clear(joined);
	join_several(table, row, record, span, first, last, joined, at);
}

/* Whose a packet is whose context is decided; where nobody's, nothing is written. */
static __always_inline void join(const struct table *table, const struct place *place,
				 const struct tcpio_record *record, const struct span *span, struct joined *joined,
				 size_t at)
{
	const struct border *newest;

	if (span->direction < 0)
		return;
	newest = &place->newest[span->direction];
	if (newest->number < 0)
		return;
	if (within(newest, span->from))
		join_one(table, newest->number, record, span->from, span->to, joined, at);
	else
		join_older(table, &table->rows[place->row], record, span, joined, at);
}

#endif
