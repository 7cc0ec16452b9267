/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The packet path before the stack: what comes from outside for a frontend whose backend is elsewhere is sent on from
 * the driver's receive path, with both ends replaced, and so are its replies.
 *
 *   request   client -> frontend   becomes   this node -> backend
 *   reply     backend -> this node becomes   frontend  -> client
 *
 * Rules: a frame is sent on whole, or passed up exactly as it came; tc, which runs behind this, carries any packet of any
 * flow with the same translation. Passed up is all that the stack must see or say: what is nobody's, local backends,
 * refusals, fragments, IP options, ICMP errors, what must wait for a neighbour or does not fit. Verdicts without an answer
 * are carried out here.
 */
#include <uapi/linux/if_vlan.h>

#include "config.h"
#include "maps.h"
#include "addr.h"
#include "lookup.h"
#include "parse.h"
#include "admit.h"
#include "row.h"
#include "port.h"
#include "flow.h"
#include "masquerade.h"
#include "nat.h"
#include "way.h"

#define VLAN_ID 0x0fff

/* The device that a frame belongs to, and the one that it came by: they differ where the frame has a VLAN tag. */
struct entry {
	u32 device;
	u32 under;
};

struct vlan_header {
	u16 tag;
	u16 ethertype;
};

/* The device that the frame belongs to, by its VLAN tag; PASS where none is known. */
static inline int enter_vlan(u16 tag, struct entry *entry)
{
	struct vlan_key key = {};
	u32 *device;

	key.device = entry->under;
	key.id = swap16(tag) & VLAN_ID;
	device = vlans.lookup(&key);
	if (!device)
		return PASS;
	entry->device = *device;
	return GO_ON;
}

/*
 * What the IP header says of the packet's length must be true: the stack drops or trims what is not as long as that. A
 * longer frame counts as what it is, lest a lie takes it past an MTU. `present`: bytes from the IP header up that can be
 * read; of a packet of several buffers those of the first.
 */
static inline int bound_length(struct xdp_md *ctx, struct packet *packet, u32 present)
{
#if HAVE_XDP_FRAGS
	if (packet->length > present)
		present = (u32)bpf_xdp_get_buff_len(ctx) - (packet->l3 & OFFSETS);
#endif
	if (packet->length > present || ends_early(packet))
		return PASS;
	packet->length = present;
	return GO_ON;
}

static inline int parse_frame(struct xdp_md *ctx, struct packet *packet, struct entry *entry)
{
	void *data = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;
	struct ethhdr *ethernet = data;
	u16 ethertype;
	int verdict;

	entry->device = entry->under = ctx->ingress_ifindex;
	if ((void *)(ethernet + 1) > end)
		return PASS;
	ethertype = ethernet->h_proto;
	packet->l3 = sizeof(*ethernet);
	if (ethertype == swap16(ETH_P_8021Q)) {
		struct vlan_header *vlan = (void *)(ethernet + 1);

		if ((void *)(vlan + 1) > end)
			return PASS;
		if (enter_vlan(vlan->tag, entry) != GO_ON)
			return PASS;
		ethertype = vlan->ethertype;
		packet->l3 += sizeof(*vlan);
	}
	verdict = parse_plain(data, end, ethertype, packet);
	if (verdict != GO_ON)
		return PASS; /* tc counts what is too short */
	return bound_length(ctx, packet, (u32)(end - data) - (packet->l3 & OFFSETS));
}

/* What the FIB says; GO_ON, or PASS, counted. */
static inline int ask_way(struct xdp_md *ctx, const struct packet *packet, const struct entry *entry,
			  const struct address *destination, const struct settings *node, u64 now, struct way *way)
{
	struct bpf_fib_lookup fib = {};
	struct device *device;
	u32 leaving, may, back, mtu, entered = entry->device, under = entry->under;
	u16 length = (u16)packet->length;
	/* As the stack would route it behind tc, which replaces the source where the packet leaves. */
	long found = ask_fib(ctx, packet, &packet->key.source, destination, entered, length, &fib);

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
	__builtin_memcpy(way->mac, device->mac, 6);
	may = device->flags & DEVICE_XDP;
	back = device->flags & DEVICE_BACK;
	leaving = fib.ifindex;
	device = devices.lookup(&leaving);
	/* To another device only without a tag; a frame with one goes back by the VLAN that it came from, or up. */
	if (device && leaving != entered)
		may = entered == under && (device->flags & DEVICE_XDP) && (device->flags & DEVICE_REDIRECT);
	if (!device || !may) {
		count(XDP_LOCAL);
		return PASS;
	}
	mtu = device->mtu;
	/* Since 5.13 it says the way's own MTU; before, that it carries this length, and a longer packet asks again. */
	if (fib.tot_len < mtu)
		mtu = fib.tot_len;
	way->entered = entered;
	way->device = leaving != entered || (back && entered == under) ? leaving | BY_REDIRECT : leaving;
	way->mtu = (u16)mtu;
	__builtin_memcpy(way->frame, fib.dmac, 6);
	__builtin_memcpy(way->frame + 6, fib.smac, 6);
	way->until = believed_until(node, now);
	return GO_ON;
}

/*
 * The way of a packet to `destination`, by what the flow's row keeps (`kept`; null where there is no row yet) or by the
 * FIB; PASS, counted, where XDP has none or the packet does not fit it.
 */
static inline int find_way(struct xdp_md *ctx, const struct packet *packet, const struct entry *entry,
			   const struct address *destination, const struct settings *node, u64 now, struct way *kept,
			   struct way *way)
{
	void *data = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;
	struct ethhdr *ethernet = data;

	if ((void *)(ethernet + 1) > end)
		return PASS;
	if (packet->hops <= 1) {
		count(XDP_NO_HOPS);
		return PASS;
	}
	if (!kept || !recall_way(kept, packet->length, entry->device, node, now, way)) {
		if (ask_way(ctx, packet, entry, destination, node, now, way) != GO_ON)
			return PASS;
		if (kept)
			keep_way(kept, way);
	}
	if (packet->length > way->mtu) {
		count(XDP_TOO_LONG);
		return PASS;
	}
	if (!is_for(ethernet, way))
		return PASS; /* see is_for_us */
	return GO_ON;
}

/* Whether the frame is for the device that it came by, and not flooded by a switch or another device's behind it. */
static inline int is_for_us(struct xdp_md *ctx, const struct entry *entry)
{
	void *data = (void *)(long)ctx->data;
	struct ethhdr *ethernet = data;
	u32 under = entry->under;
	struct device *device = devices.lookup(&under);

	if (!device || (void *)(ethernet + 1) > (void *)(long)ctx->data_end)
		return 0;
	return is_addressed(ethernet, device);
}

/*
 * The first packet of a flow. Whatever is chosen is written down, also where the packet is passed up: tc must not choose
 * again, or local backends would get less than their share.
 */
static inline int new_flow(struct xdp_md *ctx, struct packet *packet, const struct entry *entry,
			   const struct settings *node, u64 now, int stale, struct way *way, struct flow_key *to,
			   u32 *service)
{
	struct address address = {};
	struct choice chosen = {};
	struct device *device;
	u32 leaving;
	int verdict;

	if (!is_for_us(ctx, entry))
		return PASS;
	verdict = admit(packet, entry->device, 1, node, now, &chosen);
	if (verdict == DISCARD)
		count(XDP_DROPPED);
	if (verdict != GO_ON)
		return verdict == DISCARD ? DISCARD : PASS;

	if ((chosen.how & FLOW_MASQUERADE) &&
	    find_way(ctx, packet, entry, &chosen.backend->address, node, now, 0, way) == GO_ON) {
		leaving = way->device & ~BY_REDIRECT;
		device = devices.lookup(&leaving);
		if (device)
			address = packet->version == 4 ? device->ipv4 : device->ipv6;
	}
	if (is_zero(&address)) {
		verdict = begin_flow(packet, chosen.route, chosen.backend, chosen.id, chosen.how, node, now, to);
		if (verdict != GO_ON)
			return DISCARD;
		count(PACKET_FORWARDED);
		count_traffic(chosen.route->service, 1, 0, 0); /* tc sees a packet of a known flow */
		if (stale)
			count(FLOW_STALE);
		return PASS;
	}
	verdict = begin_short_flow(ctx, packet, &chosen, &address, way, node, now, to);
	if (verdict != GO_ON)
		return verdict;
	count(XDP_FORWARDED);
	if (stale)
		count(FLOW_STALE);
	*service = chosen.route->service;
	count_traffic(*service, 1, 0, 0);
	return GO_ON;
}

/* Give the frame its new tuple and send it on; or pass it up, untouched, where the stack must see one. */
static inline int send(struct xdp_md *ctx, const struct packet *packet, const struct entry *entry,
		       const struct flow_key *to, const struct way *way, const struct settings *node, u64 now,
		       u32 service)
{
	void *data = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;
	struct ethhdr *ethernet = data;

	if ((void *)(ethernet + 1) > end)
		return XDP_PASS;
	if (way->until == believed_until(node, now) && is_for_the_stack(way, node, now)) {
		count(XDP_BY_STACK);
		return XDP_PASS;
	}
	if (rewrite_in_place(data, end, packet, to) != GO_ON)
		return XDP_PASS;
	write_macs(ethernet, way);
	count(XDP_SENT);
	count_traffic(service, 0, 1, (u64)packet->length + packet->l3);
	if (way->device & BY_REDIRECT)
		return bpf_redirect(way->device & ~BY_REDIRECT, 0);
	return XDP_TX;
}

int xdp_ingress(struct xdp_md *ctx)
{
	struct packet packet = {};
	struct entry entry = {};
	struct settings *node;
	struct flow_key to;
	struct flow *flow;
	struct way way = {};
	u32 service = 0;
	int verdict, stale = 0;
	u64 now;

	packet.key.hook = HOOK_INGRESS;
	if (parse_frame(ctx, &packet, &entry) != GO_ON)
		return XDP_PASS;
	flow = entering_flow(&packet.key);
	if (!flow && !is_known(&packet.key.destination))
		return XDP_PASS;
	node = node_settings();
	if (!node)
		return XDP_PASS;
	now = bpf_jiffies64();

	if (flow && flow->action == FLOW_DNAT &&
	    (!request_is_current(&packet, flow, node, now) ||
	     ((flow->flags & FLOW_WHOLE) && !is_looked_after(&packet, flow, node, now)))) {
		stale = 1;
		flow = 0;
	}
	if (flow) {
		if (!(flow->flags & FLOW_WHOLE))
			return XDP_PASS;
		if (find_way(ctx, &packet, &entry, &flow->address, node, now, &flow->way, &way) != GO_ON)
			return XDP_PASS;
		service = flow->service;
		use_flow(&packet, flow, node, now);
		wholly_translated(&packet.key, flow, &to);
	} else {
		verdict = new_flow(ctx, &packet, &entry, node, now, stale, &way, &to, &service);
		if (verdict == DISCARD) {
			if (stale)
				flows.delete(&packet.key); /* or what follows would still be led by it */
			return XDP_DROP;
		}
		if (verdict != GO_ON)
			return XDP_PASS; /* tc sees to what is stale, unless it has been begun anew */
	}
	return send(ctx, &packet, &entry, &to, &way, node, now, service);
}
