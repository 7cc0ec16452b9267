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
 * lets other filters see it; a packet that matches no row is PASS; every other early end is counted; half a
 * translation is never sent. Frames with a VLAN tag belong to the VLAN's device and are met there.
 */
#include <uapi/linux/pkt_cls.h>

#include "config.h"
#include "maps.h"
#include "addr.h"
#include "lookup.h"
#include "parse.h"
#include "flow.h"
#include "masquerade.h"
#include "nat.h"
#include "reject.h"

static inline int finish(struct __sk_buff *skb, int verdict)
{
	if (verdict == DISCARD)
		return TC_ACT_SHOT;
	if (verdict == REDIRECTED)
		return bpf_redirect(skb->ifindex, 0);
	return TC_ACT_UNSPEC; /* the next filter, and where there is none, the stack */
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
	if (verdict != TOO_SHORT)
		return verdict;
	count(PACKET_TOO_SHORT);
	return PASS;
}

static inline u32 packet_scope(struct __sk_buff *skb, const struct packet *packet, u32 *flags)
{
	u32 ifindex = skb->ifindex;
	struct device *device = devices.lookup(&ifindex);

	*flags = source_flags(&packet->key.source);
	if (device && (device->flags & DEVICE_POD))
		*flags |= SOURCE_POD;
	return *flags ? SCOPE_INTERNAL : SCOPE_EXTERNAL;
}

static inline int wants_masquerade(const struct packet *packet, const struct route *route,
				   const struct backend *backend, u32 flags)
{
	if (same_address(&packet->key.source, &backend->address))
		return 1; /* to oneself: the reply must come back through here */
	if (route->masquerade == MASQUERADE_NOT_POD)
		return !(flags & SOURCE_POD);
	return route->masquerade == MASQUERADE_ALWAYS;
}

/*
 * The first packet of a flow to a frontend: the row's verdict, and where that is to forward, a backend and the tuple
 * that the packet gets.
 */
static inline int new_flow(struct __sk_buff *skb, struct packet *packet, const struct settings *node, u64 now,
			   struct flow_key *to)
{
	struct frontend *frontend;
	struct route *route;
	struct backend *backend;
	u32 flags, id = 0;
	int verdict, not_new;

	frontend = find_frontend(&packet->key.destination, packet->key.destination_port, packet->key.protocol);
	if (packet->error || packet->fragment == LATER_FRAGMENT)
		return PASS;
	if (!frontend)
		return pass_by(packet, node, now, to);
	if (is_loopback(&packet->key.destination))
		return PASS; /* a martian: the stack drops it */

	if (packet_scope(skb, packet, &flags) == SCOPE_INTERNAL)
		route = &frontend->scope[SCOPE_INTERNAL];
	else
		route = &frontend->scope[SCOPE_EXTERNAL];
	not_new = packet->key.protocol == IPPROTO_TCP && (packet->tcp_flags & (TCP_SYN | TCP_ACK)) != TCP_SYN;
	if (not_new && node->flows_elsewhere) {
		count(PACKET_NOT_NEW);
		return PASS; /* conntrack or IPVS may know it, and would not know it translated */
	}

	if (route->ranges && !in_ranges(route->ranges, &packet->key.source)) {
		count(PACKET_OUT_OF_RANGE);
		return DISCARD;
	}
	if (route->verdict == VERDICT_DROP) {
		count(PACKET_DROPPED);
		return DISCARD;
	}
	if (route->verdict == VERDICT_REJECT)
		return reject(skb, packet);

	backend = choose_backend(route, &id);
	if (!backend) {
		count(PACKET_NO_BACKEND);
		return PASS;
	}
	if (packet->key.protocol == IPPROTO_SCTP && backend->port != packet->key.destination_port) {
		count(PACKET_SCTP_PORT);
		return DISCARD;
	}
	if (not_new)
		count(PACKET_NOT_NEW);
	verdict =
		begin_flow(packet, route, backend, id, wants_masquerade(packet, route, backend, flags), node, now, to);
	if (verdict != GO_ON)
		return verdict;
	count(PACKET_FORWARDED);
	count_traffic(route->service, 1, 1, skb->len);
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

	flow = entering_flow(&packet.key);
	if (flow && flow->action == FLOW_ELSEWHERE)
		return finish(skb, PASS);
	if (flow && !packet.error && flow->action == FLOW_DNAT && !request_is_current(&packet, flow, node, now)) {
		count(FLOW_STALE);
		stale = 1;
		flow = 0;
	}
	if (flow) {
		use_flow(&packet, flow, node, now);
		if (flow->action == FLOW_DNAT)
			count_packet(skb, flow);
		translated(&packet.key, flow, &to);
	} else {
		verdict = new_flow(skb, &packet, node, now, &to);
		if (verdict != GO_ON) {
			if (stale)
				flows.delete(&packet.key); /* or what follows this packet would still be led by it */
			return finish(skb, verdict);
		}
	}
	return finish(skb, carry_out(skb, &packet, &to));
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
	if (!flow) {
		give_way(&packet);
		return finish(skb, PASS);
	}
	node = node_settings();
	if (!node)
		return finish(skb, PASS);
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
