/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Consistent hashing: the same backend for the same flow on every node, and for nearly all flows when another backend
 * comes or goes (Maglev, NSDI 2016). The control plane fills the table; here is how a flow finds its place in it.
 */
#ifndef EBPFLB_MAGLEV_H
#define EBPFLB_MAGLEV_H

#include "lookup.h"

/* How many positions a table has, by `route.table`: the greatest primes below the powers of two. */
static inline u32 table_size(u8 table)
{
	switch (table) {
	case 1:
		return 1021;
	case 2:
		return 2039;
	case 3:
		return 4093;
	case 4:
		return 8191;
	case 5:
		return 16381;
	case 6:
		return 32749;
	case 7:
		return 65521;
	case 8:
		return 131071;
	}
	return 0;
}

static inline u32 mix(u32 hash, u32 word)
{
	hash = (hash ^ word) * 0x85ebca6b;
	return hash ^ hash >> 15;
}

static inline u32 mix_address(u32 hash, const struct address *address)
{
	return mix(mix(mix(mix(hash, address->word[0]), address->word[1]), address->word[2]), address->word[3]);
}

static inline u32 finished(u32 hash)
{
	hash *= 0xc2b2ae35;
	return hash ^ hash >> 16;
}

/*
 * A flow by its tuple. With session affinity all flows of a client to a Service are one, by whatever node, frontend and
 * port: its address alone leads.
 */
static inline u32 flow_hash(const struct flow_key *key, int affinity)
{
	u32 hash = mix_address(key->protocol, &key->source);

	if (!affinity)
		hash = mix(mix_address(hash, &key->destination), (u32)key->destination_port << 16 | key->source_port);
	return finished(hash);
}

/* A socket's flow, which has no source yet: by the socket, with session affinity by its network namespace. */
static inline u32 socket_hash(u64 cookie, const struct address *to, u16 port, int affinity)
{
	u32 hash = mix((u32)cookie, (u32)(cookie >> 32));

	if (!affinity)
		hash = mix(mix_address(hash, to), port);
	return finished(hash);
}

/* The position among the route's slots at a flow's place; -1 where the table is not there. */
static inline int table_position(const struct route *route, u32 hash)
{
	u32 place = (u32)((u64)hash * table_size(route->table) >> 32);
	struct table_key key = {};
	struct table_part *part;
	u32 position;

	key.slots = route->slots;
	key.part = place / TABLE_PART;
	part = tables.lookup(&key);
	if (!part)
		return -1;
	position = part->position[place % TABLE_PART];
	return position < route->count ? (int)position : -1;
}

#endif
