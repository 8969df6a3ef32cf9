/* SPDX-License-Identifier: Apache-2.0 */
/* What `workloads.arrange` does with every packet: put those of one workload side by side, each in the order it had. */
#include "native.h"

/*
 * Packets have slots, whose workloads lie `stride` bytes apart. Notes which workloads there are, in the order in which
 * they come, in `found`, and how many packets each has, by its number, in `counts`, which is all zero before; `of` has
 * room for a number for each packet. Fills `order`, unless there is only one workload. Returns how many there are.
 */
size_t tcpio_arrange(const __u8 *workloads, size_t stride, const __s64 *slots, size_t count, __s32 *of, __s32 *found,
		     __s32 *counts, __s64 *order)
{
	size_t many = 0;
	__s32 next = 0;

	for (size_t i = 0; i < count; i++) {
		memcpy(&of[i], workloads + (size_t)slots[i] * stride, sizeof(*of));
		if (!counts[of[i]]++)
			found[many++] = of[i];
	}
	if (many < 2)
		return many;
	/* From here on `counts` says where the next packet of each goes, and in the end where the last one went. */
	for (size_t i = 0; i < many; i++) {
		__s32 here = counts[found[i]];

		counts[found[i]] = next;
		next += here;
	}
	for (size_t i = 0; i < count; i++)
		order[counts[of[i]]++] = (__s64)i;
	return many;
}
