/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * From a frontend to a backend, by rows alone: shared by the socket, tc and XDP programs.
 *
 * Nothing here knows why a row says what it says. A row that is missing where another one names it is counted by the
 * caller, which then leaves the packet alone.
 */
#ifndef EBPFLB_LOOKUP_H
#define EBPFLB_LOOKUP_H

#include "addr.h"

static inline void count(u32 counter)
{
	u64 *cell = counters.lookup(&counter);

	if (cell)
		*cell += 1;
}

/* Add to what a Service port has carried, where that is counted at all. */
static inline void count_traffic(u32 service, u64 connections, u64 packets, u64 bytes)
{
#if COUNT_TRAFFIC
	struct traffic none = {};
	struct traffic *row = traffic.lookup_or_try_init(&service, &none);

	if (!row)
		return;
	row->connections += connections;
	row->packets += packets;
	row->bytes += bytes;
#endif
}

/* What holds for this node; none before the control plane has written it, or if another version did. */
static inline struct settings *node_settings(void)
{
	u32 only = 0;
	struct settings *row = settings.lookup(&only);

	return row && row->layout == LAYOUT ? row : 0;
}

/*
 * Whether something was used last more than `idle` jiffies ago. Not if that was later than `now`: another CPU's clock may
 * have ticked since this one read it.
 */
static inline int is_idle(u64 seen, u64 idle, u64 now)
{
	return (s64)(now - seen) > (s64)idle;
}

/* Whether `frontends` or `owned` may have rows of an address; most packets are to others, and this is all they cost. */
static inline int is_known(const struct address *address)
{
	u32 number = (u32)(spread(address, 0) >> KNOWN_SHIFT);
	u32 cell = number / 64;
	struct known *known_row = known.lookup(&cell);

	return !known_row || (known_row->bits >> (number % 64) & 1);
}

static inline struct frontend *find_frontend(const struct address *address, u16 port, u8 protocol)
{
	struct frontend_key key = {};

	if (!is_known(address))
		return 0;

	key.address = *address;
	key.port = port;
	key.protocol = protocol;
	return frontends.lookup(&key);
}

/* Bits SOURCE_… of an address. */
static inline u32 source_flags(const struct address *address)
{
	struct source_key key = {};
	struct source *source;

	key.prefix = 128;
	key.address = *address;
	source = sources.lookup(&key);
	return source ? source->flags : 0;
}

static inline int in_ranges(u32 id, const struct address *address)
{
	struct range_key key = {};

	key.prefix = 32 + 128;
	key.ranges = id;
	key.address = *address;
	return ranges.lookup(&key) != 0;
}

/* The backend at a position among the route's slots; its id goes to `id`. */
static inline struct backend *backend_at(const struct route *route, u32 position, u32 *id)
{
	u32 slot = route->slots + position;
	u32 *content = slots.lookup(&slot);
	struct backend *backend;

	if (!content)
		return 0;
	*id = *content;
	backend = backends.lookup(id);
	return backend && backend->state != BACKEND_FREE ? backend : 0;
}

/* Whether a backend that was chosen earlier is still the same one and still serves. */
static inline int backend_lives(u32 id, u32 service, const struct address *address, u16 port)
{
	struct backend *backend = backends.lookup(&id);

	return backend && backend->state != BACKEND_FREE && backend->service == service && backend->port == port &&
	       same_address(&backend->address, address);
}

#endif
