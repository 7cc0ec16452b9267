/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Every constant that the control plane injects with -D; nothing else lives here.
 *
 * A constant is named once in Python (ebpflb/dataplane/bpf/constants.py) and arrives on the command line; a missing
 * one is a compile error, so that the two sides cannot drift.
 */
#ifndef EBPFLB_CONFIG_H
#define EBPFLB_CONFIG_H

/* Sizes of the maps, in entries. */
#ifndef MAX_FRONTENDS
#error "MAX_FRONTENDS is not defined"
#endif
#ifndef MAX_BACKENDS
#error "MAX_BACKENDS is not defined"
#endif
#ifndef MAX_SLOTS
#error "MAX_SLOTS is not defined"
#endif
#ifndef MAX_FLOWS
#error "MAX_FLOWS is not defined"
#endif
#ifndef MAX_SOCKETS
#error "MAX_SOCKETS is not defined"
#endif
#ifndef MAX_FRAGMENTS
#error "MAX_FRAGMENTS is not defined"
#endif
#ifndef MAX_SERVICES
#error "MAX_SERVICES is not defined"
#endif
#ifndef MAX_SOURCES
#error "MAX_SOURCES is not defined"
#endif
#ifndef MAX_RANGES
#error "MAX_RANGES is not defined"
#endif
#ifndef MAX_DEVICES
#error "MAX_DEVICES is not defined"
#endif
#ifndef MAX_OWNED
#error "MAX_OWNED is not defined"
#endif
#ifndef MAX_TABLES
#error "MAX_TABLES is not defined"
#endif
#ifndef MAX_CLIENTS
#error "MAX_CLIENTS is not defined"
#endif

/* Verdicts of a route: the values of ebpflb.routes.Verdict. */
#ifndef VERDICT_FORWARD
#error "VERDICT_FORWARD is not defined"
#endif
#ifndef VERDICT_REJECT
#error "VERDICT_REJECT is not defined"
#endif
#ifndef VERDICT_DROP
#error "VERDICT_DROP is not defined"
#endif

/* Masquerade of a route: the values of ebpflb.routes.Masquerade. */
#ifndef MASQUERADE_NEVER
#error "MASQUERADE_NEVER is not defined"
#endif
#ifndef MASQUERADE_NOT_POD
#error "MASQUERADE_NOT_POD is not defined"
#endif
#ifndef MASQUERADE_ALWAYS
#error "MASQUERADE_ALWAYS is not defined"
#endif

/* Scopes, as indexes into a frontend's row: the values of ebpflb.routes.Scope. */
#ifndef SCOPE_INTERNAL
#error "SCOPE_INTERNAL is not defined"
#endif
#ifndef SCOPE_EXTERNAL
#error "SCOPE_EXTERNAL is not defined"
#endif

/* What a source address is, as bits of a `sources` row. */
#ifndef SOURCE_POD
#error "SOURCE_POD is not defined"
#endif
#ifndef SOURCE_NODE
#error "SOURCE_NODE is not defined"
#endif

/* What a device is, as bits of a `devices` row. */
#ifndef DEVICE_POD
#error "DEVICE_POD is not defined"
#endif
#ifndef DEVICE_PEER
#error "DEVICE_PEER is not defined"
#endif
#ifndef DEVICE_XDP
#error "DEVICE_XDP is not defined"
#endif
#ifndef DEVICE_BACK
#error "DEVICE_BACK is not defined"
#endif
#ifndef DEVICE_REDIRECT
#error "DEVICE_REDIRECT is not defined"
#endif

/* What other network namespaces' sockets count as, as bits of `settings.pod_sockets`. */
#ifndef POD_SOCKETS_IPV4
#error "POD_SOCKETS_IPV4 is not defined"
#endif
#ifndef POD_SOCKETS_IPV6
#error "POD_SOCKETS_IPV6 is not defined"
#endif

/* States of a backend: the values of ebpflb.routes.BackendState, and one more for a row that is free. */
#ifndef BACKEND_ACTIVE
#error "BACKEND_ACTIVE is not defined"
#endif
#ifndef BACKEND_DRAINING
#error "BACKEND_DRAINING is not defined"
#endif
#ifndef BACKEND_FREE
#error "BACKEND_FREE is not defined"
#endif

/* Whether the kernel has bpf_set_retval for sock_addr programs (5.18). */
#ifndef HAVE_SET_RETVAL
#error "HAVE_SET_RETVAL is not defined"
#endif

/* Whether the kernel gives XDP packets of several buffers (5.18). */
#ifndef HAVE_XDP_FRAGS
#error "HAVE_XDP_FRAGS is not defined"
#endif

/* Whether flows between pods of this node go around the stack. */
#ifndef GO_AROUND
#error "GO_AROUND is not defined"
#endif

/* Whether what each Service carries is counted. */
#ifndef COUNT_TRAFFIC
#error "COUNT_TRAFFIC is not defined"
#endif

#endif
