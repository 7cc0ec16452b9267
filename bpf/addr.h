/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Addresses and checksums: pure arithmetic, no maps and no packets.
 *
 * An address is four words in network order, IPv4 as ::ffff:a.b.c.d, so that both families are one code path; the
 * only question about families is `is_ipv4`.
 */
#ifndef EBPFLB_ADDR_H
#define EBPFLB_ADDR_H

#include "maps.h"

static inline u16 swap16(u16 value)
{
	return (u16)((value << 8) | (value >> 8));
}

#define MAPPED_PREFIX 0xffff0000 /* ::ffff: as it lies in memory on a little-endian machine */

static inline void set_ipv4(struct address *address, u32 ipv4)
{
	address->word[0] = 0;
	address->word[1] = 0;
	address->word[2] = MAPPED_PREFIX;
	address->word[3] = ipv4;
}

static inline int is_ipv4(const struct address *address)
{
	return address->word[0] == 0 && address->word[1] == 0 && address->word[2] == MAPPED_PREFIX;
}

static inline int is_zero(const struct address *address)
{
	return (address->word[0] | address->word[1] | address->word[2] | address->word[3]) == 0;
}

static inline int same_address(const struct address *a, const struct address *b)
{
	return a->word[0] == b->word[0] && a->word[1] == b->word[1] && a->word[2] == b->word[2] &&
	       a->word[3] == b->word[3];
}

/*
 * A number whose upper bits are spread evenly over addresses and what else they are asked with: two multiplications that
 * do not wait for each other, and one that lets a dense range of addresses fill no part of all numbers.
 */
static inline u64 spread(const struct address *address, u32 with)
{
	u64 sum = ((u64)address->word[1] << 32 | address->word[0]) * 0xd6e8feb86659fd93 +
		  ((u64)address->word[3] << 32 | address->word[2]) * 0x9e3779b97f4a7c15 +
		  (u64)with * 0xbf58476d1ce4e5b9;

	return (sum ^ sum >> 32) * 0x94d049bb133111eb;
}

/* 127.0.0.0/8 or ::1: addresses that mean another machine in every network namespace. */
static inline int is_loopback(const struct address *address)
{
	if (is_ipv4(address))
		return (address->word[3] & 0xff) == 127;
	return address->word[0] == 0 && address->word[1] == 0 && address->word[2] == 0 &&
	       address->word[3] == 0x01000000;
}

/*
 * Whether nobody can have sent a packet from this address by a wire: the unspecified one and its network, loopback,
 * multicast and what lies behind it. The stack drops such packets.
 */
static inline int is_martian(const struct address *source)
{
	u8 first;

	if (is_ipv4(source)) {
		first = (u8)source->word[3];
		return first == 0 || first == 127 || first >= 224;
	}
	return (source->word[0] & 0xff) == 0xff || is_loopback(source) || is_zero(source);
}

/* fe80::/10: the stack forwards nothing from such an address. */
static inline int is_link_local(const struct address *address)
{
	return (address->word[0] & 0xc0ff) == 0x80fe;
}

/* What a one's complement sum changes by when `from` becomes `to` (RFC 1624), unfolded. */
static inline u64 word_change(u32 from, u32 to)
{
	return (u64)(u32)~from + to;
}

static inline u64 address_change(const struct address *from, const struct address *to)
{
	return word_change(from->word[0], to->word[0]) + word_change(from->word[1], to->word[1]) +
	       word_change(from->word[2], to->word[2]) + word_change(from->word[3], to->word[3]);
}

/* A sum folded to the 32 bits that the checksum helpers take. */
static inline u32 fold32(u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	return (u32)((sum & 0xffffffff) + (sum >> 32));
}

static inline u16 fold16(u64 sum)
{
	u32 folded = fold32(sum);

	folded = (folded & 0xffff) + (folded >> 16);
	return (u16)((folded & 0xffff) + (folded >> 16));
}

/* A checksum field after a change of what it covers. */
static inline u16 changed_checksum(u16 checksum, u64 change)
{
	return (u16)~fold16((u64)(u16)~checksum + change);
}

#endif
