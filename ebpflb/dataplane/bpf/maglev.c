/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Fills a table of consistent hashing as Maglev does (Eisenbud et al., NSDI 2016, section 3.4): every backend has an
 * order of its own in which it would like the table's places, and in turn each takes the first one that is free.
 *
 * Orders and turns follow from addresses and ports alone, so every node fills the same table for the same backends.
 * The paper steps through the table from an offset by a skip. Two backends whose skips are in a simple ratio then keep
 * meeting, and one case in a thousand moves twice as much as others when a backend leaves; so the steps go through the
 * power of two above the table's size, each scattered by a bijection of the backend's own. Places beyond the table
 * count as taken.
 *
 * `maglev.py` is the other side, and says the same in Python: what is changed here is changed there.
 */
#include <stdint.h>
#include <stdlib.h>

/* What comes in for each backend: its identity as rows have it, and its weight in the machine's order. */
struct backend {
	uint8_t identity[18]; /* address, port */
	uint16_t weight;
};
_Static_assert(sizeof(struct backend) == 20, "struct backend");

struct turn {
	uint64_t order;  /* who is first in a round */
	uint32_t index;  /* of the backend, among those that came in */
	uint32_t at;     /* how far it has come in its order */
	uint32_t step;   /* odd */
	uint32_t factor; /* odd */
	uint32_t weight;
	uint32_t credit; /* a turn costs the greatest weight */
};

#define FREE 0xffff

/* The finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014; the constants are Stafford's variant 13). */
static uint64_t mixed(uint64_t hash)
{
	hash = (hash ^ hash >> 30) * 0xbf58476d1ce4e5b9;
	hash = (hash ^ hash >> 27) * 0x94d049bb133111eb;
	return hash ^ hash >> 31;
}

/* Of an identity as three little-endian words. */
static uint64_t hashed(uint64_t hash, const uint8_t *identity)
{
	static const int ends[] = {8, 16, 18};
	int at = 0;

	for (int word = 0; word < 3; word++) {
		uint64_t value = 0;

		for (int shift = 0; at < ends[word]; at++, shift += 8)
			value |= (uint64_t)identity[at] << shift;
		hash = mixed(hash ^ value);
	}
	return hash;
}

static int by_order(const void *left, const void *right)
{
	const struct turn *one = left, *other = right;

	if (one->order != other->order)
		return one->order < other->order ? -1 : 1;
	return one->index < other->index ? -1 : 1; /* the same backend twice */
}

static uint32_t prepare(const struct backend *backends, uint32_t count, struct turn *turns)
{
	uint32_t heaviest = 0;

	for (uint32_t i = 0; i < count; i++) {
		/* The seeds are digits of pi. */
		uint64_t one = hashed(0x243f6a8885a308d3, backends[i].identity);
		uint64_t other = hashed(0x13198a2e03707344, backends[i].identity);

		turns[i] = (struct turn){
			.order = one,
			.index = i,
			.at = (uint32_t)one,
			.step = (uint32_t)other | 1,
			.factor = (uint32_t)(other >> 32) | 1,
			.weight = backends[i].weight,
		};
		if (backends[i].weight > heaviest)
			heaviest = backends[i].weight;
	}
	qsort(turns, count, sizeof(*turns), by_order);
	return heaviest;
}

/*
 * Writes into `places`, which has room for the power of two above `size`, the index of the backend at each place. There
 * are backends, fewer than FREE, not all of weight 0. 0, or -1 where there is no memory.
 */
int ebpflb_maglev_fill(const struct backend *backends, uint32_t count, uint32_t size, uint16_t *places)
{
	uint32_t bits = 32 - (uint32_t)__builtin_clz(size);
	uint32_t half = (bits + 1) / 2, mask = (1u << bits) - 1, left = size, heaviest;
	struct turn *turns = malloc(count * sizeof(*turns));

	if (!turns)
		return -1;
	heaviest = prepare(backends, count, turns);
	for (uint32_t i = 0; i <= mask; i++)
		places[i] = i < size ? FREE : 0;
	for (uint32_t i = 0; left; i = i + 1 < count ? i + 1 : 0) {
		struct turn *turn = &turns[i];
		uint32_t at = turn->at, step = turn->step, factor = turn->factor, place;

		turn->credit += turn->weight;
		if (turn->credit < heaviest)
			continue;
		turn->credit -= heaviest;
		do {
			at += step;
			place = at & mask;
			place = (place ^ place >> half) * factor & mask;
		} while (places[place] != FREE);
		turn->at = at;
		places[place] = (uint16_t)turn->index;
		left--;
	}
	free(turns);
	return 0;
}
