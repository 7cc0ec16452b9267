/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Under which address and port a masqueraded flow leaves this node, and its rows.
 *
 * Both are known as soon as the device is whose address must be taken: to XDP with the first packet that enters, to tc
 * with the first that leaves. Which ports may be taken is told by port.h; a socket of the node that binds such a port
 * later meets `leave_alone`.
 */
#ifndef EBPFLB_MASQUERADE_H
#define EBPFLB_MASQUERADE_H

#include "admit.h"
#include "flow.h"

/*
 * Find the address and port that a masqueraded flow has on the device by which it leaves, and write the row of its
 * replies. Two CPUs may do this for one flow at once: both ports then lead back to the client, and the later one stays.
 */
static inline int allocate_port(struct __sk_buff *skb, const struct packet *packet, struct flow *flow,
				const struct settings *node, u64 now)
{
	u32 ifindex = skb->ifindex;
	struct device *device = devices.lookup(&ifindex);
	struct flow_key key = {}, request = {};
	struct flow row = {}, *entered;
	int verdict;

	if (device)
		key.destination = packet->version == 4 ? device->ipv4 : device->ipv6;
	if (is_zero(&key.destination)) {
		count(PACKET_NO_ADDRESS);
		return DISCARD;
	}
	key.source = packet->key.destination;
	key.source_port = packet->key.destination_port;
	key.protocol = packet->key.protocol;
	key.hook = HOOK_INGRESS;

	row.action = FLOW_UNSNAT;
	row.flags = FLOW_MASQUERADE | FLOW_WHOLE;
	row.address = packet->key.source;
	row.port = packet->key.source_port;
	row.other_port = packet->key.destination_port;
	row.beyond = flow->beyond;
	row.beyond_port = flow->beyond_port;
	row.client_port = flow->client_port;
	row.service = flow->service;
	row.backend = flow->backend;
	row.seen = now;
	row.created = now;
	verdict = find_port(skb, &key, packet->key.source_port, &row, node);
	if (verdict != GO_ON)
		return verdict;
	flow->address = key.destination;
	flow->port = key.destination_port;
	asm volatile("" ::: "memory"); /* both before the flag that vouches for them */
	flow->flags &= ~FLOW_UNALLOCATED;

	/* The request's row is whole now, and XDP may go on by it. */
	request.source = packet->key.source;
	request.source_port = flow->client_port;
	request.destination = flow->beyond;
	request.destination_port = flow->beyond_port;
	request.protocol = packet->key.protocol;
	request.hook = HOOK_INGRESS;
	entered = flows.lookup(&request);
	if (entered && entered->action == FLOW_DNAT && same_address(&entered->address, &packet->key.destination) &&
	    entered->port == packet->key.destination_port) {
		entered->beyond = key.destination;
		entered->beyond_port = key.destination_port;
		asm volatile("" ::: "memory"); /* the address before the flag that vouches for it */
		entered->flags |= FLOW_WHOLE;
	}
	return GO_ON;
}

/*
 * The rows of a masqueraded flow that XDP sends on, from `address` of this node: whole ones, by which it does both
 * directions. The replies' comes first, with the port. `to` becomes the request's new tuple. Returns GO_ON, or DISCARD
 * where there is no room.
 */
static inline int begin_short_flow(void *context, const struct packet *packet, const struct choice *chosen,
				   const struct address *address, const struct way *way, const struct settings *node,
				   u64 now, struct flow_key *to)
{
	struct flow_key reply = {};
	struct flow row = {};
	int verdict;

	reply.source = chosen->backend->address;
	reply.source_port = chosen->backend->port;
	reply.destination = *address;
	reply.protocol = packet->key.protocol;
	reply.hook = HOOK_INGRESS;
	row.action = FLOW_UNSNAT;
	row.flags = FLOW_MASQUERADE | FLOW_WHOLE | FLOW_SHORT;
	row.address = packet->key.source;
	row.port = packet->key.source_port;
	row.other_port = reply.source_port;
	row.beyond = packet->key.destination;
	row.beyond_port = packet->key.destination_port;
	row.client_port = packet->key.source_port;
	row.service = chosen->route->service;
	row.backend = chosen->id;
	row.seen = now;
	row.created = now;
	verdict = find_port(context, &reply, packet->key.source_port, &row, node);
	if (verdict != GO_ON)
		return verdict;

	row.action = FLOW_DNAT;
	row.address = reply.source;
	row.port = reply.source_port;
	row.other_port = packet->key.source_port;
	row.beyond = reply.destination;
	row.beyond_port = reply.destination_port;
	row.client_port = 0;
	row.flags |= opening(&packet->key);
	row.way = *way;
	set_mark(MARK_ENTERS, &packet->key.destination, 0);
	if (flows.update((struct flow_key *)&packet->key, &row)) {
		count(PACKET_NO_ROOM);
		return DISCARD;
	}
	wholly_translated(&packet->key, &row, to);
	return GO_ON;
}

/* The reply's row of the masqueraded flow that has the port by which a packet of nobody's leaves; none if none has. */
static inline struct flow *flow_with_port(const struct packet *packet, const struct settings *node,
					  struct flow_key *reply)
{
	u16 port = swap16(packet->key.source_port);
	struct flow *flow;

	if (packet->error || port < node->snat_low || port > node->snat_high)
		return 0;
	if (packet->key.protocol == IPPROTO_TCP && (packet->tcp_flags & (TCP_SYN | TCP_ACK)) != TCP_SYN)
		return 0;
	reply->source = packet->key.destination;
	reply->source_port = packet->key.destination_port;
	reply->destination = packet->key.source;
	reply->destination_port = packet->key.source_port;
	reply->protocol = packet->key.protocol;
	reply->hook = HOOK_INGRESS;
	flow = entering_flow(reply);
	return flow && flow->action == FLOW_UNSNAT ? flow : 0;
}

/* Whether masquerade takes this address on a device. What has another one has passed the device whose it is. */
static inline int is_address_of(u32 ifindex, const struct address *address)
{
	struct device *device = devices.lookup(&ifindex);

	return device && same_address(is_ipv4(address) ? &device->ipv4 : &device->ipv6, address);
}

/*
 * A packet of nobody's is left alone where it leaves, unless its replies would be led to the client of a masqueraded
 * flow: a socket of this node has bound that flow's port since, or conntrack has found the port for somebody. What an
 * ended flow left behind is removed; while it lives, the packet's flow gets another port, as conntrack would give it.
 * Who has retired gives way to its successor's ports instead, but for connections that go on. `to` becomes the new tuple.
 * Returns GO_ON, PASS or DISCARD.
 */
static inline int leave_alone(struct __sk_buff *skb, const struct packet *packet, const struct settings *node,
			      struct flow_key *to)
{
	struct flow_key reply = {};
	struct flow row = {}, *flow;
	int verdict;
	u64 now;

	flow = flow_with_port(packet, node, &reply);
	if (!flow || !is_address_of(skb->ifindex, &packet->key.source))
		return PASS;
	if (node->retired) {
		if (packet->key.protocol != IPPROTO_TCP || (flow->flags & FLOW_CLOSING))
			flows.delete(&reply);
		return PASS;
	}
	now = bpf_jiffies64();
	if (is_free_again(&reply, flow, 2 * node->refresh, node->flow_idle, node, now)) {
		forget_requests(&reply, flow);
		flows.delete(&reply);
		return PASS;
	}

	row.action = FLOW_UNSNAT;
	row.flags = FLOW_DIRECT;
	row.address = packet->key.source;
	row.port = packet->key.source_port;
	row.other_port = packet->key.destination_port;
	row.seen = now;
	row.created = now;
	verdict = find_port(skb, &reply, packet->key.source_port, &row, node);
	if (verdict != GO_ON)
		return verdict;
	row.action = FLOW_SNAT;
	row.port = reply.destination_port;
	set_mark(MARK_TO, &packet->key.destination, packet->key.destination_port);
	if (flows.update((struct flow_key *)&packet->key, &row)) {
		count(PACKET_NO_ROOM);
		return DISCARD;
	}
	count(PACKET_COLLISION);
	translated(&packet->key, &row, to);
	return GO_ON;
}

#endif
