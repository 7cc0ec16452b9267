/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The address and port under which a masqueraded flow leaves this node.
 *
 * They are found by the first packet that leaves, since only there is the device known whose address must be taken. A
 * port is free if no flow and no socket of the node could get the same replies; the range lies outside the kernel's
 * own ephemeral ports, so that no later socket takes it either.
 */
#ifndef EBPFLB_MASQUERADE_H
#define EBPFLB_MASQUERADE_H

#include "flow.h"

/* Whether a socket of this node could take the reply: its port is then not ours to give out. */
static inline int port_is_taken(struct __sk_buff *skb, const struct flow_key *reply)
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
		socket = bpf_skc_lookup_tcp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	else if (reply->protocol == IPPROTO_UDP)
		socket = bpf_sk_lookup_udp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	else
		socket = 0;
	if (!socket)
		return 0;
	bpf_sk_release(socket);
	return 1;
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
	struct flow_key key = {};
	struct flow row = {};

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
	row.flags = FLOW_MASQUERADE;
	row.address = packet->key.source;
	row.port = packet->key.source_port;
	row.other_port = packet->key.destination_port;
	row.service = flow->service;
	row.backend = flow->backend;
	row.seen = now;
	row.created = now;
	set_mark(MARK_ENTERS, &key.destination, 0);

#pragma nounroll
	for (int i = 0; i < PORT_TRIES; i++) {
		/* The CRC of SCTP covers the ports, and no helper mends it: such a flow keeps its port or has none. */
		key.destination_port =
			packet->key.protocol == IPPROTO_SCTP ? packet->key.source_port : random_port(node);
		if (port_is_taken(skb, &key))
			continue;
		if (flows.insert(&key, &row))
			continue;
		flow->address = key.destination;
		flow->port = key.destination_port;
		flow->flags &= ~FLOW_UNALLOCATED;
		return GO_ON;
	}
	count(PACKET_NO_PORT);
	return DISCARD;
}

#endif
