/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What `contexts.ContextTable` keeps, in arrays of NumPy: the layouts are its dtypes, and a test compares them.
 *
 * A context covers the bytes of a connection from where it begins to where the next one does, in each direction apart.
 * Positions are sequence numbers, so all comparisons are modulo 2^32 (RFC 9293, section 3.4).
 */
#ifndef TCPIO_CONTEXTS_H
#define TCPIO_CONTEXTS_H

#include "native.h"

enum { FLAG_FIN = 0x01, FLAG_SYN = 0x02, FLAG_RST = 0x04, FLAG_ACK = 0x10 };
enum { RECEIVED = TCPIO_RECEIVE, SENT = TCPIO_TRANSMIT };
enum { DIRECTIONS = 2, KEPT = 8 }; /* of a connection's contexts: retransmits reach back that far */

enum number {
	NUMBER_NONE = 0,
	NUMBER_INTERLEAVED = 1, /* several contexts at a time: whose the bytes are is not known */
	NUMBER_FIRST = 2,
};

/* Does what a connection receives get its context later, when the application has read it? */
enum answers {
	ANSWERS_NEVER = 0,
	ANSWERS_LATE = 1,
	ANSWERS_PERHAPS = 2, /* nobody knows yet of this listener */
};

/* Without a tag by then a connection will have none: TLS takes up to two turns before the first request. */
enum { PATIENT_TURNS = 4, PATIENT_BYTES = 1 << 16 };

struct border {
	__u32 seq;	 /* where a context begins */
	__s32 number;	 /* which */
	__u8 origin;	 /* enum tcpio_origin: how strong its claim is */
	__u8 from_start; /* it begins where the connection does */
	__u8 open;	 /* where it ends will be told: what lies beyond is its own until then */
	__u8 reserved;
};

/* Where a packet is looked up at random, what it takes of a table lies in one of these. */
enum { CACHE_LINE_BYTES = 64 };

/* By slot: what must be known of every connection before its first context comes, and what most packets ask for then.
 */
struct place {
	/* Followed only while `answers` says that contexts may come late. */
	__u32 high;   /* one past the highest sequence number sent, once `sending` */
	__u32 answer; /* the acknowledgement number in the last new data sent: what came before it was answered */
	__u32 answer_before;   /* the one before that number */
	__u32 first;	       /* the lowest sequence number received with data, once `receiving` */
	__u32 fin[DIRECTIONS]; /* one past the FIN, by direction, once `finished` says that there is one */
	__u8 sending;
	__u8 receiving;
	__u8 finished; /* bits by direction */
	__u8 answers;  /* enum answers */
	__u8 turns;    /* times that it sent after it had received */
	__u8 reserved;
	__u16 serial; /* of the last context that came */
	__u32 known;  /* up to here it is certain that what was received belongs to the newest context */
	__s32 row;    /* of its contexts; -1: it has none */
	struct border newest[DIRECTIONS]; /* those of the row, again; number -1: none */
	/* What few packets ask for. */
	__u64 born;	     /* which life of the slot this is about */
	__u32 unanswered;    /* bytes received since it sent */
	__u32 pass;	     /* which call of tcpio_follow the next two are about */
	__s32 first_waiting; /* packets of this slot that wait for their context, in order: `next` leads from one to
				another */
	__s32 last_waiting;
} __attribute__((aligned(CACHE_LINE_BYTES)));

/* By row: the contexts of one connection, by age, so the newest first. */
struct contexts {
	__u32 count[DIRECTIONS];
	__u8 shared; /* it has served several at a time */
	__u8 reserved[7];
	struct border borders[KEPT][DIRECTIONS];
} __attribute__((aligned(CACHE_LINE_BYTES)));

/* By number: one context, and what was seen of it. Times are nanoseconds on the records' clock. */
struct request {
	__u8 trace_id[16];
	__u8 span_id[8];
	__s64 slot;
	__u64 born;
	__u64 began_ns;		    /* when it was reported */
	__u64 superseded_ns;	    /* when another came; 0: it is the newest */
	__u64 first_ns[DIRECTIONS]; /* of its first byte, where one was seen */
	__u64 acked_ns[DIRECTIONS]; /* when its bytes were acknowledged, as far as they are; 0: none of them */
	__u32 begin[DIRECTIONS];    /* sequence numbers */
	__u8 origin;
	__u8 marks;   /* enum tcpio_context_mark */
	__u8 borders; /* how many name it */
	__u8 state;   /* of Python */
	/* What every packet changes. */
	__u64 last_ns __attribute__((aligned(CACHE_LINE_BYTES))); /* of its last packet */
	__u64 gap_ns;						  /* the longest time without a packet of it */
	__u64 payload[DIRECTIONS];
	__u32 packets[DIRECTIONS];
	__u32 end[DIRECTIONS];	 /* one past the highest sequence number seen */
	__u32 acked[DIRECTIONS]; /* the highest acknowledgement of each direction's bytes */
	__u32 retransmits;	 /* segments */
	__u8 begun;		 /* bits by direction: its first byte was seen */
	__u8 unplaced; /* where it begins in what is received is not known: with the first byte that is seen of it */
	__u16 reserved;
};

static inline int before(__u32 one, __u32 other)
{
	return (__s32)(one - other) < 0;
}

/* What Python passes to both functions. */
struct table {
	struct place *places;
	struct contexts *rows;
	struct request *requests;
	const __u8 *flows;
	__u64 flow_stride, server_offset;
};

/* Is a sequence number at or beyond where a border is? */
static inline int within(const struct border *border, __u32 seq)
{
	return border->from_start || !before(seq, border->seq);
}

/* The age of the newest border at or before a sequence number; their count: what lies there is older than any. */
static inline __u32 border_of(const struct contexts *row, int direction, __u32 seq)
{
	__u32 age = 0;

	while (age < row->count[direction] && !within(&row->borders[age][direction], seq))
		age++;
	return age;
}

static inline struct border *newest(struct contexts *row, int direction)
{
	return row->count[direction] ? &row->borders[0][direction] : NULL;
}

static inline const struct border *oldest(const struct contexts *row, int direction)
{
	return row->count[direction] ? &row->borders[row->count[direction] - 1][direction] : NULL;
}

/* Borders were placed or renamed: the newest ones stand with the connection too. */
static inline void show_newest(struct place *place, const struct contexts *row)
{
	for (int direction = 0; direction < DIRECTIONS; direction++)
		if (row->count[direction])
			place->newest[direction] = row->borders[0][direction];
}

#endif
