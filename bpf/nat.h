/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Rewriting a packet: from the tuple that it has to the one that it gets, checksums included.
 *
 * In tc everything goes through the kernel's helpers, although direct writes are cheaper: only the helpers know whether
 * the transport checksum in the packet is whole, partial (the sender left it to the device: any packet of a local
 * socket) or summed by hardware, and only they unshare a packet that TCP still holds for retransmission. A partial
 * checksum can be told by what it must be, so most packets need one helper: what changes is written at once. Under XDP a
 * frame is bytes, and its checksum whole. Returns GO_ON, or DISCARD when the packet could not be written (out of
 * memory): half a translation must not leave.
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

/* What a change of tuple changes the sums by: that of the addresses, and that of the ports. */
static inline u64 addresses_change(const struct flow_key *from, const struct flow_key *to)
{
	return address_change(&from->source, &to->source) + address_change(&from->destination, &to->destination);
}

static inline u64 ports_change(const struct flow_key *from, const struct flow_key *to)
{
	return word_change(from->source_port, to->source_port) +
	       word_change(from->destination_port, to->destination_port);
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

	if (checksum < 0)
		return GO_ON;
	if (bpf_l4_csum_replace(skb, packet->l4 + checksum, 0, fold32(change), flags | BPF_F_PSEUDO_HDR))
		return DISCARD;
	if (from->source_port == to->source_port && from->destination_port == to->destination_port)
		return GO_ON;
	return bpf_l4_csum_replace(skb, packet->l4 + checksum, 0, fold32(ports_change(from, to)), flags) ? DISCARD
													 : GO_ON;
}

/* Without a checksum to balance the ports, hardware's sum of the packet must follow them. */
static inline int write_ports(struct __sk_buff *skb, const struct packet *packet, const struct flow_key *to)
{
	struct ports ports = {};

	ports.source = to->source_port;
	ports.destination = to->destination_port;
	return bpf_skb_store_bytes(skb, packet->l4, &ports, sizeof(ports), packet->unsummed ? BPF_F_RECOMPUTE_CSUM : 0);
}

/* The addresses of the IP header, as they are now. */
static inline int read_addresses(struct __sk_buff *skb, const struct packet *packet, struct address *source,
				 struct address *destination)
{
	u32 words[2] = {};

	if (packet->version == 6)
		return bpf_skb_load_bytes(skb, packet->l3 + 8, source, 16) ||
		       bpf_skb_load_bytes(skb, packet->l3 + 24, destination, 16);
	if (bpf_skb_load_bytes(skb, packet->l3 + 12, words, sizeof(words)))
		return -1;
	set_ipv4(source, words[0]);
	set_ipv4(destination, words[1]);
	return 0;
}

/*
 * An ICMP error: the inner packet went the other way, so its source is our destination. The outer destination follows
 * where it is the flow's own. The outer source, which may be a router's, becomes the flow's wherever sources are
 * replaced, as conntrack does: a router's address could come from a side where the peer's rp_filter forbids it.
 */
static inline int rewrite_error(struct __sk_buff *skb, const struct packet *packet, const struct flow_key *to)
{
	const struct flow_key *from = &packet->key;
	struct address source, destination;
	u64 inner_change = addresses_change(from, to);
	u64 port_change = ports_change(from, to);
	u64 outer_change = 0;
	u16 inner_checksum = 0;
	struct ports ports = {};
	u32 checksum = packet->l4 + 2;

	if (read_addresses(skb, packet, &source, &destination))
		return DISCARD;
	if (from->hook == HOOK_EGRESS) {
		outer_change += address_change(&source, &to->source);
		source = to->source;
	}
	if (same_address(&destination, &from->destination)) {
		outer_change += address_change(&from->destination, &to->destination);
		destination = to->destination;
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

static inline u16 mended(u16 checksum, u64 change, u8 protocol)
{
	u16 sum;

	if (protocol == IPPROTO_UDP && checksum == 0)
		return 0; /* none was made */
	sum = changed_checksum(checksum, change);
	return protocol == IPPROTO_UDP && sum == 0 ? 0xffff : sum;
}

/* A sum of 16-bit words, unfolded. */
static inline u64 address_sum(const struct address *address)
{
	return (u64)address->word[0] + address->word[1] + address->word[2] + address->word[3];
}

/*
 * Whether the checksum in the packet could be partial. Then it is the sum of the pseudo-header, of which `addresses` is
 * a part: every sender that leaves the rest to the device writes that. One whole checksum of 65536 looks so too, and is
 * treated alike.
 */
static inline int may_be_partial(struct __sk_buff *skb, const struct packet *packet, u32 addresses, u16 checksum)
{
	u32 others = fold32((u64)addresses + ((u32)packet->key.protocol << 8));
	u16 length = swap16(fold16((u64)checksum + (u32)~others));
	u32 headers = packet->l4 - packet->l3;

	return length == 0 || length == 0xffff || length == (u16)(skb->len - packet->l4) ||
	       length == (u16)(packet->length - headers) || skb->gso_size;
}

/*
 * What changes in a packet with plain headers lies together, up to the transport checksum. `before` is none of it: words
 * must lie on the stack where words can.
 */
struct tcp_rest {
	u32 sequence;
	u32 acknowledgement;
	u32 flags;
	u16 checksum;
	u16 behind;
};

struct udp_rest {
	u16 length;
	u16 checksum;
};

struct plain4 {
	u16 before;
	u16 checksum;
	u32 source;
	u32 destination;
	struct ports ports;
	union {
		struct tcp_rest tcp;
		struct udp_rest udp;
	};
};

struct plain6 {
	struct address source;
	struct address destination;
	struct ports ports;
	union {
		struct tcp_rest tcp;
		struct udp_rest udp;
	};
};

#define TCP_REST 14
#define UDP_REST 4
#define CHANGED4 (__builtin_offsetof(struct plain4, tcp) - __builtin_offsetof(struct plain4, checksum))
#define CHANGED6 (__builtin_offsetof(struct plain6, tcp))

/* One write instead of three to five, where the checksum is whole; PASS where that is not certain. */
static inline int rewrite_at_once(struct __sk_buff *skb, const struct packet *packet, const struct flow_key *to)
{
	const struct flow_key *from = &packet->key;
	int is_tcp = from->protocol == IPPROTO_TCP;
	void *end = (void *)(long)skb->data_end;
	u32 l3 = packet->l3 & OFFSETS, l4 = packet->l4 & OFFSETS;
	void *there = (void *)(long)skb->data + l4 + sizeof(struct ports);
	u32 old = fold32(address_sum(&from->source) + address_sum(&from->destination));
	u64 change = (u64)(u32)~old + address_sum(&to->source) + address_sum(&to->destination);
	struct tcp_rest tcp = {};
	struct udp_rest udp = {};
	long failed;

	if (is_tcp) {
		struct tcp_rest *rest = there;

		if (there + TCP_REST > end || may_be_partial(skb, packet, old, rest->checksum))
			return PASS;
		tcp.sequence = rest->sequence;
		tcp.acknowledgement = rest->acknowledgement;
		tcp.flags = rest->flags;
		tcp.checksum = changed_checksum(rest->checksum, change + ports_change(from, to));
	} else {
		struct udp_rest *rest = there;

		if (there + UDP_REST > end || may_be_partial(skb, packet, old, rest->checksum))
			return PASS;
		udp.length = rest->length;
		udp.checksum = mended(rest->checksum, change + ports_change(from, to), IPPROTO_UDP);
	}
	if (packet->version == 4) {
		struct plain4 fresh = {};

		fresh.checksum = changed_checksum(packet->ip_checksum, change);
		fresh.source = to->source.word[3];
		fresh.destination = to->destination.word[3];
		fresh.ports.source = to->source_port;
		fresh.ports.destination = to->destination_port;
		if (is_tcp) {
			fresh.tcp = tcp;
			failed = bpf_skb_store_bytes(skb, l3 + 10, &fresh.checksum, CHANGED4 + TCP_REST,
						     BPF_F_RECOMPUTE_CSUM);
		} else {
			fresh.udp = udp;
			failed = bpf_skb_store_bytes(skb, l3 + 10, &fresh.checksum, CHANGED4 + UDP_REST,
						     BPF_F_RECOMPUTE_CSUM);
		}
	} else {
		struct plain6 fresh = {};

		fresh.source = to->source;
		fresh.destination = to->destination;
		fresh.ports.source = to->source_port;
		fresh.ports.destination = to->destination_port;
		if (is_tcp) {
			fresh.tcp = tcp;
			failed = bpf_skb_store_bytes(skb, l3 + 8, &fresh, CHANGED6 + TCP_REST, BPF_F_RECOMPUTE_CSUM);
		} else {
			fresh.udp = udp;
			failed = bpf_skb_store_bytes(skb, l3 + 8, &fresh, CHANGED6 + UDP_REST, BPF_F_RECOMPUTE_CSUM);
		}
	}
	return failed ? DISCARD : GO_ON;
}

/* TCP or UDP with a checksum and plain IP headers. */
static inline int is_plain(const struct packet *packet)
{
	return packet->fragment == WHOLE && !packet->unsummed && checksum_offset(packet->key.protocol) >= 0 &&
	       packet->l4 - packet->l3 == (packet->version == 4 ? 20 : 40);
}

static inline int rewrite(struct __sk_buff *skb, const struct packet *packet, const struct flow_key *to)
{
	const struct flow_key *from = &packet->key;
	u64 change;

	if (packet->error)
		return rewrite_error(skb, packet, to);
	if (is_plain(packet)) {
		int verdict = rewrite_at_once(skb, packet, to);

		if (verdict != PASS)
			return verdict;
	}
	change = addresses_change(from, to);
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

/*
 * Write the new tuple into a frame and take one hop off, in place: a whole packet of TCP or UDP with a plain IP header.
 * A checksum that was wrong stays as wrong. Returns GO_ON, or PASS with the frame untouched if it ends too early.
 */
static inline int rewrite_in_place(void *data, void *end, const struct packet *packet, const struct flow_key *to)
{
	const struct flow_key *from = &packet->key;
	u8 protocol = from->protocol;
	u64 change;
	u32 l3 = packet->l3 & OFFSETS, l4 = packet->l4 & OFFSETS;
	struct ports *ports = data + l4;
	u16 *checksum = data + l4 + (protocol == IPPROTO_TCP ? 16 : 6);

	if ((void *)(ports + 1) > end || (void *)(checksum + 1) > end)
		return PASS;
	if (packet->version == 4) {
		struct iphdr *ip = data + l3;

		if ((void *)(ip + 1) > end)
			return PASS;
		change = word_change(from->source.word[3], to->source.word[3]) +
			 word_change(from->destination.word[3], to->destination.word[3]);
		ip->check = changed_checksum(ip->check, change + word_change(1, 0)); /* the TTL: a word's lower byte */
		ip->ttl -= 1;
		ip->saddr = to->source.word[3];
		ip->daddr = to->destination.word[3];
	} else {
		struct ipv6hdr *ip = data + l3;

		if ((void *)(ip + 1) > end)
			return PASS;
		change = addresses_change(from, to);
		ip->hop_limit -= 1;
		__builtin_memcpy(&ip->saddr, &to->source, 16);
		__builtin_memcpy(&ip->daddr, &to->destination, 16);
	}
	*checksum = mended(*checksum, change + ports_change(from, to), protocol);
	ports->source = to->source_port;
	ports->destination = to->destination_port;
	return GO_ON;
}

#endif
