/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The rows that the kernel holds, and the maps that hold them. This is their only definition: the control plane takes
 * the layouts from what BCC derives from this file, and checks the names and sizes it needs at load.
 *
 * Addresses are 16 bytes in network order, IPv4 as ::ffff:a.b.c.d. Ports are in network order. All padding is explicit
 * and zero. Rows are read by programs of several ages at once during an upgrade, so what a field means never changes;
 * LAYOUT below does instead.
 */
#ifndef EBPFLB_MAPS_H
#define EBPFLB_MAPS_H

#include "config.h"

/* The version of all layouts in this file; stored in `settings`, so that pins of another version are noticed. */
#define LAYOUT 2

struct address {
	u32 word[4];
};
_Static_assert(sizeof(struct address) == 16, "struct address");

/* ---- Desired state: written by the control plane, read by the programs ---- */

struct frontend_key {
	struct address address;
	u16 port;
	u8 protocol; /* IPPROTO_TCP, IPPROTO_UDP, IPPROTO_SCTP */
	u8 pad;
};
_Static_assert(sizeof(struct frontend_key) == 20, "struct frontend_key");

/*
 * What to do for one scope. The backends are slots[slots .. slots + count) for new flows, followed by `draining` more
 * which only keep what they have. One update of the row switches verdict, range and count at once.
 */
struct route {
	u8 verdict;
	u8 masquerade;
	u8 algorithm;
	u8 forwarding;
	u32 service;  /* key of `names` */
	u32 slots;    /* first slot */
	u32 count;    /* slots of active backends */
	u32 draining; /* slots of draining backends behind them */
	u32 affinity; /* seconds; 0: none */
	u32 ranges;   /* key of `ranges`; 0: everybody */
	u8 kind;
	u8 table; /* the size of the slots' table in `tables`, as in table_size(); 0: they have none */
	u8 pad[2];
};
_Static_assert(sizeof(struct route) == 32, "struct route");

struct frontend {
	struct route scope[2]; /* indexed by SCOPE_… */
};
_Static_assert(sizeof(struct frontend) == 64, "struct frontend");

/* A backend of one Service port; the id is its index. A row whose state is BACKEND_FREE belongs to nobody. */
struct backend {
	struct address address;
	u16 port;
	u16 weight;
	u8 state;
	u8 pad[3];
	u32 service; /* whose backend it is */
};
_Static_assert(sizeof(struct backend) == 28, "struct backend");

/* The Service port that a route belongs to, for people: NUL-terminated names. */
struct name {
	char namespace[64];
	char name[64];
	char port[64];
};
_Static_assert(sizeof(struct name) == 192, "struct name");

/* Who a source address is: bits SOURCE_…; the longest prefix holds the bits of all prefixes around it. */
struct source_key {
	u32 prefix; /* bits; IPv4 prefixes count from 96 */
	struct address address;
};
_Static_assert(sizeof(struct source_key) == 20, "struct source_key");

struct source {
	u32 flags;
};
_Static_assert(sizeof(struct source) == 4, "struct source");

/* Who may use a frontend with source ranges: present is allowed. */
struct range_key {
	u32 prefix; /* bits; 32 for the id, then as in source_key */
	u32 ranges;
	struct address address;
};
_Static_assert(sizeof(struct range_key) == 24, "struct range_key");

/* Whose cluster IP an address is, for people: NUL-terminated names. A port of it without a row is refused. */
struct owner {
	char namespace[64];
	char name[64];
};
_Static_assert(sizeof(struct owner) == 128, "struct owner");

/*
 * Hints which addresses `frontends` or `owned` have rows of, so that packets to all others need not look: a bit for
 * each of many hash values. The control plane sets it before it writes a row, and clears it after the last one went.
 */
struct known {
	u64 bits;
};
_Static_assert(sizeof(struct known) == 8, "struct known");

#define KNOWN_CELLS 16384
#define KNOWN_SHIFT (64 - 14 - 6) /* the upper bits of an address' spread that name a bit */

/*
 * A part of the table by which consistent hashing (Maglev, NSDI 2016) finds a slot: positions among the active slots
 * that begin at `slots`. One update of a frontend's row switches to a table that has been written before.
 */
#define TABLE_PART 1024

struct table_key {
	u32 slots; /* the first slot */
	u32 part;
};
_Static_assert(sizeof(struct table_key) == 8, "struct table_key");

struct table_part {
	u16 position[TABLE_PART];
};
_Static_assert(sizeof(struct table_part) == 2048, "struct table_part");

/*
 * Which backends are among the active ones of a route with session affinity, and at which position: one look-up tells
 * whether a client's backend still takes its new connections.
 */
struct member_key {
	u32 slots; /* the first slot */
	u32 backend;
};
_Static_assert(sizeof(struct member_key) == 8, "struct member_key");

/*
 * A device whose hooks run our programs. The addresses are what masquerade takes; zero: none in that family. Packets
 * that are longer than its MTU (from the IP header up) are the stack's business.
 */
struct device {
	struct address ipv4;
	struct address ipv6;
	u32 flags; /* DEVICE_… */
	u32 mtu;
	u8 mac[6]; /* frames to any other are not this device's business */
	u16 pad;
};
_Static_assert(sizeof(struct device) == 48, "struct device");

/* Which device frames with a VLAN tag belong to that enter by a device under XDP. */
struct vlan_key {
	u32 device;
	u16 id; /* host order */
	u16 pad;
};
_Static_assert(sizeof(struct vlan_key) == 8, "struct vlan_key");

/* One row: what holds for this node as a whole. */
struct settings {
	u64 netns;              /* cookie of the network namespace whose node this is */
	u64 flow_idle;          /* jiffies after which an idle UDP flow may be chosen anew */
	u64 refresh;            /* jiffies between two refreshes of a flow's last use */
	u32 layout;             /* LAYOUT */
	u32 pod_sockets;        /* POD_SOCKETS_… */
	u16 snat_low;           /* first port of masquerade, host order */
	u16 snat_high;          /* last one */
	u32 second;             /* jiffies */
	char pod_interface[16]; /* Locality.pod_interface without its star */
	u8 pod_interface_is_prefix;
	u8 flows_elsewhere; /* another dataplane carried Services before: connections not known here are its own */
	u8 retired;         /* another one carries them now: a port that it takes is no longer ours */
	u8 pad;
	u32 by_stack; /* jiffies after which a packet to a neighbour goes by the stack; 0: never */
};
_Static_assert(sizeof(struct settings) == 64, "struct settings");

BPF_F_TABLE("hash", struct frontend_key, struct frontend, frontends, MAX_FRONTENDS, BPF_F_NO_PREALLOC);
BPF_TABLE("array", u32, u32, slots, MAX_SLOTS);
BPF_TABLE("array", u32, struct backend, backends, MAX_BACKENDS);
BPF_F_TABLE("hash", u32, struct name, names, MAX_SERVICES, BPF_F_NO_PREALLOC);
BPF_F_TABLE("lpm_trie", struct source_key, struct source, sources, MAX_SOURCES, BPF_F_NO_PREALLOC);
BPF_F_TABLE("lpm_trie", struct range_key, u32, ranges, MAX_RANGES, BPF_F_NO_PREALLOC);
BPF_F_TABLE("hash", struct address, struct owner, owned, MAX_OWNED, BPF_F_NO_PREALLOC);
BPF_TABLE("array", u32, struct known, known, KNOWN_CELLS);
BPF_F_TABLE("hash", struct table_key, struct table_part, tables, MAX_TABLES, BPF_F_NO_PREALLOC);
BPF_F_TABLE("hash", struct member_key, u32, members, MAX_BACKENDS, BPF_F_NO_PREALLOC);
BPF_TABLE("hash", u32, struct device, devices, MAX_DEVICES);
BPF_TABLE("hash", struct vlan_key, u32, vlans, MAX_DEVICES);
BPF_TABLE("array", u32, struct settings, settings, 1);

/* ---- Flow state: written by the programs ---- */

/*
 * A packet as one hook sees it. Each flow has up to four rows, one for each thing that happens to its packets:
 *   ingress  client -> frontend   destination becomes the backend     (request enters)
 *   egress   client -> backend    source becomes this node            (request leaves; masquerade only)
 *   ingress  backend -> node      destination becomes the client      (reply enters; masquerade only)
 *   egress   backend -> client    source becomes the frontend         (reply leaves)
 * so that an established packet costs one lookup at each hook. The rows of ingress can tell the whole translation
 * (FLOW_WHOLE), by which XDP sends a packet on at once; a flow that XDP began has no rows of egress until tc needs them
 * (FLOW_SHORT).
 */
struct flow_key {
	struct address source;
	struct address destination;
	u16 source_port;
	u16 destination_port;
	u8 protocol;
	u8 hook; /* HOOK_… */
	u16 pad;
};
_Static_assert(sizeof(struct flow_key) == 40, "struct flow_key");

#define HOOK_INGRESS 0
#define HOOK_EGRESS 1

#define FLOW_DNAT 0      /* request enters */
#define FLOW_SNAT 1      /* request leaves */
#define FLOW_UNSNAT 2    /* reply enters */
#define FLOW_UNDNAT 3    /* reply leaves */
#define FLOW_ELSEWHERE 4 /* reply enters to a port of conntrack's masquerade: left alone */

#define FLOW_CLOSING 1     /* a FIN or RST has been seen: the next SYN is a new connection */
#define FLOW_UNALLOCATED 2 /* FLOW_SNAT: no port has been taken yet */
#define FLOW_MASQUERADE 4  /* the flow has SNAT rows */
#define FLOW_DIRECT 8      /* to no frontend: only the client's port is changed */
#define FLOW_WHOLE 16      /* ingress: `beyond` is known */
#define FLOW_SHORT 32      /* ingress: the rows of egress have not been written */
#define FLOW_AROUND 64     /* DNAT, UNDNAT: from one pod to another around the stack */
#define FLOW_OPENING 128   /* DNAT: TCP, of which the client has said nothing but the first packet and SYN */

/*
 * Where XDP sends a flow's packets to: what the FIB has said for them, believed for a second. Who writes it sets `until`
 * to zero before and to its new value after; who reads it believes a copy only if `until` is still the same.
 */
struct way {
	u32 until;    /* the low word of jiffies; 0: nothing is known */
	u32 entered;  /* the device that the packets come by */
	u32 device;   /* the one that they leave by; with BY_REDIRECT where XDP_TX does not lead there */
	u8 frame[12]; /* Ethernet: destination, source */
	u8 mac[6];    /* of the device that the packets come by */
	u16 mtu;
};
_Static_assert(sizeof(struct way) == 32, "struct way");

#define BY_REDIRECT 0x80000000 /* in way.device */

struct flow {
	struct address address; /* what the rewritten side becomes */
	u16 port;
	u16 other_port; /* what the other side's port becomes */
	u8 action;      /* FLOW_DNAT … */
	u8 flags;
	u16 pad;
	u32 service;
	u32 backend;
	u64 seen; /* jiffies of the last use, to `settings.refresh` */
	u64 created;
	/*
	 * The other end of the whole translation. FLOW_DNAT: this node's address and port, as the backend sees them.
	 * FLOW_UNSNAT, FLOW_SNAT: the frontend, and in `client_port` the port that the client itself has.
	 */
	struct address beyond;
	u16 beyond_port;
	u16 client_port;
	struct way way; /* rows of ingress */
	u32 way_pad;
};
_Static_assert(sizeof(struct flow) == 104, "struct flow");

/* The ports of a fragmented datagram, learnt from its first fragment, at one hook. */
struct fragment_key {
	struct address source;
	struct address destination;
	u32 id;
	u8 protocol;
	u8 hook;
	u16 pad;
};
_Static_assert(sizeof(struct fragment_key) == 40, "struct fragment_key");

struct fragment {
	u16 source_port;
	u16 destination_port;
};
_Static_assert(sizeof(struct fragment) == 4, "struct fragment");

/*
 * What a socket's address was turned into. SOCKET_FORWARD: frontend -> backend, so that an unconnected UDP socket stays
 * with its backend; SOCKET_REVERSE: backend -> frontend, so that recvmsg and getpeername show the frontend.
 */
struct socket_key {
	u64 cookie;
	struct address address;
	u16 port;
	u8 protocol;
	u8 direction; /* SOCKET_… */
	u32 pad;
};
_Static_assert(sizeof(struct socket_key) == 32, "struct socket_key");

#define SOCKET_FORWARD 0
#define SOCKET_REVERSE 1

struct socket_value {
	struct address address;
	u16 port;
	u16 pad;
	u32 service;
	u32 backend;
	u32 pad2;
	u64 seen;
};
_Static_assert(sizeof(struct socket_value) == 40, "struct socket_value");

/*
 * Where a client went before, for Services with session affinity (ClientIP). A client is an address to the packet paths
 * and a network namespace to the socket path, whose sockets have no address yet.
 */
struct affinity_key {
	struct address client; /* CLIENT_NETNS: the cookie is in the first two words */
	u32 service;
	u8 kind; /* CLIENT_… */
	u8 pad[3];
};
_Static_assert(sizeof(struct affinity_key) == 24, "struct affinity_key");

#define CLIENT_ADDRESS 0
#define CLIENT_NETNS 1

struct affinity {
	u32 backend;
	u32 position; /* where among the slots it was; they may have changed since */
	u64 seen;     /* jiffies of the last new connection */
};
_Static_assert(sizeof(struct affinity) == 16, "struct affinity");

/*
 * Where a packet is sent to that goes around the stack: what the FIB has said for a destination and a device, and for how
 * long it is believed. A cell for each of many hash values, on each CPU. (XDP keeps it in the flow's row: struct way.)
 */
struct hop {
	struct address source; /* zero: no way that is kept here depends on it */
	struct address destination;
	u32 entered; /* the device that the packet came by */
	u32 device;  /* the one that it leaves by */
	u32 mtu;
	u8 frame[12]; /* Ethernet: destination, source */
	u64 until;    /* jiffies */
};
_Static_assert(sizeof(struct hop) == 64, "struct hop");

#define HOP_CELLS 2048

/*
 * When XDP last left a packet to a neighbour to the stack, by a hash of its link-layer address and device: the low word
 * of jiffies, at first that of the first packet to it. Neighbours of one hash share it.
 */
#define NEIGHBOUR_CELLS 1024

/*
 * Hints where `flows` may have rows, so that packets which are nobody's need not look: a byte for each of many hash
 * values of an address, set before the row is written and never cleared. A false hint costs one lookup.
 */
struct mark {
	u8 set[8]; /* bytes, not bits: two CPUs may set neighbours at once */
};
_Static_assert(sizeof(struct mark) == 8, "struct mark");

#define MARK_CELLS 65536
#define MARK_SHIFT (64 - 16 - 3) /* the upper bits of a number that name a mark */

#define MARK_ENTERS 1 /* rows of ingress, by the destination's address */
#define MARK_FROM 2   /* rows UNDNAT, by the source */
#define MARK_TO 3     /* rows SNAT, by the destination */

BPF_TABLE("array", u32, struct mark, marks, MARK_CELLS);
BPF_TABLE("lru_hash", struct flow_key, struct flow, flows, MAX_FLOWS);
BPF_TABLE("lru_hash", struct fragment_key, struct fragment, fragments, MAX_FRAGMENTS);
BPF_TABLE("lru_hash", struct socket_key, struct socket_value, sockets, MAX_SOCKETS);
BPF_TABLE("lru_hash", struct affinity_key, struct affinity, affinity, MAX_CLIENTS);
BPF_TABLE("percpu_array", u32, struct hop, hops, HOP_CELLS);
BPF_TABLE("array", u32, u32, neighbours, NEIGHBOUR_CELLS);

/* ---- Counters: one cell for each thing worth counting, summed over CPUs by the reader ---- */

enum counter {
	SOCKET_FORWARDED,     /* connect or sendmsg was given a backend */
	SOCKET_REJECTED,      /* connect or sendmsg was refused: no endpoint */
	SOCKET_DROPPED,       /* connect or sendmsg fell under a silent verdict */
	SOCKET_NO_BACKEND,    /* a route named a backend that is not there; left alone */
	PACKET_FORWARDED,     /* a new flow was given a backend */
	PACKET_REJECTED_TCP,  /* a new flow was answered with RST */
	PACKET_REJECTED_ICMP, /* a new flow was answered with port unreachable */
	PACKET_REJECT_FAILED, /* no answer could be built; dropped */
	PACKET_DROPPED,       /* a new flow fell under a silent verdict */
	PACKET_NO_BACKEND,    /* a route named a backend that is not there; left alone */
	PACKET_NOT_NEW,       /* TCP, no SYN and no known flow; given a backend, or left alone by `flows_elsewhere` */
	PACKET_COLLISION,     /* the client's port was changed: its flow to another frontend has the same backend */
	PACKET_NO_PORT,       /* no free port for masquerade or collision; dropped */
	PACKET_NO_ADDRESS,    /* masquerade on a device without an address; dropped */
	PACKET_NO_ROOM,       /* a flow's rows could not be written; dropped */
	PACKET_OUT_OF_RANGE,  /* a new flow from outside the frontend's source ranges; dropped */
	PACKET_SCTP_PORT,     /* SCTP whose port would have to change, which its CRC forbids here; dropped */
	PACKET_TOO_SHORT,     /* ends inside a header; left alone */
	FRAGMENT_UNKNOWN,     /* a later fragment whose first has not been seen; left alone */
	ICMP_TRANSLATED,      /* an ICMP error about one of our flows */
	FLOW_STALE,           /* a flow was given a new backend: closed, idle too long, or its backend has gone */
	SOCKET_UNDEFINED,     /* connect or sendmsg to a port that a cluster IP does not have; refused */
	PACKET_UNDEFINED,     /* a new flow to a port that a cluster IP does not have; answered as a rejected one */
	CLIENT_KEPT,          /* a client went where it had gone before, by session affinity */
	XDP_FORWARDED,        /* a new flow was given a backend before the stack, and sent on from there */
	XDP_SENT,             /* a packet of a known flow was sent on before the stack; with its first, all of them */
	XDP_DROPPED,          /* a new flow fell under a silent verdict before the stack */
	XDP_LOCAL,            /* left to the stack: it leads to this node, or by a device that XDP does not send by */
	XDP_NO_NEIGHBOUR,     /* left to the stack: it must ask for a link-layer address first */
	XDP_TOO_LONG,         /* left to the stack: longer than the MTU of the device that it leaves by */
	XDP_NO_HOPS,          /* left to the stack: its TTL or hop limit ends here */
	XDP_OPTIONS,          /* left to the stack: IP options, extension headers or a fragment */
	AROUND_SENT,          /* a packet went from one pod to another around the stack */
	XDP_NO_ROUTE,         /* left to the stack: the FIB has no way that XDP could take */
	XDP_BY_STACK,         /* left to the stack, lest it never asks whether the neighbour is still there */
	COUNTERS
};

BPF_TABLE("percpu_array", u32, u64, counters, COUNTERS);

/*
 * What a Service port has carried, by its key in `names`. The programs make a row with the first packet, the control
 * plane removes it when the key is given up. Packets of the socket path are not seen, connections are.
 */
struct traffic {
	u64 connections;
	u64 packets; /* both ways */
	u64 bytes;   /* of those packets, from the link layer up */
};
_Static_assert(sizeof(struct traffic) == 24, "struct traffic");

BPF_F_TABLE("percpu_hash", u32, struct traffic, traffic, MAX_SERVICES, BPF_F_NO_PREALLOC);

#endif
