/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the rows say about the first packet of a flow: shared by the tc and XDP programs, so that both say the same.
 *
 * A verdict, and where that is GO_ON, a backend. Nothing is written here but what affinity remembers.
 */
#ifndef EBPFLB_ADMIT_H
#define EBPFLB_ADMIT_H

#include "affinity.h"
#include "owned.h"
#include "parse.h"

/* More verdicts, of `admit` only. */
#define NOBODYS 4 /* to no frontend and no cluster IP */
#define REFUSE 5  /* to be answered: see reject.h */

struct choice {
	struct route *route;
	struct backend *backend;
	u32 id; /* of the backend */
	u8 how; /* FLOW_MASQUERADE, or 0 */
};

static inline u32 client_flags(const struct packet *packet, u32 ifindex)
{
	struct device *device = devices.lookup(&ifindex);
	u32 flags = source_flags(&packet->key.source);

	if (device && (device->flags & DEVICE_POD))
		flags |= SOURCE_POD;
	return flags;
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

/* TCP that is not the beginning of a connection. */
static inline int is_not_new(const struct packet *packet)
{
	return packet->key.protocol == IPPROTO_TCP && (packet->tcp_flags & (TCP_SYN | TCP_ACK)) != TCP_SYN;
}

/*
 * The packet entered by the device `ifindex`. `early`: before the stack (XDP), where what is not forwarded or dropped is
 * passed up, to be admitted again by tc and counted there.
 */
static inline int admit(const struct packet *packet, u32 ifindex, int early, const struct settings *node, u64 now,
			struct choice *chosen)
{
	const struct flow_key *key = &packet->key;
	struct affinity_key client = {};
	struct frontend *frontend;
	struct route *route;
	u32 flags, hash = 0;

	if (packet->error || packet->fragment == LATER_FRAGMENT)
		return PASS;
	frontend = find_frontend(&key->destination, key->destination_port, key->protocol);
	if (!frontend && !is_owned(&key->destination))
		return NOBODYS;
	if (is_loopback(&key->destination) || is_martian(&key->source))
		return PASS; /* the stack drops it */
	if (early && is_link_local(&key->source))
		return PASS;
	if (is_not_new(packet) && node->flows_elsewhere) {
		if (!early)
			count(PACKET_NOT_NEW);
		return PASS; /* conntrack or IPVS may know it, and would not know it translated */
	}
	if (!frontend) {
		if (!early)
			count(PACKET_UNDEFINED);
		return REFUSE;
	}

	flags = client_flags(packet, ifindex);
	if (early && (flags & SOURCE_NODE))
		return PASS; /* from this node's own address: a martian, too */
	if (flags)
		route = &frontend->scope[SCOPE_INTERNAL];
	else
		route = &frontend->scope[SCOPE_EXTERNAL];
	if (route->ranges && !in_ranges(route->ranges, &key->source)) {
		count(PACKET_OUT_OF_RANGE);
		return DISCARD;
	}
	if (route->verdict == VERDICT_DROP) {
		count(PACKET_DROPPED);
		return DISCARD;
	}
	if (route->verdict == VERDICT_REJECT)
		return REFUSE;

	client.client = key->source;
	client.kind = CLIENT_ADDRESS;
	if (route->table)
		hash = flow_hash(key, route->affinity != 0);
	chosen->backend = choose_backend(route, &client, hash, node, now, &chosen->id);
	if (!chosen->backend) {
		if (!early)
			count(PACKET_NO_BACKEND);
		return PASS;
	}
	if (key->protocol == IPPROTO_SCTP && chosen->backend->port != key->destination_port) {
		count(PACKET_SCTP_PORT);
		return DISCARD;
	}
	if (is_not_new(packet))
		count(PACKET_NOT_NEW);
	chosen->route = route;
	chosen->how = wants_masquerade(packet, route, chosen->backend, flags) ? FLOW_MASQUERADE : 0;
	return GO_ON;
}

#endif
