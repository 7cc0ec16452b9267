/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Where a packet is sent to that does not go through the stack.
 *
 * The FIB says it, and what it said is believed for a second at most: asking costs more than everything else that an
 * established packet needs. tc keeps it here, in `hops`; XDP in the flow's row (way.h). What cannot be done as the stack
 * would is left to the stack, which then carries the flow: no neighbour, a device that must not be sent by (to XDP: pods,
 * overlays), a way that needs a larger MTU.
 */
#ifndef EBPFLB_HOP_H
#define EBPFLB_HOP_H

#include "maglev.h"
#include "parse.h"

#define FAMILY_IPV4 2
#define FAMILY_IPV6 10

static inline u32 hop_number(const struct address *source, const struct address *destination, u32 device)
{
	return finished(mix_address(mix_address(device, source), destination)) % HOP_CELLS;
}

/* Whether a cell is about this way, and still believed. */
static inline int is_current_hop(const struct hop *hop, const struct address *source, const struct address *destination,
				 u32 entered, u64 now)
{
	return hop->entered == entered && (s64)(hop->until - now) > 0 && same_address(&hop->destination, destination) &&
	       same_address(&hop->source, source);
}

/* Ask the FIB. `length`: of the packet, where its way must be able to carry it; 0 where that is not asked. */
static inline long ask_fib(void *context, const struct packet *packet, const struct address *source,
			   const struct address *destination, u32 entered, u16 length, struct bpf_fib_lookup *fib)
{
	fib->l4_protocol = packet->key.protocol;
	fib->tot_len = length;
	fib->ifindex = entered;
	if (packet->version == 4) {
		fib->family = FAMILY_IPV4;
		fib->ipv4_src = source->word[3];
		fib->ipv4_dst = destination->word[3];
	} else {
		fib->family = FAMILY_IPV6;
		__builtin_memcpy(fib->ipv6_src, source, 16);
		__builtin_memcpy(fib->ipv6_dst, destination, 16);
	}
	return bpf_fib_lookup(context, fib, sizeof(*fib), 0);
}

/* Keep what the FIB has said. */
static inline void keep_hop(struct hop *hop, const struct bpf_fib_lookup *fib, const struct address *source,
			    const struct address *destination, u32 entered, u32 mtu, u64 until)
{
	hop->source = *source;
	hop->destination = *destination;
	hop->entered = entered;
	hop->device = fib->ifindex;
	hop->mtu = mtu;
	__builtin_memcpy(hop->frame, fib->dmac, 6);
	__builtin_memcpy(hop->frame + 6, fib->smac, 6);
	hop->until = until;
}

#endif
