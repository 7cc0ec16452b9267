/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Rewriting a packet: from the tuple that it has to the one that it gets, checksums included.
 *
 * Everything goes through the kernel's helpers, although direct writes are cheaper: only the helpers know whether the
 * transport checksum in the packet is whole, partial (the sender left it to the device: any packet of a local socket)
 * or summed by hardware, and only they unshare a packet that TCP still holds for retransmission. Returns GO_ON, or
 * DISCARD when the packet could not be written (out of memory): half a translation must not leave.
 */
#ifndef EBPFLB_NAT_H
#define EBPFLB_NAT_H

#include "parse.h"

/* Where the transport checksum lies behind its header's start, or -1 where the protocol's does not cover addresses. */
static inline int checksum_offset(u8 protocol)
{
	if (protocol == IPPROTO_TCP)
		return 16;
	if (protocol == IPPROTO_UDP)
		return 6;
	return -1;
}

struct ipv4_tail {
	u16 checksum;
	u32 source;
	u32 destination;
} __attribute__((packed));

/* Replace both addresses of an IP header at `offset`; `recompute` says how hardware's sum is kept, see below. */
static inline int write_addresses(struct __sk_buff *skb, u32 offset, int version, u16 checksum, u64 change,
				  const struct address *source, const struct address *destination, u64 recompute)
{
	if (version == 4) {
		struct ipv4_tail tail = {};

		/* The header sums to a constant, so that hardware's sum of the packet stays true. */
		tail.checksum = changed_checksum(checksum, change);
		tail.source = source->word[3];
		tail.destination = destination->word[3];
		return bpf_skb_store_bytes(skb, offset + 10, &tail, sizeof(tail), 0);
	}
	if (bpf_skb_store_bytes(skb, offset + 8, (void *)source, 16, recompute))
		return -1;
	return bpf_skb_store_bytes(skb, offset + 24, (void *)destination, 16, recompute);
}

/* Everything that changes in an ordinary IPv4 packet lies together: one write instead of two. */
struct ipv4_rest {
	struct ipv4_tail ip;
	struct ports ports;
} __attribute__((packed));

/* The transport checksum after a `change` of the addresses, and of the ports. */
static inline int mend_checksum(struct __sk_buff *skb, const struct packet *packet, const struct flow_key *to,
				u64 change)
{
	const struct flow_key *from = &packet->key;
	int checksum = checksum_offset(from->protocol);
	u64 flags = from->protocol == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
	u64 port_change;

	if (checksum < 0)
		return GO_ON;
	if (bpf_l4_csum_replace(skb, packet->l4 + checksum, 0, fold32(change), flags | BPF_F_PSEUDO_HDR))
		return DISCARD;
	if (from->source_port == to->source_port && from->destination_port == to->destination_port)
		return GO_ON;
	port_change = word_change(from->source_port, to->source_port) +
		      word_change(from->destination_port, to->destination_port);
	return bpf_l4_csum_replace(skb, packet->l4 + checksum, 0, fold32(port_change), flags) ? DISCARD : GO_ON;
}

/* Without a checksum to balance the ports, hardware's sum of the packet must follow them. */
static inline int write_ports(struct __sk_buff *skb, const struct packet *packet, const struct flow_key *to)
{
	struct ports ports = {};

	ports.source = to->source_port;
	ports.destination = to->destination_port;
	return bpf_skb_store_bytes(skb, packet->l4, &ports, sizeof(ports), packet->unsummed ? BPF_F_RECOMPUTE_CSUM : 0);
}

/*
 * An ICMP error: the inner packet went the other way, so its source is our destination. The outer destination follows
 * where it is the flow's own. The outer source, which may be a router's, becomes the flow's wherever sources are
 * replaced, as conntrack does: a router's address could come from a side where the peer's rp_filter forbids it.
 */
static inline int rewrite_error(struct __sk_buff *skb, const struct packet *packet, const struct flow_key *to)
{
	const struct flow_key *from = &packet->key;
	struct address source = packet->outer_source;
	struct address destination = packet->outer_destination;
	u64 inner_change =
		address_change(&from->source, &to->source) + address_change(&from->destination, &to->destination);
	u64 port_change = word_change(from->source_port, to->source_port) +
			  word_change(from->destination_port, to->destination_port);
	u64 outer_change = 0;
	u16 inner_checksum = 0;
	struct ports ports = {};
	u32 checksum = packet->l4 + 2;

	if (from->hook == HOOK_EGRESS) {
		source = to->source;
		outer_change += address_change(&packet->outer_source, &to->source);
	}
	if (same_address(&destination, &from->destination)) {
		destination = to->destination;
		outer_change += address_change(&from->destination, &to->destination);
	}
	if (packet->version == 4) {
		if (bpf_skb_load_bytes(skb, packet->inner_l3 + 10, &inner_checksum, 2))
			return DISCARD;
	} else {
		/* ICMPv6 covers the outer addresses by its pseudo-header, and the inner ones as payload. */
		if (bpf_l4_csum_replace(skb, checksum, 0, fold32(outer_change), BPF_F_PSEUDO_HDR))
			return DISCARD;
		port_change += inner_change;
	}
	if (bpf_l4_csum_replace(skb, checksum, 0, fold32(port_change), 0))
		return DISCARD;
	ports.source = to->destination_port;
	ports.destination = to->source_port;
	if (bpf_skb_store_bytes(skb, packet->inner_l4, &ports, sizeof(ports), 0))
		return DISCARD;
	if (write_addresses(skb, packet->inner_l3, packet->version, inner_checksum, inner_change, &to->destination,
			    &to->source, 0))
		return DISCARD;
	if (write_addresses(skb, packet->l3, packet->version, packet->ip_checksum, outer_change, &source, &destination,
			    BPF_F_RECOMPUTE_CSUM))
		return DISCARD;
	count(ICMP_TRANSLATED);
	return GO_ON;
}

static inline int rewrite(struct __sk_buff *skb, const struct packet *packet, const struct flow_key *to)
{
	const struct flow_key *from = &packet->key;
	u64 change;

	if (packet->error)
		return rewrite_error(skb, packet, to);
	change = address_change(&from->source, &to->source) + address_change(&from->destination, &to->destination);
	if (packet->fragment != LATER_FRAGMENT) {
		if (mend_checksum(skb, packet, to, change) == DISCARD)
			return DISCARD;
		if (packet->version == 4 && packet->l4 == packet->l3 + 20 && !packet->unsummed) {
			struct ipv4_rest rest = {};

			rest.ip.checksum = changed_checksum(packet->ip_checksum, change);
			rest.ip.source = to->source.word[3];
			rest.ip.destination = to->destination.word[3];
			rest.ports.source = to->source_port;
			rest.ports.destination = to->destination_port;
			return bpf_skb_store_bytes(skb, packet->l3 + 10, &rest, sizeof(rest), 0) ? DISCARD : GO_ON;
		}
		if ((from->source_port != to->source_port || from->destination_port != to->destination_port) &&
		    write_ports(skb, packet, to))
			return DISCARD;
	}
	/*
	 * IPv6 has no header checksum to balance the change, so hardware's sum must follow it (RECOMPUTE), which the
	 * pseudo-header update above has taken for done the other way round.
	 */
	if (write_addresses(skb, packet->l3, packet->version, packet->ip_checksum, change, &to->source,
			    &to->destination, BPF_F_RECOMPUTE_CSUM))
		return DISCARD;
	return GO_ON;
}

#endif
