/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Saying no: the refused packet itself becomes the answer and goes back where it came from.
 *
 *   TCP     a RST (RFC 9293, 3.10.7.1), since an ICMP error that meets a socket inside connect() is lost
 *   others  port unreachable: ICMP 3/3 (RFC 792) or ICMPv6 1/4 (RFC 4443), from the address that was asked
 *
 * Returns REDIRECTED with the packet turned round, or DISCARD, counted, where no answer could be built.
 */
#ifndef EBPFLB_REJECT_H
#define EBPFLB_REJECT_H

#include "nat.h"

#define PACKET_TO_ALL 1  /* skb->pkt_type: PACKET_BROADCAST */
#define PACKET_TO_MANY 2 /* PACKET_MULTICAST */
#define ANSWER_TTL 64
#define NOPS 0x01010101
#define MAX_OPTIONS 10 /* words */
#define QUOTED 8       /* bytes of the transport header that an ICMP error quotes */
#define QUOTED_SCTP 12 /* the kernel does not cut a packet before its checksum */

struct tcp_header {
	u16 source;
	u16 destination;
	u32 sequence;
	u32 acknowledgment;
	u8 length; /* upper four bits, in words */
	u8 flags;
	u16 window;
	u16 checksum;
	u16 urgent;
};

struct ethernet {
	u8 destination[6];
	u8 source[6];
};

static inline u32 swap32(u32 value)
{
	return __builtin_bswap32(value);
}

static inline int no_answer(void)
{
	count(PACKET_REJECT_FAILED);
	return DISCARD;
}

static inline int turn_frame_round(struct __sk_buff *skb)
{
	struct ethernet was = {}, is = {};

	if (bpf_skb_load_bytes(skb, 0, &was, sizeof(was)))
		return -1;
	__builtin_memcpy(is.destination, was.source, 6);
	__builtin_memcpy(is.source, was.destination, 6);
	return bpf_skb_store_bytes(skb, 0, &is, sizeof(is), 0);
}

/* How many bytes the IP packet has from its start; frames may be padded behind it. */
static inline u32 ip_length(struct __sk_buff *skb, const struct packet *packet)
{
	u16 length = 0;

	if (packet->version == 4)
		return bpf_skb_load_bytes(skb, packet->l3 + 2, &length, 2) ? 0 : swap16(length);
	return bpf_skb_load_bytes(skb, packet->l3 + 4, &length, 2) ? 0 : (u32)swap16(length) + 40;
}

static inline int turn_addresses_round(struct __sk_buff *skb, const struct packet *packet)
{
	u16 checksum = packet->ip_checksum;
	u16 was = 0, is;

	if (packet->version == 4) {
		if (bpf_skb_load_bytes(skb, packet->l3 + 8, &was, 2))
			return -1;
		is = (was & 0xff00) | ANSWER_TTL; /* TTL is the first byte, the protocol the second */
		if (bpf_skb_store_bytes(skb, packet->l3 + 8, &is, 2, 0))
			return -1;
		checksum = changed_checksum(checksum, word_change(was, is));
	} else {
		u8 hops = ANSWER_TTL;

		if (bpf_skb_store_bytes(skb, packet->l3 + 7, &hops, 1, BPF_F_RECOMPUTE_CSUM))
			return -1;
	}
	return write_addresses(skb, packet->l3, packet->version, checksum, 0, &packet->key.destination,
			       &packet->key.source, 0);
}

/*
 * The segment becomes its own RST: same length, so that nothing about the packet's checksum state or its buffers
 * changes; options become no-ops; data, if there is any, stays (RFC 1122, 4.2.2.12 allows it).
 */
static inline int reject_tcp(struct __sk_buff *skb, const struct packet *packet)
{
	struct tcp_header was = {}, is = {};
	u32 words, length, *old = (u32 *)&was, *new = (u32 *)&is;
	u64 change = 0;

	if (packet->tcp_flags & TCP_RST) {
		count(PACKET_REJECTED_TCP);
		return DISCARD; /* a RST is never answered */
	}
	if (packet->fragment != WHOLE || skb->gso_size || bpf_skb_load_bytes(skb, packet->l4, &was, sizeof(was)))
		return no_answer();
	words = was.length >> 4;
	length = ip_length(skb, packet) + packet->l3;
	if (words < 5 || length < packet->l4 + words * 4)
		return no_answer();

	is.source = was.destination;
	is.destination = was.source;
	is.length = was.length;
	if (was.flags & TCP_ACK) {
		is.flags = TCP_RST;
		is.sequence = was.acknowledgment;
	} else {
		is.flags = TCP_RST | TCP_ACK;
		length -= packet->l4 + words * 4;
		length += (was.flags & TCP_SYN ? 1 : 0) + (was.flags & TCP_FIN ? 1 : 0);
		is.acknowledgment = swap32(swap32(was.sequence) + length);
	}
	is.checksum = was.checksum;

	for (int i = 0; i < 5; i++)
		change += word_change(old[i], new[i]);
#pragma unroll
	for (u32 i = 0; i < MAX_OPTIONS; i++) {
		u32 option = 0, nops = NOPS, offset = packet->l4 + 20 + i * 4;

		if (i + 5 >= words)
			break;
		if (bpf_skb_load_bytes(skb, offset, &option, 4) || bpf_skb_store_bytes(skb, offset, &nops, 4, 0))
			return no_answer();
		change += word_change(option, nops);
	}
	if (bpf_skb_store_bytes(skb, packet->l4, &is, sizeof(is), 0))
		return no_answer();
	if (bpf_l4_csum_replace(skb, packet->l4 + 16, 0, fold32(change), 0))
		return no_answer();
	if (turn_addresses_round(skb, packet) || turn_frame_round(skb))
		return no_answer();
	count(PACKET_REJECTED_TCP);
	return REDIRECTED;
}

struct unreachable4 {
	struct iphdr ip;
	struct icmp_header icmp;
};

struct unreachable6 {
	struct ipv6hdr ip;
	struct icmp_header icmp;
};

/* The helper's result is 32 bits of a sum (folded to 16 since Linux 6.13), which bcc declares as an int: as such it
 * would be negative half of the time, and carry its sign into wider sums. */
static inline u32 sum_of(void *data, u32 size)
{
	return (u32)bpf_csum_diff(0, 0, data, size, 0);
}

/* The sum of what is quoted: the IP header of `size` bytes and the first bytes behind it. -1 if it is not there. */
static inline int sum_quoted(struct __sk_buff *skb, u32 offset, u32 size, u32 quoted, u32 *sum)
{
	u32 bytes[13] = {}; /* at most 40 + 12 */

	if (size == 20) {
		if (bpf_skb_load_bytes(skb, offset, bytes, 20 + QUOTED))
			return -1;
	} else {
		if (bpf_skb_load_bytes(skb, offset, bytes, 40 + QUOTED))
			return -1;
	}
	if (quoted == QUOTED_SCTP) {
		if (size == 20) {
			if (bpf_skb_load_bytes(skb, offset + 28, &bytes[7], 4))
				return -1;
		} else {
			if (bpf_skb_load_bytes(skb, offset + 48, &bytes[12], 4))
				return -1;
		}
	}
	*sum = sum_of(bytes, sizeof(bytes));
	return 0;
}

static inline int reject_ipv4(struct __sk_buff *skb, const struct packet *packet, u32 quoted)
{
	struct unreachable4 answer = {};
	u32 sum = 0;
	u64 header;

	if (sum_quoted(skb, packet->l3, 20, quoted, &sum) || bpf_skb_change_tail(skb, packet->l4 + quoted, 0) ||
	    bpf_skb_adjust_room(skb, sizeof(answer), BPF_ADJ_ROOM_MAC, 0))
		return no_answer();
	answer.ip.version = 4;
	answer.ip.ihl = 5;
	answer.ip.tot_len = swap16((u16)(sizeof(answer) + 20 + quoted));
	answer.ip.ttl = ANSWER_TTL;
	answer.ip.protocol = IPPROTO_ICMP;
	answer.ip.saddr = packet->key.destination.word[3];
	answer.ip.daddr = packet->key.source.word[3];
	header = sum_of(&answer.ip, sizeof(answer.ip));
	answer.ip.check = (u16)~fold16(header);
	answer.icmp.type = ICMP_UNREACHABLE;
	answer.icmp.code = ICMP_CODE_PORT;
	answer.icmp.checksum = (u16)~fold16((u64)sum + ICMP_UNREACHABLE + (ICMP_CODE_PORT << 8));
	if (bpf_skb_store_bytes(skb, packet->l3, &answer, sizeof(answer), BPF_F_RECOMPUTE_CSUM))
		return no_answer();
	return GO_ON;
}

static inline int reject_ipv6(struct __sk_buff *skb, const struct packet *packet, u32 quoted)
{
	struct unreachable6 answer = {};
	u32 sum = 0;
	u64 total;

	if (sum_quoted(skb, packet->l3, 40, quoted, &sum) || bpf_skb_change_tail(skb, packet->l4 + quoted, 0) ||
	    bpf_skb_adjust_room(skb, sizeof(answer), BPF_ADJ_ROOM_MAC, 0))
		return no_answer();
	answer.ip.version = 6;
	answer.ip.payload_len = swap16((u16)(sizeof(answer.icmp) + 40 + quoted));
	answer.ip.nexthdr = IPPROTO_ICMPV6;
	answer.ip.hop_limit = ANSWER_TTL;
	__builtin_memcpy(&answer.ip.saddr, &packet->key.destination, 16);
	__builtin_memcpy(&answer.ip.daddr, &packet->key.source, 16);
	answer.icmp.type = ICMPV6_UNREACHABLE;
	answer.icmp.code = ICMPV6_CODE_PORT;
	total = (u64)sum + ICMPV6_UNREACHABLE + (ICMPV6_CODE_PORT << 8);
	/* The pseudo-header: both addresses, the length and the protocol (RFC 4443, 2.3). */
	total += sum_of(&answer.ip.saddr, 32);
	total += answer.ip.payload_len + swap16(IPPROTO_ICMPV6);
	answer.icmp.checksum = (u16)~fold16(total);
	if (bpf_skb_store_bytes(skb, packet->l3, &answer, sizeof(answer), BPF_F_RECOMPUTE_CSUM))
		return no_answer();
	return GO_ON;
}

static inline int reject_other(struct __sk_buff *skb, const struct packet *packet)
{
	u32 quoted = packet->key.protocol == IPPROTO_SCTP ? QUOTED_SCTP : QUOTED;
	u32 header = packet->l4 - packet->l3;
	int verdict;

	/* Quoting options or extension headers would need a buffer of any size; such datagrams are only dropped. */
	if (header != (packet->version == 4 ? 20 : 40))
		return no_answer();
	if (packet->version == 4)
		verdict = reject_ipv4(skb, packet, quoted);
	else
		verdict = reject_ipv6(skb, packet, quoted);
	if (verdict != GO_ON)
		return verdict;
	if (turn_frame_round(skb))
		return no_answer();
	count(PACKET_REJECTED_ICMP);
	return REDIRECTED;
}

static inline int reject(struct __sk_buff *skb, const struct packet *packet)
{
	/* Others would answer, too, and none of them by a source that a frame may have (RFC 1122, 3.2.2). */
	if (skb->pkt_type == PACKET_TO_ALL || skb->pkt_type == PACKET_TO_MANY)
		return no_answer();
	if (packet->key.protocol == IPPROTO_TCP)
		return reject_tcp(skb, packet);
	return reject_other(skb, packet);
}

#endif
