/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The address and port under which a masqueraded flow leaves this node.
 *
 * They are found as soon as the device is known whose address must be taken: by XDP with the first packet that enters, by
 * tc with the first that leaves. A port is free if no flow that still needs it, no socket of the node and no Service could
 * get the same replies. The range lies outside the kernel's own ephemeral ports and the usual node ports, so that hardly
 * any later socket or Service takes it either (`leave_alone` has to do with sockets that do).
 */
#ifndef EBPFLB_MASQUERADE_H
#define EBPFLB_MASQUERADE_H

#include "admit.h"
#include "flow.h"

/* Whether a socket of this node could take the reply: its port is then not ours to give out. */
static inline int port_is_taken(void *context, const struct flow_key *reply)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *socket;
	u32 size;

	if (is_ipv4(&reply->source)) {
		tuple.ipv4.saddr = reply->source.word[3];
		tuple.ipv4.daddr = reply->destination.word[3];
		tuple.ipv4.sport = reply->source_port;
		tuple.ipv4.dport = reply->destination_port;
		size = sizeof(tuple.ipv4);
	} else {
		__builtin_memcpy(tuple.ipv6.saddr, &reply->source, 16);
		__builtin_memcpy(tuple.ipv6.daddr, &reply->destination, 16);
		tuple.ipv6.sport = reply->source_port;
		tuple.ipv6.dport = reply->destination_port;
		size = sizeof(tuple.ipv6);
	}
	if (reply->protocol == IPPROTO_TCP)
		socket = bpf_skc_lookup_tcp(context, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	else if (reply->protocol == IPPROTO_UDP)
		socket = bpf_sk_lookup_udp(context, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	else
		socket = 0;
	if (!socket)
		return 0;
	bpf_sk_release(socket);
	return 1;
}

/*
 * Whether the reply would be taken for a request: a backend that answers a datagram by a socket without a peer names where
 * the answer goes, and a Service's address is replaced there (sendmsg in sock.c).
 */
static inline int is_asked_for(const struct flow_key *reply)
{
	return reply->protocol == IPPROTO_UDP &&
	       find_frontend(&reply->destination, reply->destination_port, reply->protocol);
}

/* Seconds for which the port of a flow that has ended stays with it, as TIME_WAIT at its backend, if others are free. */
#define LINGER 60

/* Seconds for which an idle flow of datagrams keeps its port at least, as conntrack keeps one of a single exchange. */
#define EXCHANGE 30

/* Seconds for which an idle connection keeps its port: two hours and four minutes (RFC 5382, REQ-5). */
#define PATIENCE 7440

/* The request's row of the flow whose replies have the row `other`; `key` becomes its key. None if that is another's. */
static inline struct flow *request_row(const struct flow_key *reply, const struct flow *other, struct flow_key *key)
{
	struct flow *row;

	key->protocol = reply->protocol;
	key->hook = HOOK_INGRESS;
	key->source = other->address;
	key->source_port = other->client_port;
	key->destination = other->beyond;
	key->destination_port = other->beyond_port;
	row = flows.lookup(key);
	if (row && row->beyond_port == reply->destination_port && row->port == reply->source_port &&
	    same_address(&row->beyond, &reply->destination) && same_address(&row->address, &reply->source))
		return row;
	return 0;
}

/* The row by which the requests of such a flow leave; `key` becomes its key. None if that is another's. */
static inline struct flow *leaving_request_row(const struct flow_key *reply, const struct flow *other,
					       struct flow_key *key)
{
	struct flow *row;

	key->protocol = reply->protocol;
	key->hook = HOOK_EGRESS;
	key->source = other->address;
	key->source_port = other->port;
	key->destination = reply->source;
	key->destination_port = reply->source_port;
	row = flows.lookup(key);
	if (row && row->action == FLOW_SNAT && row->port == reply->destination_port &&
	    same_address(&row->address, &reply->destination))
		return row;
	return 0;
}

/*
 * Whether a port that has been given out is its flow's no more: that has ended, in both directions (a half-closed
 * connection that is in use keeps its port, and so do datagrams that nobody answers), or it is a connection that was
 * never opened (or forged SYNs would take all ports), or has been idle for so long that its client must have vanished.
 * `idle` is what an ended flow must have been at least, `silent` what one of datagrams must have been to count as ended.
 */
static inline int is_free_again(const struct flow_key *reply, const struct flow *other, u64 idle, u64 silent,
				const struct settings *node, u64 now)
{
	struct flow_key key = {};
	struct flow *request;

	if (other->action != FLOW_UNSNAT || !(other->flags & (FLOW_WHOLE | FLOW_DIRECT)) ||
	    !is_idle(other->seen, idle, now))
		return 0;
	if (other->flags & FLOW_DIRECT)
		request = leaving_request_row(reply, other, &key);
	else
		request = request_row(reply, other, &key);
	if (reply->protocol != IPPROTO_TCP)
		return is_idle(other->seen, silent, now) && (!request || is_idle(request->seen, silent, now));
	if (!request || (other->flags & request->flags & FLOW_CLOSING))
		return 1;
	if (!(request->flags & FLOW_OPENING))
		idle = (u64)PATIENCE * node->second;
	return is_idle(other->seen, idle, now) && is_idle(request->seen, idle, now);
}

/* Whatever still leads out by an ended flow's port, or a late packet would go into the next flow's connection. */
static inline void forget_requests(const struct flow_key *reply, const struct flow *other)
{
	struct flow_key key = {};

	if (request_row(reply, other, &key))
		flows.delete(&key);
	if (leaving_request_row(reply, other, &key))
		flows.delete(&key);
}

/*
 * Give a masqueraded flow a port at `reply->destination`, which is completed by it, and write the row of its replies:
 * tc and XDP alike, so that neither gives out what the other has. Returns GO_ON, or DISCARD where there is none.
 */
static inline int find_port(void *context, struct flow_key *reply, u16 client_port, struct flow *row,
			    const struct settings *node)
{
	u64 idle = (u64)LINGER * node->second;
	u64 silent = node->flow_idle;
	struct flow *other;

	set_mark(MARK_ENTERS, &reply->destination, 0);
#pragma nounroll
	for (int i = 0; i < PORT_TRIES; i++) {
		if (i == PORT_TRIES / 2) {
			idle = 2 * node->refresh; /* ports are scarce */
			if (silent > (u64)EXCHANGE * node->second)
				silent = (u64)EXCHANGE * node->second;
		}
		/* The CRC of SCTP covers the ports, and no helper mends it: such a flow keeps its port or has none. */
		reply->destination_port = reply->protocol == IPPROTO_SCTP ? client_port : random_port(node);
		if (port_is_taken(context, reply) || is_asked_for(reply))
			continue;
		if (!flows.insert(reply, row))
			return GO_ON;
		other = flows.lookup(reply);
		if (!other || !is_free_again(reply, other, idle, silent, node, row->seen))
			continue;
		forget_requests(reply, other);
		if (!flows.update(reply, row))
			return GO_ON;
	}
	count(PACKET_NO_PORT);
	return DISCARD;
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

#endif
