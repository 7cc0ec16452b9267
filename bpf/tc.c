/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The packet path: full NAT at the edges of this node, for all that did not pass a socket of this kernel.
 *
 * Both programs run on every edge device: pods' interfaces (on a bridge: its ports) and the node's own devices. A
 * packet is translated once where it enters and once where it leaves, so that the stack in between (routing, rp_filter,
 * conntrack, network policy, the CNI's own rules) sees one plain flow between client and backend:
 *
 *   request   enters: frontend -> backend (destination)   leaves: client -> this node (source; masquerade only)
 *   reply     enters: this node -> client (destination)   leaves: backend -> frontend (source)
 *
 * An established packet costs one lookup in `flows` at each hook. Rules: PASS leaves a packet exactly as it came and
 * lets other programs see it; a packet that matches no row is PASS; every other early end is counted; half a
 * translation is never sent. Where it is asked for, flows between two pods go around the stack. Frames with a VLAN tag
 * belong to the VLAN's device and are met there.
 */
#include <uapi/linux/pkt_cls.h>

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
#include "around.h"
#include "reject.h"

#define PACKET_OVERHEARD 3 /* skb->pkt_type: PACKET_OTHERHOST */

static inline int finish(struct __sk_buff *skb, int verdict)
{
	if (verdict == DISCARD)
		return TC_ACT_SHOT;
	if (verdict == REDIRECTED)
		return bpf_redirect(skb->ifindex, 0);
	return TC_ACT_UNSPEC; /* the next filter, and where there is none, the stack */
}

/*
 * Whether the packet begins with its IP header. Behind generic XDP the kernel copies many packets and forgets how long
 * their link-layer header is (skb->mac_len; seen in 6.18), so that it does not show it to programs at ingress.
 */
static inline int is_headless(struct __sk_buff *skb)
{
	u8 *bytes = (void *)(long)skb->data;
	u8 version = skb->protocol == swap16(ETH_P_IP) ? 4 : 6;
	struct ethhdr *ethernet = (void *)bytes;

	if (skb->len != skb->wire_len || (void *)(bytes + 15) > (void *)(long)skb->data_end)
		return 0;
	return bytes[0] >> 4 == version && (ethernet->h_proto != skb->protocol || bytes[14] >> 4 != version);
}

/* Show the header again: it is still there, before the packet. */
static inline int restore_header(struct __sk_buff *skb)
{
	struct ethhdr ethernet = {};

	if (bpf_skb_load_bytes_relative(skb, 0, &ethernet, sizeof(ethernet), BPF_HDR_START_MAC) ||
	    bpf_skb_change_head(skb, sizeof(ethernet), 0) ||
	    bpf_skb_store_bytes(skb, 0, &ethernet, sizeof(ethernet), 0))
		return PASS;
	return GO_ON;
}

/*
 * Whether the frame was only overheard: it is another machine's, or another device's behind this one (macvlan), whose own
 * hooks it meets then.
 */
static inline int is_anothers(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data;
	struct ethhdr *ethernet = data;
	u32 ifindex = skb->ifindex;
	struct device *device;

	if (skb->pkt_type != PACKET_OVERHEARD || (void *)(ethernet + 1) > (void *)(long)skb->data_end)
		return 0;
	device = devices.lookup(&ifindex);
	return device && !is_addressed(ethernet, device);
}

/*
 * The headers are read in place. Only where they do not lie in the packet's linear part are they pulled there, since
 * that copies: the payload of what local sockets send is never linear, its headers always are.
 */
static inline int read_packet(struct __sk_buff *skb, struct packet *packet)
{
	u32 headers = skb->len < HEADERS ? skb->len : HEADERS;
	int verdict = TOO_SHORT;

	if (skb->vlan_present)
		return PASS;
	if (skb->protocol != swap16(ETH_P_IP) && skb->protocol != swap16(ETH_P_IPV6))
		return PASS;
	if (packet->key.hook == HOOK_INGRESS) {
		if (is_headless(skb) && restore_header(skb) != GO_ON)
			return PASS;
		if (is_anothers(skb))
			return PASS;
	}
	packet->l3 = sizeof(struct ethhdr);
#pragma nounroll
	for (int pulled = 0; pulled < 2; pulled++) {
		void *data = (void *)(long)skb->data;
		void *end = (void *)(long)skb->data_end;
		struct ethhdr *ethernet = data;

		if ((void *)(ethernet + 1) > end)
			return PASS;
		verdict = parse_packet(data, end, ethernet->h_proto, packet);
		if (verdict != TOO_SHORT || bpf_skb_pull_data(skb, headers))
			break;
	}
	/* Segments that are still one packet may be longer than a length can say: it is 0 then. */
	if (verdict == GO_ON && ends_early(packet) && !skb->gso_size)
		verdict = TOO_SHORT;
	if (verdict != TOO_SHORT)
		return verdict;
	count(PACKET_TOO_SHORT);
	return PASS;
}

/* The first packet of a flow: the verdict, and where that is to forward, the tuple that the packet gets. */
static inline int new_flow(struct __sk_buff *skb, struct packet *packet, const struct settings *node, u64 now,
			   struct flow_key *to)
{
	struct choice chosen = {};
	int verdict = admit(packet, skb->ifindex, 0, node, now, &chosen);

	if (verdict == NOBODYS)
		return pass_by(packet, node, now, to);
	if (verdict == REFUSE)
		return reject(skb, packet);
	if (verdict != GO_ON)
		return verdict;
	if (GO_AROUND && !chosen.how && is_peer(skb->ifindex))
		find_way_around(skb, packet, &chosen.backend->address, node, now);
	chosen.how |= how_around(skb);
	verdict = begin_flow(packet, chosen.route, chosen.backend, chosen.id, chosen.how, node, now, to);
	if (verdict != GO_ON)
		return verdict;
	count(PACKET_FORWARDED);
	count_traffic(chosen.route->service, 1, 1, skb->len);
	return GO_ON;
}

/* Write the new tuple into the packet. */
static inline int carry_out(struct __sk_buff *skb, const struct packet *packet, const struct flow_key *to)
{
	if (packet->fragment == FIRST_FRAGMENT)
		remember_ports(packet);
	return rewrite(skb, packet, to) == DISCARD ? DISCARD : PASS;
}

/* A packet of a Service's flow, where it meets the client's side: once on its way, whatever else happens to it. */
static inline void count_packet(struct __sk_buff *skb, const struct flow *flow)
{
	if (!(flow->flags & FLOW_DIRECT))
		count_traffic(flow->service, 0, 1, skb->len);
}

int tc_ingress(struct __sk_buff *skb)
{
	struct packet packet = {};
	struct flow_key to;
	struct settings *node;
	struct flow *flow;
	int verdict, stale = 0;
	u64 now;

	packet.key.hook = HOOK_INGRESS;
	verdict = read_packet(skb, &packet);
	if (verdict != GO_ON)
		return finish(skb, verdict);
	node = node_settings();
	if (!node)
		return finish(skb, PASS);
	now = bpf_jiffies64();
	forget_way(skb);

	flow = entering_flow(&packet.key);
	if (!flow)
		flow = reply_around(&packet);
	if (flow && flow->action == FLOW_ELSEWHERE)
		return finish(skb, PASS);
	if (flow && !packet.error && flow->action == FLOW_DNAT &&
	    (!request_is_current(&packet, flow, node, now) || !is_looked_after(&packet, flow, node, now))) {
		count(FLOW_STALE);
		stale = 1;
		flow = 0;
	}
	if (flow && (flow->flags & FLOW_SHORT)) {
		verdict = complete_flow(&packet.key, flow, node, now);
		if (verdict != GO_ON)
			return finish(skb, verdict);
	}
	if (flow) {
		translated(&packet.key, flow, &to);
		if (flow->flags & FLOW_AROUND)
			find_way_around(skb, &packet, &to.destination, node, now);
		if (flow->action == FLOW_UNDNAT && !has_way(skb))
			return finish(skb, PASS); /* it is translated where it leaves */
		use_flow(&packet, flow, node, now);
		if (flow->action != FLOW_UNSNAT)
			count_packet(skb, flow);
	} else {
		verdict = new_flow(skb, &packet, node, now, &to);
		if (verdict != GO_ON) {
			if (stale)
				flows.delete(&packet.key); /* or what follows this packet would still be led by it */
			return finish(skb, verdict);
		}
	}
	verdict = carry_out(skb, &packet, &to);
	if (verdict == PASS && has_way(skb))
		return send_around(skb, &packet);
	return finish(skb, verdict);
}

int tc_egress(struct __sk_buff *skb)
{
	struct packet packet = {};
	struct flow_key to;
	struct settings *node;
	struct flow *flow;
	int verdict;
	u64 now;

	packet.key.hook = HOOK_EGRESS;
	verdict = read_packet(skb, &packet);
	if (verdict != GO_ON)
		return finish(skb, verdict);
	flow = leaving_flow(&packet.key);
	node = node_settings();
	if (!node)
		return finish(skb, PASS);
	if (!flow) {
		verdict = leave_alone(skb, &packet, node, &to);
		return finish(skb, verdict == GO_ON ? carry_out(skb, &packet, &to) : verdict);
	}
	now = bpf_jiffies64();

	if (flow->flags & FLOW_UNALLOCATED) {
		if (packet.error)
			return finish(skb, PASS);
		verdict = allocate_port(skb, &packet, flow, node, now);
		if (verdict != GO_ON)
			return finish(skb, verdict);
	}
	use_flow(&packet, flow, node, now);
	if (flow->action == FLOW_UNDNAT)
		count_packet(skb, flow);
	translated(&packet.key, flow, &to);
	return finish(skb, carry_out(skb, &packet, &to));
}
