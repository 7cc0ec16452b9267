/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Where XDP sends a packet to.
 *
 * The FIB says it, and what it said is believed for a second at most: asking costs more than everything else that an
 * established packet needs. What XDP cannot do as the stack would is left to the stack, which then carries the flow:
 * no neighbour, a device without our program (pods, overlays), a way that needs a larger MTU.
 */
#ifndef EBPFLB_HOP_H
#define EBPFLB_HOP_H

#include "maglev.h"
#include "parse.h"

#define FAMILY_IPV4 2
#define FAMILY_IPV6 10

/* The device that a frame belongs to, and the one that it came by: they differ where the frame has a VLAN tag. */
struct entry {
	u32 device;
	u32 under;
};

static inline int same_mac(const u8 *a, const u8 *b)
{
	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3] && a[4] == b[4] && a[5] == b[5];
}

static inline struct hop *hop_cell(const struct address *source, const struct address *destination, u32 device)
{
	u32 cell = finished(mix_address(mix_address(device, source), destination)) % HOP_CELLS;

	return hops.lookup(&cell);
}

/* What the FIB says; GO_ON with the hop filled in, or PASS, counted. */
static inline int ask_fib(struct xdp_md *ctx, const struct packet *packet, const struct entry *entry,
			  const struct address *source, const struct address *destination, const struct settings *node,
			  u64 now, struct hop *hop)
{
	struct bpf_fib_lookup fib = {};
	struct device *device;
	u32 leaving, may, entered = entry->device, under = entry->under;
	long found;

	fib.l4_protocol = packet->key.protocol;
	fib.tot_len = (u16)packet->length;
	fib.ifindex = entered;
	if (packet->version == 4) {
		fib.family = FAMILY_IPV4;
		fib.ipv4_src = source->word[3];
		fib.ipv4_dst = destination->word[3];
	} else {
		fib.family = FAMILY_IPV6;
		__builtin_memcpy(fib.ipv6_src, source, 16);
		__builtin_memcpy(fib.ipv6_dst, destination, 16);
	}
	found = bpf_fib_lookup(ctx, &fib, sizeof(fib), 0);
	if (found == BPF_FIB_LKUP_RET_NO_NEIGH)
		count(XDP_NO_NEIGHBOUR);
	else if (found == BPF_FIB_LKUP_RET_FRAG_NEEDED)
		count(XDP_TOO_LONG);
	else if (found == BPF_FIB_LKUP_RET_NOT_FWDED)
		count(XDP_LOCAL);
	else if (found)
		count(XDP_NO_ROUTE);
	if (found)
		return PASS;

	device = devices.lookup(&under);
	if (!device)
		return PASS;
	__builtin_memcpy(hop->mac, device->mac, 6);
	may = device->flags & DEVICE_XDP;
	leaving = fib.ifindex;
	device = devices.lookup(&leaving);
	/* To another device only without a tag; a frame with one goes back by the VLAN that it came from, or up. */
	if (device && leaving != entered)
		may = entered == under && (device->flags & DEVICE_XDP) && (device->flags & DEVICE_REDIRECT);
	if (!device || !may) {
		count(XDP_LOCAL);
		return PASS;
	}
	hop->source = *source;
	hop->destination = *destination;
	hop->entered = entered;
	hop->device = leaving;
	hop->mtu = device->mtu;
	/* Since 5.13 it says the way's own MTU where it was given a length. */
	if (fib.tot_len != (u16)packet->length && fib.tot_len < hop->mtu)
		hop->mtu = fib.tot_len;
	__builtin_memcpy(hop->frame, fib.dmac, 6);
	__builtin_memcpy(hop->frame + 6, fib.smac, 6);
	hop->until = now + node->refresh;
	return GO_ON;
}

/* The hop of a packet to `destination`; none, with the packet to be passed up, counted, where XDP has no way. */
static inline struct hop *next_hop(struct xdp_md *ctx, const struct packet *packet, const struct entry *entry,
				   const struct address *source, const struct address *destination,
				   const struct settings *node, u64 now)
{
	struct hop *hop = hop_cell(source, destination, entry->device);
	void *data = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;
	struct ethhdr *ethernet = data;

	if (!hop || (void *)(ethernet + 1) > end)
		return 0;
	if (packet->hops <= 1) {
		count(XDP_NO_HOPS);
		return 0;
	}
	if (hop->entered != entry->device || (s64)(hop->until - now) <= 0 ||
	    !same_address(&hop->destination, destination) || !same_address(&hop->source, source)) {
		hop->until = 0; /* what is half written is never believed */
		if (ask_fib(ctx, packet, entry, source, destination, node, now, hop) != GO_ON) {
			hop->until = 0;
			return 0;
		}
	}
	if (packet->length > hop->mtu) {
		count(XDP_TOO_LONG);
		return 0;
	}
	if (!same_mac(ethernet->h_dest, hop->mac))
		return 0; /* flooded by a switch, or another device's behind this one */
	return hop;
}

#endif
