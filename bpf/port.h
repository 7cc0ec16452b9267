/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * A port for a masqueraded flow: which are free, and when one that was given out comes back.
 *
 * A port is free if no flow that still needs it, no socket of the node and no Service could get the same replies. The range
 * lies outside the kernel's own ephemeral ports and the usual node ports, so that hardly any later socket or Service
 * takes it either.
 */
#ifndef EBPFLB_PORT_H
#define EBPFLB_PORT_H

#include "row.h"

/* How often another port is tried before a flow is given up. */
#define PORT_TRIES 12

static inline u16 random_port(const struct settings *node)
{
	u32 span = (u32)node->snat_high - node->snat_low + 1;

	return swap16((u16)(node->snat_low + (u32)(((u64)bpf_get_prandom_u32() * span) >> 32)));
}

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

#endif
