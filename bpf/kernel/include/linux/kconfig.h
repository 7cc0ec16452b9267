/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Stands in for a kernel tree's kconfig.h, which BCC includes before everything else. It gives what BCC's own headers
 * and ours take for granted of kernel-internal headers, and nothing more: our programs use the UAPI only.
 */
#ifndef EBPFLB_KERNEL_KCONFIG_H
#define EBPFLB_KERNEL_KCONFIG_H

#define CONFIG_BPF_SYSCALL 1

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char s8;
typedef short s16;
typedef int s32;
typedef long long s64;
typedef unsigned long size_t;
typedef unsigned long uintptr_t;
typedef _Bool bool;

#endif
