/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Where XDP sends a flow's packets to, as its row keeps it: a look-up of its own would cost as much as the flow's.
 *
 * Several CPUs may write a row's way at once, and others read it. Nobody believes what is half written: `until` is zero
 * meanwhile, and a copy counts only if `until` has not changed under it.
 */
#ifndef EBPFLB_WAY_H
#define EBPFLB_WAY_H

#include "hop.h"

/* The addresses of an Ethernet header, word by word: byte by byte they cost more than the rest of the rewriting. */
static inline void write_macs(struct ethhdr *ethernet, const struct way *way)
{
	const u32 *from = (const void *)way->frame;
	u32 *to = (void *)ethernet;

	to[0] = from[0];
	to[1] = from[1];
	to[2] = from[2];
}

static inline int is_for(const struct ethhdr *ethernet, const struct way *way)
{
	const u32 *there = (const void *)ethernet, *own = (const void *)way->mac;

	return there[0] == own[0] && (u16)there[1] == (u16)own[1];
}

/* Until when is believed what the FIB says now. */
static inline u32 believed_until(const struct settings *node, u64 now)
{
	return (u32)(now + node->refresh) ?: 1;
}

/*
 * A copy of what a row keeps; 0 where that is nothing, too old, being written or not known to carry this length. No way is
 * believed for longer than a refresh: what seems to be was written before the word came round.
 */
static inline int recall_way(const struct way *kept, u32 length, u32 entered, const struct settings *node, u64 now,
			     struct way *way)
{
	u32 until = kept->until, left = until - (u32)now;

	if (!until || !left || left > (u32)node->refresh + 1 || kept->entered != entered || length > kept->mtu)
		return 0;
	*way = *kept;
	asm volatile("" ::: "memory");
	return kept->until == until;
}

static inline void keep_way(struct way *kept, const struct way *way)
{
	kept->until = 0;
	asm volatile("" ::: "memory");
	kept->entered = way->entered;
	kept->device = way->device;
	__builtin_memcpy(kept->frame, way->frame, sizeof(kept->frame));
	__builtin_memcpy(kept->mac, way->mac, sizeof(kept->mac));
	kept->mtu = way->mtu;
	asm volatile("" ::: "memory");
	kept->until = way->until;
}

/*
 * Whether it is the stack's turn to send to this neighbour. A neighbour that the stack does not send to is never asked
 * whether it is still there (RFC 4861 7.3.3; arp(7)), and the FIB tells its last link-layer address for ever. A packet
 * that goes by the stack now and then has it asked, and looked for anew where it does not answer.
 */
static inline int is_for_the_stack(const struct way *way, const struct settings *node, u64 now)
{
	const u32 *frame = (const void *)way->frame;
	u32 cell = finished(mix(mix(way->device, frame[0]), frame[1] & 0xffff)) % NEIGHBOUR_CELLS;
	u32 *last, before;

	if (!node->by_stack)
		return 0;
	last = neighbours.lookup(&cell);
	if (!last)
		return 0;
	before = *last;
	if (before && (u32)now - before < node->by_stack)
		return 0;
	*last = (u32)now ?: 1;
	return before != 0;
}

#endif
