/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What is done to every record, in C: a pass over a batch for each question, called from Python through ctypes.
 *
 * Nothing here allocates, keeps state, or decides what a word looks like: Python makes the rows, once for each
 * connection or flag combination, and this joins them. Callers answer for the sizes of what they pass.
 */
#ifndef TCPIO_NATIVE_H
#define TCPIO_NATIVE_H

#include <linux/types.h>
#include <stddef.h>
#include <string.h>

#include "record.h"

#define TCPIO_KEY_WORDS 5 /* of eight bytes: struct tcpio_tuple */
/* For what few records need: kept out of the loops, which want the registers for themselves. */
#define TCPIO_SELDOM __attribute__((noinline, cold))
#define TCPIO_STEP 32 /* rows are copied so many bytes at a time: they are padded, and so is where they go */

/* Rows of bytes, one after the other, `width` bytes apart (a multiple of TCPIO_STEP); row i is `lengths[i]` long. */
struct tcpio_rows {
	const __u8 *bytes;
	const __s64 *lengths;
	__u64 width;
};

static inline __u8 *tcpio_put_row(__u8 *out, const struct tcpio_rows *rows, size_t row)
{
	const __u8 *bytes = rows->bytes + row * rows->width;
	size_t length = (size_t)rows->lengths[row];

	for (size_t done = 0; done < length; done += TCPIO_STEP)
		memcpy(out + done, bytes + done, TCPIO_STEP);
	return out + length;
}

#endif
