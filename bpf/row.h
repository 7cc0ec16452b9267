/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * One row of `flows`: where there may be one, what a packet becomes by it, and when it is over.
 *
 * Most packets are nobody's: a mark tells so before any row is looked for. What a row says of time is true to
 * `settings.refresh` only, since a write for every packet would bounce the row between CPUs.
 */
#ifndef EBPFLB_ROW_H
#define EBPFLB_ROW_H

#include "lookup.h"
#include "parse.h"

/* The number of a mark: any even spread will do, since a clash costs a lookup only. */
static inline u32 mark_number(u32 kind, const struct address *address, u16 port)
{
	return (u32)(spread(address, kind << 16 | port) >> MARK_SHIFT);
}

static inline void set_mark(u32 kind, const struct address *address, u16 port)
{
	u32 number = mark_number(kind, address, port);
	u32 cell = number / 8;
	struct mark *mark = marks.lookup(&cell);

	if (mark && !mark->set[number % 8])
		mark->set[number % 8] = 1;
}

static inline int is_marked(u32 kind, const struct address *address, u16 port)
{
	u32 number = mark_number(kind, address, port);
	u32 cell = number / 8;
	struct mark *mark = marks.lookup(&cell);

	return !mark || mark->set[number % 8];
}

/* The row of a packet that enters. */
static inline struct flow *entering_flow(struct flow_key *key)
{
	return is_marked(MARK_ENTERS, &key->destination, 0) ? flows.lookup(key) : 0;
}

/* The row of a packet that leaves. */
static inline struct flow *leaving_flow(struct flow_key *key)
{
	if (!is_marked(MARK_FROM, &key->source, key->source_port) &&
	    !is_marked(MARK_TO, &key->destination, key->destination_port))
		return 0;
	return flows.lookup(key);
}

/* What the packet's tuple becomes by a row. */
static inline void translated(const struct flow_key *key, const struct flow *flow, struct flow_key *to)
{
	*to = *key;
	if (flow->action == FLOW_DNAT || flow->action == FLOW_UNSNAT) {
		to->destination = flow->address;
		to->destination_port = flow->port;
		to->source_port = flow->other_port;
	} else {
		to->source = flow->address;
		to->source_port = flow->port;
		to->destination_port = flow->other_port;
	}
}

/* Whether a reply's row is only what an ended flow left behind. */
static inline int is_over(const struct flow *reply, u8 protocol, const struct settings *node, u64 now)
{
	if (protocol == IPPROTO_TCP)
		return reply->flags & FLOW_CLOSING;
	return is_idle(reply->seen, node->flow_idle, now);
}

/* What the packet becomes by a whole row, from the one end of its way through this node to the other. */
static inline void wholly_translated(const struct flow_key *key, const struct flow *flow, struct flow_key *to)
{
	*to = *key;
	to->source = flow->beyond;
	to->source_port = flow->beyond_port;
	to->destination = flow->address;
	to->destination_port = flow->action == FLOW_DNAT ? flow->port : flow->client_port;
}

/* The row that a flow's replies meet where they leave. */
static inline struct flow *leaving_reply_row(const struct flow_key *request, const struct flow *flow)
{
	struct flow_key key = {};

	key.source = flow->address;
	key.source_port = flow->port;
	key.destination = request->source;
	key.destination_port = flow->other_port;
	key.protocol = request->protocol;
	key.hook = HOOK_EGRESS;
	return flows.lookup(&key);
}

/* The row that they meet first, as far as it is known: where they enter, else where they leave. */
static inline struct flow *reply_row(const struct flow_key *request, const struct flow *flow)
{
	struct flow_key key = {};

	if (!(flow->flags & FLOW_WHOLE))
		return leaving_reply_row(request, flow);
	key.source = flow->address;
	key.source_port = flow->port;
	key.destination = flow->beyond;
	key.destination_port = flow->beyond_port;
	key.protocol = request->protocol;
	key.hook = HOOK_INGRESS;
	return flows.lookup(&key);
}

/* Whether nothing has come back for long either: a server may stream to a client that has been silent since. */
static inline int replies_are_idle(const struct packet *packet, const struct flow *flow, const struct settings *node,
				   u64 now)
{
	struct flow *reply = reply_row(&packet->key, flow);

	return !reply || is_idle(reply->seen, node->flow_idle, now);
}

/*
 * Whether a request's row may still be used. A connection that has been closed, or whose backend has gone, is over
 * with the next SYN; a datagram flow is over when its backend has gone or nothing has passed for long.
 */
static inline int request_is_current(const struct packet *packet, const struct flow *flow, const struct settings *node,
				     u64 now)
{
	if (packet->key.protocol != IPPROTO_TCP) {
		if (is_idle(flow->seen, node->flow_idle, now) && replies_are_idle(packet, flow, node, now))
			return 0;
	} else {
		if ((packet->tcp_flags & (TCP_SYN | TCP_ACK)) != TCP_SYN)
			return 1;
		if (flow->flags & FLOW_CLOSING)
			return 0;
	}
	if (flow->flags & FLOW_DIRECT)
		return 1;
	return backend_lives(flow->backend, flow->service, &flow->address, flow->port);
}

static inline void close_row(struct flow *flow)
{
	if (flow)
		flow->flags |= FLOW_CLOSING;
}

/* The row that a masqueraded flow's replies meet where they leave, by the one where they enter; 0 if it is another's. */
static inline struct flow *leaving_row_of_reply(const struct flow_key *reply, const struct flow *flow)
{
	struct flow_key key = {};
	struct flow *row;

	key.source = reply->source;
	key.source_port = reply->source_port;
	key.destination = flow->address;
	key.destination_port = flow->port;
	key.protocol = reply->protocol;
	key.hook = HOOK_EGRESS;
	row = flows.lookup(&key);
	return row && row->port == flow->beyond_port && same_address(&row->address, &flow->beyond) ? row : 0;
}

/* A FIN or RST closes the connection, whichever side says so: the request's row and all of the replies' know it. */
static inline void note_closing(const struct packet *packet, struct flow *flow)
{
	struct flow_key request = {};
	struct flow *other;

	if (!(packet->tcp_flags & (TCP_FIN | TCP_RST)) || (flow->flags & FLOW_CLOSING))
		return;
	close_row(flow);
	if (flow->action == FLOW_DNAT) {
		close_row(reply_row(&packet->key, flow));
		if ((flow->flags & (FLOW_WHOLE | FLOW_SHORT)) == FLOW_WHOLE)
			close_row(leaving_reply_row(&packet->key, flow));
		return;
	}
	request.protocol = packet->key.protocol;
	request.hook = HOOK_INGRESS;
	if (flow->action == FLOW_UNDNAT) {
		request.source = packet->key.destination;
		request.source_port = flow->other_port;
		request.destination = flow->address;
		request.destination_port = flow->port;
	} else if (flow->action == FLOW_UNSNAT && (flow->flags & FLOW_WHOLE)) {
		if (!(flow->flags & FLOW_SHORT))
			close_row(leaving_row_of_reply(&packet->key, flow));
		request.source = flow->address;
		request.source_port = flow->client_port;
		request.destination = flow->beyond;
		request.destination_port = flow->beyond_port;
	} else {
		return;
	}
	other = flows.lookup(&request);
	if (other && other->port == packet->key.source_port && same_address(&other->address, &packet->key.source))
		close_row(other); /* and not a new flow of the client's to another backend */
}

/* What a packet tells about its flow. An ICMP error is not use. */
static inline void use_flow(const struct packet *packet, struct flow *flow, const struct settings *node, u64 now)
{
	struct flow *leaving;

	if (packet->error)
		return;
	note_closing(packet, flow);
	if ((flow->flags & FLOW_OPENING) && !(packet->tcp_flags & TCP_SYN))
		flow->flags &= ~FLOW_OPENING;
	if (!is_idle(flow->seen, node->refresh, now))
		return;
	flow->seen = now;
	if (flow->action != FLOW_UNSNAT || (flow->flags & FLOW_SHORT))
		return;
	leaving = leaving_row_of_reply(&packet->key, flow);
	if (leaving)
		leaving->seen = now; /* XDP's replies do not meet it */
}

#endif
