/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Which backend a new connection gets: shared by the socket, tc and XDP programs.
 *
 * With session affinity a client goes where it went before, for as long after its last new connection as the route
 * says (kube-proxy's `recent` match is refreshed by new connections only, too), if that backend still takes new ones
 * under this route: rows are shared by all frontends and scopes of a Service port, whose backends may differ.
 */
#ifndef EBPFLB_AFFINITY_H
#define EBPFLB_AFFINITY_H

#include "maglev.h"

/* The position of a client's backend among the route's active slots; -1 if it is not there. */
static inline int kept_position(const struct route *route, const struct affinity *kept)
{
	u32 slot = route->slots + kept->position, *content;
	struct member_key key = {};

	if (kept->position < route->count) {
		content = slots.lookup(&slot);
		if (content && *content == kept->backend)
			return (int)kept->position;
	}
	key.slots = route->slots;
	key.backend = kept->backend;
	content = members.lookup(&key);
	return content && *content < route->count ? (int)*content : -1;
}

/*
 * A backend for a new flow: the client's, the flow's place in the table, or any; its id goes to `id`. `hash` is the
 * flow's. `client` has all but its service.
 */
static inline struct backend *choose_backend(const struct route *route, struct affinity_key *client, u32 hash,
					     const struct settings *node, u64 now, u32 *id)
{
	struct affinity *kept = 0, fresh = {};
	struct backend *backend;
	int position = -1;

	if (route->count == 0)
		return 0;
	if (route->affinity) {
		client->service = route->service;
		kept = affinity.lookup(client);
		if (kept && !is_idle(kept->seen, (u64)route->affinity * node->second, now))
			position = kept_position(route, kept);
		if (position >= 0)
			count(CLIENT_KEPT);
	}
	if (position < 0 && route->table)
		position = table_position(route, hash);
	if (position < 0)
		position = (int)(((u64)bpf_get_prandom_u32() * route->count) >> 32);
	backend = backend_at(route, (u32)position, id);
	if (!backend || !route->affinity)
		return backend;

	fresh.backend = *id;
	fresh.position = (u32)position;
	fresh.seen = now;
	if (kept)
		*kept = fresh; /* in place: an update of an LRU costs as much as an insertion */
	else
		affinity.update(client, &fresh);
	return backend;
}

#endif
