/* SPDX-License-Identifier: Apache-2.0 */
/* The lookup of `index.Index`: open addressing with linear probing over keys of five words. */
#include "native.h"

static const __u64 mixers[TCPIO_KEY_WORDS] = {
	0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xFF51AFD7ED558CCD,
};

enum { BUCKET_EMPTY = -1 };

static __u64 hash_of(const __u64 *key)
{
	__u64 mixed = key[0] * mixers[0];

	for (int word = 1; word < TCPIO_KEY_WORDS; word++) {
		mixed = (mixed ^ key[word]) * mixers[word];
		mixed ^= mixed >> 29;
	}
	return mixed;
}

/* Hashes of keys that lie `stride` bytes apart. */
void tcpio_hash(const __u8 *first_key, size_t stride, size_t count, __u64 *hashes)
{
	__u64 key[TCPIO_KEY_WORDS];

	for (size_t i = 0; i < count; i++) {
		memcpy(key, first_key + i * stride, sizeof(key));
		hashes[i] = hash_of(key);
	}
}

/*
 * The slot of each key, -1 where there is none. `mask` is the number of buckets less one;
 * `keys` holds the key of each slot; a bucket that holds -2 is passed by.
 */
void tcpio_find(const __u8 *first_key, size_t stride, size_t count, const __s32 *buckets, __u64 mask,
		const __u64 (*keys)[TCPIO_KEY_WORDS], __s64 *slots)
{
	__u64 key[TCPIO_KEY_WORDS];

	for (size_t i = 0; i < count; i++) {
		memcpy(key, first_key + i * stride, sizeof(key));
		__u64 at = (hash_of(key) >> 20) & mask;
		__s32 slot;

		while ((slot = buckets[at]) != BUCKET_EMPTY) {
			if (slot >= 0 && !memcmp(keys[slot], key, sizeof(key)))
				break;
			at = (at + 1) & mask;
		}
		slots[i] = slot;
	}
}
