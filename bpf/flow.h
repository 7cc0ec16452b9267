/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The rows of a flow together: who writes which, and when.
 *
 * A flow begins where its request enters, with the rows DNAT and UNDNAT, and SNAT where it is masqueraded. The port of
 * the masquerade is found where the request leaves, since only there is the leaving device known; that writes UNSNAT,
 * and makes DNAT whole. Under XDP the leaving device is known at once: such a flow begins with whole DNAT and UNSNAT
 * alone (`begin_short_flow`), and gets the other two if ever tc has a packet of it (`complete_flow`): so both carry out
 * the same translation, whoever began it.
 *
 * All rows of a flow are written before its first packet goes on, and every row can be evicted at any time: a request
 * whose own row has gone begins the flow anew, and what else is missing is noticed and written again within a second of
 * use (`is_looked_after`).
 */
#ifndef EBPFLB_FLOW_H
#define EBPFLB_FLOW_H

#include "port.h"

/*
 * The row by which replies find back to the frontend; `key` is what they are where they leave. Two flows of one client
 * port to two frontends may have the same backend; the second one then gets another client port, as conntrack would give
 * it, in `key`. Returns GO_ON, or DISCARD.
 */
static inline int add_reply_row(struct flow_key *key, struct flow *reply, const struct settings *node, u64 now)
{
	struct flow *other;

	set_mark(MARK_FROM, &key->source, key->source_port);
	if (!flows.insert(key, reply))
		return GO_ON;
	other = flows.lookup(key);
	if (!other || other->action != FLOW_UNDNAT || is_over(other, key->protocol, node, now) ||
	    (other->port == reply->port && other->other_port == reply->other_port &&
	     same_address(&other->address, &reply->address))) {
		if (!flows.update(key, reply))
			return GO_ON;
		count(PACKET_NO_ROOM);
		return DISCARD;
	}

	if (key->protocol == IPPROTO_SCTP) {
		count(PACKET_SCTP_PORT);
		return DISCARD;
	}
#pragma nounroll
	for (int i = 0; i < PORT_TRIES; i++) {
		key->destination_port = random_port(node);
		if (!flows.insert(key, reply)) {
			count(PACKET_COLLISION);
			return GO_ON;
		}
	}
	count(PACKET_NO_PORT);
	return DISCARD;
}

/* The flag of a connection's first packet. */
static inline u8 opening(const struct flow_key *request)
{
	return request->protocol == IPPROTO_TCP ? FLOW_OPENING : 0;
}

/*
 * All rows that the first request of a flow can know; `to` becomes the request's new tuple. Returns GO_ON, or DISCARD
 * where there is no room: a half-known flow would be answered from an address that the client never asked.
 *
 * `route` is null for a flow to no frontend (see `pass_by`), whose "backend" is where it goes anyway. `how` is
 * FLOW_MASQUERADE, FLOW_AROUND or 0.
 */
static inline int begin_flow(struct packet *packet, const struct route *route, const struct backend *backend, u32 id,
			     u8 how, const struct settings *node, u64 now, struct flow_key *to)
{
	struct flow row = {};
	struct flow_key key = {};
	u16 client_port;
	int verdict;

	row.service = route ? route->service : 0;
	row.backend = id;
	row.seen = now;
	row.created = now;
	row.flags = how | (route ? 0 : FLOW_DIRECT);

	row.action = FLOW_UNDNAT;
	row.address = packet->key.destination;
	row.port = packet->key.destination_port;
	row.other_port = packet->key.source_port;
	key.source = backend->address;
	key.source_port = backend->port;
	key.destination = packet->key.source;
	key.destination_port = packet->key.source_port;
	key.protocol = packet->key.protocol;
	key.hook = HOOK_EGRESS;
	verdict = add_reply_row(&key, &row, node, now);
	if (verdict != GO_ON)
		return verdict;
	client_port = key.destination_port;

	/* The row by which the request is masqueraded where it leaves; one of an older flow must not linger. */
	key.source = packet->key.source;
	key.source_port = client_port;
	key.destination = backend->address;
	key.destination_port = backend->port;
	if (how & FLOW_MASQUERADE) {
		row.action = FLOW_SNAT;
		row.flags = FLOW_MASQUERADE | FLOW_UNALLOCATED;
		row.address = packet->key.source;
		row.port = client_port;
		row.other_port = backend->port;
		row.beyond = packet->key.destination;
		row.beyond_port = packet->key.destination_port;
		row.client_port = packet->key.source_port;
		set_mark(MARK_TO, &key.destination, key.destination_port);
		if (flows.update(&key, &row)) {
			count(PACKET_NO_ROOM);
			return DISCARD;
		}
		row.flags = FLOW_MASQUERADE;
		__builtin_memset(&row.beyond, 0, sizeof(row.beyond));
		row.beyond_port = 0;
		row.client_port = 0;
	} else if (flows.lookup(&key)) {
		flows.delete(
			&key); /* looked up first, since a deletion takes the bucket's lock even where nothing is */
	}

	row.action = FLOW_DNAT;
	row.flags |= opening(&packet->key);
	row.address = backend->address;
	row.port = backend->port;
	row.other_port = client_port;
	set_mark(MARK_ENTERS, &packet->key.destination, 0);
	if (flows.update(&packet->key, &row)) {
		count(PACKET_NO_ROOM);
		return DISCARD;
	}
	translated(&packet->key, &row, to);
	return GO_ON;
}

/*
 * The rows of egress of a flow that XDP began, before tc lets a packet of it go on. `flow` is the row of ingress that
 * the packet has met. Returns GO_ON, or DISCARD where there is no room.
 */
static inline int complete_flow(const struct flow_key *key, struct flow *flow, const struct settings *node, u64 now)
{
	int is_request = flow->action == FLOW_DNAT;
	struct flow_key other_key = {};
	struct flow row = {}, *other;
	u16 client_port;
	int verdict;

	/* The flow's other row of ingress. */
	other_key.source = flow->address;
	other_key.source_port = is_request ? flow->port : flow->client_port;
	other_key.destination = flow->beyond;
	other_key.destination_port = flow->beyond_port;
	other_key.protocol = key->protocol;
	other_key.hook = HOOK_INGRESS;
	other = flows.lookup(&other_key);
	if (other && (other->beyond_port != key->destination_port ||
		      (is_request ? other->client_port : other->port) != key->source_port ||
		      !same_address(&other->beyond, &key->destination) || !same_address(&other->address, &key->source)))
		other = 0; /* another flow has that tuple by now */

	row.action = FLOW_UNDNAT;
	row.flags = FLOW_MASQUERADE;
	row.service = flow->service;
	row.backend = flow->backend;
	row.seen = now;
	row.created = flow->created;
	other_key.hook = HOOK_EGRESS;
	if (is_request) {
		row.address = key->destination;
		row.port = key->destination_port;
		row.other_port = key->source_port;
		other_key.destination = key->source;
	} else {
		row.address = flow->beyond;
		row.port = flow->beyond_port;
		row.other_port = flow->client_port;
		other_key.source = key->source;
		other_key.source_port = key->source_port;
		other_key.destination = flow->address;
	}
	other_key.destination_port = row.other_port;
	verdict = add_reply_row(&other_key, &row, node, now);
	if (verdict != GO_ON)
		return verdict;
	if (!is_request && !other) {
		/* A late reply of a flow that is over: its requests are another flow's now. */
		flow->port = other_key.destination_port;
		flow->flags &= ~FLOW_SHORT;
		return GO_ON;
	}

	/* The frontend stays with the row, as `allocate_port` would have found it. */
	client_port = other_key.destination_port;
	row.beyond = row.address;
	row.beyond_port = row.port;
	row.client_port = row.other_port;
	row.action = FLOW_SNAT;
	row.other_port = other_key.source_port;
	other_key.destination_port = other_key.source_port;
	other_key.source_port = client_port;
	if (is_request) {
		row.address = flow->beyond;
		row.port = flow->beyond_port;
		other_key.destination = flow->address;
		other_key.source = key->source;
	} else {
		row.address = key->destination;
		row.port = key->destination_port;
		other_key.destination = key->source;
		other_key.source = flow->address;
	}
	set_mark(MARK_TO, &other_key.destination, other_key.destination_port);
	if (flows.update(&other_key, &row)) {
		count(PACKET_NO_ROOM);
		return DISCARD;
	}

	/* The client's port inside this node first: who sees a row without FLOW_SHORT goes by it. */
	if (is_request)
		flow->other_port = client_port;
	else
		flow->port = client_port;
	flow->flags &= ~FLOW_SHORT;
	if (!other)
		return GO_ON;
	if (is_request)
		other->port = client_port;
	else
		other->other_port = client_port;
	other->flags &= ~FLOW_SHORT;
	return GO_ON;
}

/* A row of a flow that must be there: written if it has gone. 0 if it is another flow's, or there is no room. */
static inline int keep_row(struct flow_key *key, struct flow *row)
{
	struct flow *there = flows.lookup(key);

	if (!there)
		return !flows.insert(key, row);
	if (there->action != row->action || there->beyond_port != row->beyond_port ||
	    there->client_port != row->client_port || !same_address(&there->beyond, &row->beyond))
		return 0;
	if (row->action == FLOW_SNAT)
		return 1; /* its address may not have been found yet */
	if (!same_address(&there->address, &row->address))
		return 0;
	if (row->action == FLOW_UNSNAT)
		return 1;
	if (there->port != row->port || there->other_port != row->other_port)
		return 0;
	there->seen = row->seen; /* where XDP carries the flow, nothing else tells tc of its use */
	return 1;
}

/*
 * A flow's other rows, by the request's row `flow` that a packet has met: at most once a `refresh`, what was evicted is
 * written anew, or replies would never find back however often the client asks. 0 where the flow cannot go on, since one
 * of them is another's by now.
 */
static inline int is_looked_after(const struct packet *packet, struct flow *flow, const struct settings *node, u64 now)
{
	const struct flow_key *request = &packet->key;
	struct flow_key key = {};
	struct flow row = {};

	if (!is_idle(flow->seen, node->refresh, now))
		return 1;
	row.service = flow->service;
	row.backend = flow->backend;
	row.seen = now;
	row.created = flow->created;
	key.protocol = request->protocol;

	if (!(flow->flags & FLOW_SHORT)) {
		row.action = FLOW_UNDNAT;
		row.flags = flow->flags & (FLOW_CLOSING | FLOW_MASQUERADE | FLOW_DIRECT | FLOW_AROUND);
		row.address = request->destination;
		row.port = request->destination_port;
		row.other_port = request->source_port;
		key.source = flow->address;
		key.source_port = flow->port;
		key.destination = request->source;
		key.destination_port = flow->other_port;
		key.hook = HOOK_EGRESS;
		if (!keep_row(&key, &row))
			return 0;
	}
	if (!(flow->flags & FLOW_MASQUERADE))
		return 1;

	row.flags = flow->flags & (FLOW_CLOSING | FLOW_MASQUERADE);
	row.other_port = flow->port;
	row.beyond = request->destination;
	row.beyond_port = request->destination_port;
	row.client_port = request->source_port;
	if (!(flow->flags & FLOW_SHORT)) {
		row.action = FLOW_SNAT;
		if (!(flow->flags & FLOW_WHOLE))
			row.flags |= FLOW_UNALLOCATED;
		row.address = flow->beyond;
		row.port = flow->beyond_port;
		key.source = request->source;
		key.source_port = flow->other_port;
		key.destination = flow->address;
		key.destination_port = flow->port;
		if (!keep_row(&key, &row))
			return 0;
	}
	if (!(flow->flags & FLOW_WHOLE))
		return 1;

	row.action = FLOW_UNSNAT;
	row.flags = flow->flags & (FLOW_CLOSING | FLOW_MASQUERADE | FLOW_WHOLE | FLOW_SHORT);
	row.address = request->source;
	row.port = flow->other_port;
	key.source = flow->address;
	key.source_port = flow->port;
	key.destination = flow->beyond;
	key.destination_port = flow->beyond_port;
	key.hook = HOOK_INGRESS;
	if (node->retired)
		return flows.lookup(&key) != 0; /* where it is gone, it has given way: see give_way */
	return keep_row(&key, &row);
}

/*
 * A packet to no frontend is none of our business, with one exception: its replies may look like those of a flow that
 * the same client port has with a Service, whose backend it now asks directly. What an ended flow left behind is
 * removed; while that flow lives, this one gets another client port, as conntrack would give it.
 */
static inline int pass_by(struct packet *packet, const struct settings *node, u64 now, struct flow_key *to)
{
	struct flow_key key = {};
	struct backend there = {};
	struct flow *reply;

	if (packet->key.protocol == IPPROTO_TCP && (packet->tcp_flags & (TCP_SYN | TCP_ACK)) != TCP_SYN)
		return PASS;
	key.source = packet->key.destination;
	key.source_port = packet->key.destination_port;
	key.destination = packet->key.source;
	key.destination_port = packet->key.source_port;
	key.protocol = packet->key.protocol;
	key.hook = HOOK_EGRESS;
	reply = leaving_flow(&key);
	if (!reply || reply->action != FLOW_UNDNAT)
		return PASS;
	if (!is_over(reply, key.protocol, node, now)) {
		there.address = key.source;
		there.port = key.source_port;
		return begin_flow(packet, 0, &there, 0, 0, node, now, to);
	}
	flows.delete(&key);
	key.source = packet->key.source;
	key.source_port = packet->key.source_port;
	key.destination = packet->key.destination;
	key.destination_port = packet->key.destination_port;
	flows.delete(&key);
	return PASS;
}

#endif
