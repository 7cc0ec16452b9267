/*
 * What BCC adds to a program, as far as bpf/ uses it, for a compiler that is not BCC: tables and helpers by their types
 * alone. With it `clang -fsyntax-only` checks each file of bpf/, with all warnings, with no root and no kernel.
 */
#ifndef EBPFLB_BCC_SHIM_H
#define EBPFLB_BCC_SHIM_H

#include <linux/bpf.h>

#define BPF_F_TABLE(kind, key_type, leaf_type, table, entries, flags)                                                  \
	struct {                                                                                                       \
		leaf_type *(*lookup)(const key_type *);                                                                \
		leaf_type *(*lookup_or_try_init)(const key_type *, const leaf_type *);                                 \
		int (*update)(const key_type *, const leaf_type *);                                                    \
		int (*insert)(const key_type *, const leaf_type *);                                                    \
		int (*delete)(const key_type *);                                                                       \
		char entries_are_positive[(entries) > 0 ? 1 : -1];                                                     \
	} table;                                                                                                       \
	_Static_assert(sizeof(kind) > 1, "the kind of a table is a string")
#define BPF_TABLE(kind, key_type, leaf_type, table, entries) BPF_F_TABLE(kind, key_type, leaf_type, table, entries, 0)

u32 bpf_get_prandom_u32(void);
u64 bpf_jiffies64(void);
u64 bpf_get_netns_cookie(void *context);
u64 bpf_get_socket_cookie(void *context);
int bpf_set_retval(int value);
s64 bpf_csum_diff(const void *from, u32 from_size, const void *to, u32 to_size, u32 seed);
int bpf_l4_csum_replace(struct __sk_buff *skb, u32 offset, u64 from, u64 to, u64 flags);
int bpf_l3_csum_replace(struct __sk_buff *skb, u32 offset, u64 from, u64 to, u64 size);
int bpf_skb_load_bytes(const void *skb, u32 offset, void *to, u32 length);
int bpf_skb_store_bytes(struct __sk_buff *skb, u32 offset, const void *from, u32 length, u64 flags);
int bpf_skb_pull_data(struct __sk_buff *skb, u32 length);
int bpf_skb_change_tail(struct __sk_buff *skb, u32 length, u64 flags);
int bpf_skb_adjust_room(struct __sk_buff *skb, s32 difference, u32 mode, u64 flags);
int bpf_redirect(u32 device, u64 flags);
long bpf_redirect_peer(u32 device, u64 flags);
u64 bpf_xdp_get_buff_len(struct xdp_md *context);
int bpf_skb_load_bytes_relative(void *context, u32 offset, void *to, u32 size, u32 start);
long bpf_skb_change_head(struct __sk_buff *skb, u32 size, u64 flags);
struct bpf_sock *bpf_skc_lookup_tcp(void *context, struct bpf_sock_tuple *tuple, u32 size, u64 netns, u64 flags);
struct bpf_sock *bpf_sk_lookup_udp(void *context, struct bpf_sock_tuple *tuple, u32 size, u64 netns, u64 flags);
long bpf_fib_lookup(void *context, struct bpf_fib_lookup *params, int size, u32 flags);
int bpf_sk_release(void *socket);

#endif
