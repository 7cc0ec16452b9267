/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The way around the stack, from one pod of this node to another: straight into the other end of its veth.
 *
 * Only where it is asked for (GO_AROUND), since whatever else would see the packet in between does not: netfilter,
 * conntrack, other programs at the pods' devices. A flow goes around in both directions or in none, which is decided when it
 * begins by its devices: conntrack must not see half of it. A packet for which the way is not there now (no neighbour,
 * a fragment) goes through the stack with the same translation.
 */
#ifndef EBPFLB_AROUND_H
#define EBPFLB_AROUND_H

#include <uapi/linux/pkt_cls.h>

#include "flow.h"
#include "hop.h"
#include "nat.h"

#define WAY 0           /* in skb->cb: one more than the cell of the hop */
#define HOW 1           /* in skb->cb: FLOW_AROUND, or 0 */
#define PACKET_FOR_US 0 /* skb->pkt_type: PACKET_HOST */

/* Nothing has been found yet. */
static inline void forget_way(struct __sk_buff *skb)
{
#if GO_AROUND
	skb->cb[WAY] = 0;
	skb->cb[HOW] = 0;
#endif
}

/* Whether one has been found. */
static inline int has_way(struct __sk_buff *skb)
{
#if GO_AROUND
	return skb->cb[WAY] != 0;
#else
	return 0;
#endif
}

/* What that makes of a flow: FLOW_AROUND, or 0. */
static inline u8 how_around(struct __sk_buff *skb)
{
#if GO_AROUND
	return (u8)skb->cb[HOW];
#else
	return 0;
#endif
}

static inline int is_peer(u32 ifindex)
{
	struct device *device = devices.lookup(&ifindex);

	return device && (device->flags & DEVICE_PEER);
}

/*
 * Look for the way into another pod; GO_ON, with the cell of its hop in skb->cb, or PASS where the packet has to go
 * through the stack. (In skb->cb, since what lies there multiplies no states of the verifier's.)
 */
static inline int find_way_around(struct __sk_buff *skb, const struct packet *packet, const struct address *destination,
				  const struct settings *node, u64 now)
{
#if GO_AROUND
	struct bpf_fib_lookup fib = {};
	struct address nothing = {};
	u32 leaving, entered = skb->ifindex;
	u32 cell = hop_number(&nothing, destination, entered);
	struct device *device;
	struct hop *hop;
	long found;

	if (packet->fragment != WHOLE || packet->hops <= 1 || skb->pkt_type != PACKET_FOR_US)
		return PASS;
	hop = hops.lookup(&cell);
	if (!hop)
		return PASS;
	if (!is_current_hop(hop, &nothing, destination, entered, now)) {
		hop->until = 0; /* what is half written is never believed */
		found = ask_fib(skb, packet, &packet->key.source, destination, skb->ifindex, 0, &fib);
		if (found && found != BPF_FIB_LKUP_RET_NO_NEIGH)
			return PASS;
		leaving = fib.ifindex;
		if (!is_peer(leaving))
			return PASS;
		skb->cb[HOW] = FLOW_AROUND;
		if (found)
			return PASS; /* the stack asks for the neighbour; what comes later goes around */
		device = devices.lookup(&leaving);
		if (!device)
			return PASS;
		keep_hop(hop, &fib, &nothing, destination, entered, device->mtu, now + node->refresh);
	}
	if (!skb->gso_size && skb->len > hop->mtu + packet->l3)
		return PASS;
	skb->cb[WAY] = cell + 1;
	skb->cb[HOW] = FLOW_AROUND;
	return GO_ON;
#else
	return PASS;
#endif
}

/* A packet that has its new tuple goes to the other pod: one hop less, and the addresses of that link. */
static inline int send_around(struct __sk_buff *skb, const struct packet *packet)
{
#if GO_AROUND
	u32 cell = skb->cb[WAY] - 1;
	struct hop *hop = hops.lookup(&cell);
	u8 hops_left = packet->hops - 1;

	if (!hop)
		return TC_ACT_SHOT;
	if (packet->version == 4) {
		/* The TTL and its part of the header's checksum balance each other. */
		if (bpf_l3_csum_replace(skb, packet->l3 + 10, packet->hops, hops_left, 2) ||
		    bpf_skb_store_bytes(skb, packet->l3 + 8, &hops_left, 1, 0))
			return TC_ACT_SHOT;
	} else if (bpf_skb_store_bytes(skb, packet->l3 + 7, &hops_left, 1, BPF_F_RECOMPUTE_CSUM)) {
		return TC_ACT_SHOT;
	}
	if (bpf_skb_store_bytes(skb, 0, hop->frame, sizeof(hop->frame), 0))
		return TC_ACT_SHOT;
	count(AROUND_SENT);
	return bpf_redirect_peer(hop->device, 0);
#else
	return TC_ACT_SHOT;
#endif
}

/* The row of a reply that goes around, where it enters: in the stack it would have met it where it leaves. */
static inline struct flow *reply_around(struct packet *packet)
{
#if GO_AROUND
	struct flow *flow;

	if (packet->error || packet->fragment != WHOLE ||
	    !is_marked(MARK_FROM, &packet->key.source, packet->key.source_port))
		return 0;
	packet->key.hook = HOOK_EGRESS;
	flow = flows.lookup(&packet->key);
	packet->key.hook = HOOK_INGRESS;
	return flow && flow->action == FLOW_UNDNAT && (flow->flags & FLOW_AROUND) ? flow : 0;
#else
	return 0;
#endif
}

#endif
