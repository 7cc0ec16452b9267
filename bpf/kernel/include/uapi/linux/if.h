/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What linux/icmp.h needs of it; the real one asks for the C library's sys/socket.h. */
#ifndef EBPFLB_KERNEL_IF_H
#define EBPFLB_KERNEL_IF_H

#define IFNAMSIZ 16

#endif
