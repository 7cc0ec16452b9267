/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The socket path: a Service's address is replaced where a socket names it, so that no packet ever carries it.
 *
 *   connect4/6, sendmsg4/6       frontend -> backend, remembered for the socket
 *   recvmsg4/6, getpeername4/6   backend -> frontend, so that programs see whom they asked
 *
 * Rules: a program here never breaks a call that it cannot translate; whatever is missing is counted and the call goes
 * on as it was. Only a verdict in a row refuses one. IPv4 destinations of IPv6 sockets (::ffff:a.b.c.d) need nothing
 * special, since that is how rows write IPv4. Calls of other protocols than TCP and UDP find no row.
 */
#include <uapi/linux/in.h>

#include "config.h"
#include "maps.h"
#include "addr.h"
#include "lookup.h"
#include "affinity.h"
#include "owned.h"

#define CONTINUE 1
#define REFUSE 0

#define ECONNREFUSED 111
#define ETIMEDOUT 110

/* The verdict that no packet would ever answer: the caller learns it at once, with the errno it would get in the end. */
#define SILENCE ETIMEDOUT

static inline int refuse(int error, int own)
{
#if HAVE_SET_RETVAL
	bpf_set_retval(-error);
	return REFUSE;
#else
	/* Without bpf_set_retval (before 5.18) the caller sees EPERM. A pod's packets meet the packet path, which gives the
	 * right answer; the node's own would leave for an address that nobody has. */
	return own ? REFUSE : CONTINUE;
#endif
}

/*
 * The scope of a socket: this network namespace is the node itself. Another one is a pod's; whether it counts as a
 * local pod is said by the settings, since the socket may have no source address yet to tell by.
 */
static inline u32 socket_scope(const struct settings *node, int own, const struct address *to)
{
	u32 family = is_ipv4(to) ? POD_SOCKETS_IPV4 : POD_SOCKETS_IPV6;

	return own || (node->pod_sockets & family) ? SCOPE_INTERNAL : SCOPE_EXTERNAL;
}

static inline void remember(struct socket_key *key, const struct address *address, u16 port, u32 service, u32 backend,
			    u64 now)
{
	struct socket_value value = {};

	value.address = *address;
	value.port = port;
	value.service = service;
	value.backend = backend;
	value.seen = now;
	sockets.update(key, &value);
}

/* Protocols that Services have and that these hooks see. */
static inline int has_frontends(u8 protocol)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP;
}

/*
 * Turn `to`:`port` into a backend's. An unconnected UDP socket (`sticky`) stays with its backend for as long as that
 * serves and the socket is not idle, as it would by a conntrack entry.
 */
static inline int translate(struct bpf_sock_addr *ctx, struct address *to, u16 *port, int sticky)
{
	struct settings *node;
	struct frontend *frontend;
	struct route *route;
	struct backend *backend;
	struct socket_key key = {};
	struct socket_value *known;
	struct affinity_key client = {};
	struct address chosen;
	u8 protocol = ctx->protocol;
	u16 chosen_port;
	u32 id = 0, hash = 0;
	u64 now, netns;
	int own;

	frontend = find_frontend(to, *port, protocol);
	if (!frontend && !(is_owned(to) && has_frontends(protocol)))
		return CONTINUE;
	node = node_settings();
	if (!node)
		return CONTINUE;
	netns = bpf_get_netns_cookie(ctx);
	own = netns == node->netns;
	if (!own && is_loopback(to))
		return CONTINUE; /* the pod's own loopback, not the node's */
	if (!frontend) {
		count(SOCKET_UNDEFINED);
		return refuse(ECONNREFUSED, own);
	}

	if (socket_scope(node, own, to) == SCOPE_INTERNAL)
		route = &frontend->scope[SCOPE_INTERNAL];
	else
		route = &frontend->scope[SCOPE_EXTERNAL];
	if (route->ranges) {
		if (!own)
			return CONTINUE; /* the packet path knows the source */
		/* The node reaches such an address from that address itself, so to say: rows hold it if the node may. */
		if (!in_ranges(route->ranges, to)) {
			count(SOCKET_DROPPED);
			return refuse(SILENCE, own);
		}
	}
	if (route->verdict == VERDICT_REJECT) {
		count(SOCKET_REJECTED);
		return refuse(ECONNREFUSED, own);
	}
	if (route->verdict == VERDICT_DROP) {
		count(SOCKET_DROPPED);
		return refuse(SILENCE, own);
	}

	key.cookie = bpf_get_socket_cookie(ctx);
	key.address = *to;
	key.port = *port;
	key.protocol = protocol;
	key.direction = SOCKET_FORWARD;
	now = bpf_jiffies64();
	if (sticky) {
		known = sockets.lookup(&key);
		if (known && !is_idle(known->seen, node->flow_idle, now) && known->service == route->service &&
		    backend_lives(known->backend, known->service, &known->address, known->port)) {
			chosen = known->address;
			chosen_port = known->port;
			if (!is_idle(known->seen, node->refresh, now))
				goto rewrite;
			known->seen = now;
			id = known->backend;
			goto reverse;
		}
	}

	client.client.word[0] = (u32)netns;
	client.client.word[1] = (u32)(netns >> 32);
	client.client.word[2] = is_ipv4(to); /* the families' backends differ */
	client.kind = CLIENT_NETNS;
	if (route->table)
		hash = socket_hash(route->affinity ? netns : key.cookie, to, *port, route->affinity != 0);
	backend = choose_backend(route, &client, hash, node, now, &id);
	if (!backend) {
		count(SOCKET_NO_BACKEND);
		return CONTINUE;
	}
	chosen = backend->address;
	chosen_port = backend->port;
	count(SOCKET_FORWARDED);
	count_traffic(route->service, 1, 0, 0);
	if (sticky)
		remember(&key, &chosen, chosen_port, route->service, id, now);
reverse:
	key.address = chosen;
	key.port = chosen_port;
	key.direction = SOCKET_REVERSE;
	remember(&key, to, *port, route->service, id, now);
rewrite:
	*to = chosen;
	*port = chosen_port;
	return CONTINUE;
}

/* Show the frontend to a program that would see the backend it was given. */
static inline void restore(struct bpf_sock_addr *ctx, struct address *from, u16 *port)
{
	struct socket_key key = {};
	struct socket_value *known;

	key.cookie = bpf_get_socket_cookie(ctx);
	key.address = *from;
	key.port = *port;
	key.protocol = ctx->protocol;
	key.direction = SOCKET_REVERSE;
	known = sockets.lookup(&key);
	if (!known)
		return;
	*from = known->address;
	*port = known->port;
}

static inline int forward4(struct bpf_sock_addr *ctx, int sticky)
{
	struct address to;
	u16 port = ctx->user_port;
	int verdict;

	set_ipv4(&to, ctx->user_ip4);
	verdict = translate(ctx, &to, &port, sticky);
	ctx->user_ip4 = to.word[3];
	ctx->user_port = port;
	return verdict;
}

static inline int forward6(struct bpf_sock_addr *ctx, int sticky)
{
	struct address to;
	u16 port = ctx->user_port;
	int verdict;

	to.word[0] = ctx->user_ip6[0];
	to.word[1] = ctx->user_ip6[1];
	to.word[2] = ctx->user_ip6[2];
	to.word[3] = ctx->user_ip6[3];
	verdict = translate(ctx, &to, &port, sticky);
	ctx->user_ip6[0] = to.word[0];
	ctx->user_ip6[1] = to.word[1];
	ctx->user_ip6[2] = to.word[2];
	ctx->user_ip6[3] = to.word[3];
	ctx->user_port = port;
	return verdict;
}

static inline int reverse4(struct bpf_sock_addr *ctx)
{
	struct address from;
	u16 port = ctx->user_port;

	set_ipv4(&from, ctx->user_ip4);
	restore(ctx, &from, &port);
	ctx->user_ip4 = from.word[3];
	ctx->user_port = port;
	return CONTINUE;
}

static inline int reverse6(struct bpf_sock_addr *ctx)
{
	struct address from;
	u16 port = ctx->user_port;

	from.word[0] = ctx->user_ip6[0];
	from.word[1] = ctx->user_ip6[1];
	from.word[2] = ctx->user_ip6[2];
	from.word[3] = ctx->user_ip6[3];
	restore(ctx, &from, &port);
	ctx->user_ip6[0] = from.word[0];
	ctx->user_ip6[1] = from.word[1];
	ctx->user_ip6[2] = from.word[2];
	ctx->user_ip6[3] = from.word[3];
	ctx->user_port = port;
	return CONTINUE;
}

int connect4(struct bpf_sock_addr *ctx)
{
	return forward4(ctx, 0);
}

int connect6(struct bpf_sock_addr *ctx)
{
	return forward6(ctx, 0);
}

int sendmsg4(struct bpf_sock_addr *ctx)
{
	return forward4(ctx, 1);
}

int sendmsg6(struct bpf_sock_addr *ctx)
{
	return forward6(ctx, 1);
}

int recvmsg4(struct bpf_sock_addr *ctx)
{
	return reverse4(ctx);
}

int recvmsg6(struct bpf_sock_addr *ctx)
{
	return reverse6(ctx);
}

int getpeername4(struct bpf_sock_addr *ctx)
{
	return reverse4(ctx);
}

int getpeername6(struct bpf_sock_addr *ctx)
{
	return reverse6(ctx);
}
