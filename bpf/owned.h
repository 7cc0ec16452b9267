/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Cluster IPs as a whole: shared by the socket, tc and XDP programs.
 *
 * A port that a cluster IP does not have is refused, as kube-proxy's nftables mode does: left alone, its packets would
 * wander off to the default route and come to nothing.
 */
#ifndef EBPFLB_OWNED_H
#define EBPFLB_OWNED_H

#include "lookup.h"

/* Whether an address, of which the port that was asked has no row, is a cluster IP. */
static inline int is_owned(const struct address *address)
{
	struct address key = *address;

	return is_known(address) && owned.lookup(&key);
}

#endif
