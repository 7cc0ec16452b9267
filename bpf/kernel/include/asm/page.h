/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Empty: BCC's helpers include it by name and use nothing of it. */
