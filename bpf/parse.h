/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * From bytes to a packet: where its headers lie and what its tuple is.
 *
 * Every parse function takes the bounds, fills in what it finds, and returns GO_ON, TOO_SHORT or a final verdict. All
 * that is not IPv4 or IPv6 with ports is PASS: not ours to judge. Parsing again with more bytes is harmless. Each
 * bounds check stands next to its access.
 */
#ifndef EBPFLB_PARSE_H
#define EBPFLB_PARSE_H

#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>
#include <uapi/linux/tcp.h>
#include <uapi/linux/udp.h>

#include "addr.h"
#include "lookup.h"

/* Verdicts of both packet hooks; each hook's main function says what they are called there. */
#define GO_ON (-1)
#define PASS 0
#define DISCARD 1
#define REDIRECTED 2
#define TOO_SHORT 3 /* of parse functions only: a header lies beyond the readable bytes, or beyond the packet */

#define WHOLE 0          /* not a fragment */
#define FIRST_FRAGMENT 1 /* has the ports */
#define LATER_FRAGMENT 2 /* has none */

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

/* How many bytes of headers are made readable: Ethernet, IPv6, some extension headers, TCP. */
#define HEADERS 128
#define MAX_EXTENSIONS 6
#define OFFSETS 0xff /* no header that is read begins behind it; the verifier forgets so where a packet is spilled */

#define IPV4_FRAGMENT 0x3fff /* more-fragments flag and offset, in host order */
#define IPV4_OFFSET 0x1fff
#define IPV6_OFFSET 0xfff8
#define IPV6_FRAGMENT_HEADER 44

/* ICMP and ICMPv6 alike; declared here because the kernel's own headers draw in those of libc. */
struct icmp_header {
	u8 type;
	u8 code;
	u16 checksum;
	u32 rest;
};

#define ICMP_UNREACHABLE 3 /* RFC 792 */
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETER_PROBLEM 12
#define ICMP_CODE_PORT 3
#define ICMPV6_UNREACHABLE 1 /* RFC 4443; the errors are 1 to 4 */
#define ICMPV6_PARAMETER_PROBLEM 4
#define ICMPV6_CODE_PORT 4

struct packet {
	struct flow_key key; /* the tuple as this hook sees it */
	u32 fragment_id;
	u16 l3; /* offset of the IP header */
	u16 l4; /* offset of the transport header */
	u16 ip_checksum;
	u8 version; /* 4 or 6 */
	u8 fragment;
	u8 tcp_flags;
	u8 unsummed; /* UDP whose checksum is zero: none was made */
	u8 hops;     /* TTL or hop limit, as it came */
	u8 error;    /* an ICMP error: `key` is its inner packet's tuple, turned round */
	u32 length;  /* from the IP header up, as that says */
	u16 inner_l3;
	u16 inner_l4;
};

struct ports {
	u16 source;
	u16 destination;
};

/* Whether a frame is for the device of this row; of one without an address, all are. */
static inline int is_addressed(const struct ethhdr *ethernet, const struct device *device)
{
	const u8 *own = device->mac, *there = ethernet->h_dest;

	if (!(own[0] | own[1] | own[2] | own[3] | own[4] | own[5]))
		return 1;
	return own[0] == there[0] && own[1] == there[1] && own[2] == there[2] && own[3] == there[3] &&
	       own[4] == there[4] && own[5] == there[5];
}

static inline int has_ports(u8 protocol)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP || protocol == IPPROTO_SCTP;
}

static inline int parse_ports(void *data, void *end, struct packet *packet)
{
	u32 l4 = packet->l4 & OFFSETS;
	struct ports *ports = data + l4;

	if ((void *)(ports + 1) > end)
		return TOO_SHORT;
	packet->key.source_port = ports->source;
	packet->key.destination_port = ports->destination;
	if (packet->key.protocol == IPPROTO_TCP) {
		u8 *flags = data + l4 + 13;

		if ((void *)(flags + 5) > end) /* with the checksum, or it could not be translated */
			return TOO_SHORT;
		packet->tcp_flags = *flags;
	}
	if (packet->key.protocol == IPPROTO_UDP) {
		u16 *checksum = data + l4 + 6;

		if ((void *)(checksum + 1) > end)
			return TOO_SHORT;
		packet->unsummed = *checksum == 0;
	}
	return GO_ON;
}

static inline int parse_ipv4(void *data, void *end, struct packet *packet)
{
	struct iphdr *ip = data + (packet->l3 & OFFSETS);
	u16 fragment;

	if ((void *)(ip + 1) > end)
		return TOO_SHORT;
	if (ip->version != 4 || ip->ihl < 5)
		return PASS;
	packet->version = 4;
	packet->l4 = packet->l3 + ip->ihl * 4;
	packet->ip_checksum = ip->check;
	packet->hops = ip->ttl;
	packet->length = swap16(ip->tot_len);
	packet->key.protocol = ip->protocol;
	set_ipv4(&packet->key.source, ip->saddr);
	set_ipv4(&packet->key.destination, ip->daddr);
	fragment = swap16(ip->frag_off) & IPV4_FRAGMENT;
	if (fragment) {
		packet->fragment = fragment & IPV4_OFFSET ? LATER_FRAGMENT : FIRST_FRAGMENT;
		packet->fragment_id = ip->id;
	}
	return GO_ON;
}

/* IPv4 addresses in an IPv6 header: nobody's on a wire (RFC 4291, 2.5.5.2), and no IPv4 flow's, as rows would have it. */
static inline int has_mapped(const struct flow_key *key)
{
	return is_ipv4(&key->source) || is_ipv4(&key->destination);
}

struct extension {
	u8 next;
	u8 length; /* units of 8 bytes, less one */
	u16 offset;
	u32 id; /* fragment header only */
};

static inline int parse_ipv6(void *data, void *end, struct packet *packet)
{
	struct ipv6hdr *ip = data + (packet->l3 & OFFSETS);
	u32 offset = (packet->l3 & OFFSETS) + sizeof(*ip);
	u8 next;

	if ((void *)(ip + 1) > end)
		return TOO_SHORT;
	if (ip->version != 6)
		return PASS;
	packet->version = 6;
	packet->hops = ip->hop_limit;
	packet->length = (u32)swap16(ip->payload_len) + sizeof(*ip);
	__builtin_memcpy(&packet->key.source, &ip->saddr, 16);
	__builtin_memcpy(&packet->key.destination, &ip->daddr, 16);
	if (has_mapped(&packet->key))
		return PASS;
	next = ip->nexthdr;

#pragma unroll
	for (int i = 0; i < MAX_EXTENSIONS; i++) {
		struct extension *extension;

		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS &&
		    next != IPV6_FRAGMENT_HEADER)
			break;
		if (offset > HEADERS)
			return PASS;
		extension = data + offset;
		if ((void *)(extension + 1) > end)
			return TOO_SHORT;
		if (next == IPV6_FRAGMENT_HEADER) {
			packet->fragment_id = extension->id;
			if (swap16(extension->offset) & IPV6_OFFSET)
				packet->fragment = LATER_FRAGMENT;
			else if (extension->offset)
				packet->fragment = FIRST_FRAGMENT;
			offset += 8;
		} else {
			offset += ((u32)extension->length + 1) * 8;
		}
		next = extension->next;
		if (packet->fragment == LATER_FRAGMENT)
			break; /* what follows is the middle of something */
	}
	if (offset > HEADERS)
		return PASS;
	packet->key.protocol = next;
	packet->l4 = offset;
	return GO_ON;
}

static inline int is_error4(u8 type)
{
	return type == ICMP_UNREACHABLE || type == ICMP_TIME_EXCEEDED || type == ICMP_PARAMETER_PROBLEM;
}

static inline int is_error6(u8 type)
{
	return type >= ICMPV6_UNREACHABLE && type <= ICMPV6_PARAMETER_PROBLEM;
}

/*
 * An ICMP error speaks of a packet that went the other way. Its inner tuple, turned round, is that of a packet which
 * would meet the same row of `flows` at this hook.
 */
static inline void enter_error(struct packet *packet, u16 inner_header, u8 protocol, const struct ports *ports)
{
	packet->error = 1;
	packet->inner_l3 = packet->l4 + sizeof(struct icmp_header);
	packet->inner_l4 = packet->inner_l3 + inner_header;
	packet->key.protocol = protocol;
	packet->key.source_port = ports->destination;
	packet->key.destination_port = ports->source;
}

static inline int parse_error4(void *data, void *end, struct packet *packet)
{
	struct icmp_header *icmp = data + (packet->l4 & OFFSETS);
	struct iphdr *inner;
	struct ports *ports;

	if ((void *)(icmp + 1) > end)
		return TOO_SHORT;
	if (!is_error4(icmp->type))
		return PASS;
	inner = (void *)(icmp + 1);
	if ((void *)(inner + 1) > end)
		return TOO_SHORT;
	if (inner->ihl != 5 || !has_ports(inner->protocol) || (swap16(inner->frag_off) & IPV4_OFFSET))
		return PASS;
	ports = (void *)(inner + 1);
	if ((void *)(ports + 1) > end)
		return TOO_SHORT;

	enter_error(packet, sizeof(*inner), inner->protocol, ports);
	set_ipv4(&packet->key.source, inner->daddr);
	set_ipv4(&packet->key.destination, inner->saddr);
	return GO_ON;
}

static inline int parse_error6(void *data, void *end, struct packet *packet)
{
	struct icmp_header *icmp = data + (packet->l4 & OFFSETS);
	struct extension *piece;
	struct ipv6hdr *inner;
	struct ports *ports;
	u16 header = sizeof(*inner);
	u8 protocol;

	if ((void *)(icmp + 1) > end)
		return TOO_SHORT;
	if (!is_error6(icmp->type))
		return PASS;
	inner = (void *)(icmp + 1);
	if ((void *)(inner + 1) > end)
		return TOO_SHORT;
	protocol = inner->nexthdr;
	ports = (void *)(inner + 1);
	if (protocol == IPV6_FRAGMENT_HEADER) {
		piece = (void *)(inner + 1);
		if ((void *)(piece + 1) > end)
			return TOO_SHORT;
		if (swap16(piece->offset) & IPV6_OFFSET)
			return PASS;
		protocol = piece->next;
		header += sizeof(*piece);
		ports = (void *)(piece + 1);
	}
	if (inner->version != 6 || !has_ports(protocol))
		return PASS;
	if ((void *)(ports + 1) > end)
		return TOO_SHORT;

	enter_error(packet, header, protocol, ports);
	__builtin_memcpy(&packet->key.source, &inner->daddr, 16);
	__builtin_memcpy(&packet->key.destination, &inner->saddr, 16);
	return has_mapped(&packet->key) ? PASS : GO_ON;
}

/* Later fragments have no ports: theirs are those of the first one, if this hook has translated that. */
static inline struct fragment_key fragment_of(const struct packet *packet)
{
	struct fragment_key key = {};

	key.source = packet->key.source;
	key.destination = packet->key.destination;
	key.id = packet->fragment_id;
	key.protocol = packet->key.protocol;
	key.hook = packet->key.hook;
	return key;
}

static inline int recall_ports(struct packet *packet)
{
	struct fragment_key key = fragment_of(packet);
	struct fragment *first = fragments.lookup(&key);

	if (!first) {
		count(FRAGMENT_UNKNOWN);
		return PASS;
	}
	packet->key.source_port = first->source_port;
	packet->key.destination_port = first->destination_port;
	return GO_ON;
}

static inline void remember_ports(const struct packet *packet)
{
	struct fragment_key key = fragment_of(packet);
	struct fragment first = {};

	first.source_port = packet->key.source_port;
	first.destination_port = packet->key.destination_port;
	fragments.update(&key, &first);
}

/* A first fragment is another datagram's than what has had its identification before, and may be nobody's. */
static inline void forget_ports(const struct packet *packet)
{
	struct fragment_key key = fragment_of(packet);

	if (fragments.lookup(&key))
		fragments.delete(&key);
}

/* Everything behind the Ethernet header, whose protocol the caller has found. */
static inline int parse_packet(void *data, void *end, u16 ethertype, struct packet *packet)
{
	int verdict;

	if (ethertype == swap16(ETH_P_IP))
		verdict = parse_ipv4(data, end, packet);
	else if (ethertype == swap16(ETH_P_IPV6))
		verdict = parse_ipv6(data, end, packet);
	else
		verdict = PASS;
	if (verdict != GO_ON)
		return verdict;

	if (packet->fragment == LATER_FRAGMENT)
		return has_ports(packet->key.protocol) ? recall_ports(packet) : PASS;
	if (packet->fragment == FIRST_FRAGMENT)
		forget_ports(packet);
	if (has_ports(packet->key.protocol))
		return parse_ports(data, end, packet);
	if (packet->fragment != WHOLE)
		return PASS;
	if (packet->version == 4 && packet->key.protocol == IPPROTO_ICMP)
		return parse_error4(data, end, packet);
	if (packet->version == 6 && packet->key.protocol == IPPROTO_ICMPV6)
		return parse_error6(data, end, packet);
	return PASS;
}

/*
 * Whether the IP header says that the packet ends within the headers that were read. The stack trims it to that, so that
 * the next hook could not read it any more: half a translation.
 */
static inline int ends_early(const struct packet *packet)
{
	u32 needed = packet->l4 + 8;

	if (packet->fragment == LATER_FRAGMENT)
		return 0;
	if (packet->error)
		needed = packet->inner_l4 + 8;
	else if (packet->key.protocol == IPPROTO_TCP)
		needed = packet->l4 + 20;
	return packet->l3 + packet->length < needed;
}

/*
 * As parse_packet, for who forwards by itself: TCP and UDP with plain headers only. Everything else is PASS, counted
 * where it could have been a Service's.
 */
static inline int parse_plain(void *data, void *end, u16 ethertype, struct packet *packet)
{
	u32 l3 = packet->l3 & OFFSETS;

	if (ethertype == swap16(ETH_P_IP)) {
		struct iphdr *ip = data + l3;

		if ((void *)(ip + 1) > end)
			return TOO_SHORT;
		if (ip->protocol != IPPROTO_TCP && ip->protocol != IPPROTO_UDP)
			return PASS;
		if (ip->version != 4 || ip->ihl != 5 || (swap16(ip->frag_off) & IPV4_FRAGMENT)) {
			count(XDP_OPTIONS);
			return PASS;
		}
		packet->version = 4;
		packet->l4 = packet->l3 + sizeof(*ip);
		packet->hops = ip->ttl;
		packet->length = swap16(ip->tot_len);
		packet->key.protocol = ip->protocol;
		set_ipv4(&packet->key.source, ip->saddr);
		set_ipv4(&packet->key.destination, ip->daddr);
	} else if (ethertype == swap16(ETH_P_IPV6)) {
		struct ipv6hdr *ip = data + l3;

		if ((void *)(ip + 1) > end)
			return TOO_SHORT;
		if (ip->nexthdr != IPPROTO_TCP && ip->nexthdr != IPPROTO_UDP) {
			if (ip->nexthdr != IPPROTO_ICMPV6)
				count(XDP_OPTIONS);
			return PASS;
		}
		if (ip->version != 6)
			return PASS;
		packet->version = 6;
		packet->l4 = packet->l3 + sizeof(*ip);
		packet->hops = ip->hop_limit;
		packet->length = (u32)swap16(ip->payload_len) + sizeof(*ip);
		packet->key.protocol = ip->nexthdr;
		__builtin_memcpy(&packet->key.source, &ip->saddr, 16);
		__builtin_memcpy(&packet->key.destination, &ip->daddr, 16);
		if (has_mapped(&packet->key))
			return PASS;
	} else {
		return PASS;
	}
	return parse_ports(data, end, packet);
}

#endif
