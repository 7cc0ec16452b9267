/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Client and server of the socket benchmarks, small enough that what they measure is the kernel.
 *
 *   crr server PORT CPU                        echoes one byte, TCP and UDP, one TCP connection at a time
 *   crr MODE ADDRESS PORT SECONDS CPU          prints {"count": …, "seconds": …, "p50": ns, "p99": ns}
 *
 * MODE: crr connect, one byte there and back, close; con connect and close; rr one byte there and back over one
 * connection; udp the same over connected UDP; sendto over unconnected UDP. p50 and p99 are of connect() for crr and
 * con, of one round trip otherwise. Connections end by RST (SO_LINGER 0), so that no TIME_WAIT piles up. A client that
 * is not done PATIENCE seconds after its time is killed by its alarm.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_SAMPLES (1 << 20)
#define PATIENCE 5

static unsigned samples[MAX_SAMPLES];

static void die(const char *what)
{
	perror(what);
	exit(1);
}

/* On one CPU, and before whatever else wants it: what others do on the machine is not to be measured. */
static void pin(int cpu)
{
	cpu_set_t set;

	if (setpriority(PRIO_PROCESS, 0, -20))
		die("setpriority");

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		die("sched_setaffinity");
}

static unsigned long long now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void no_delay(int fd)
{
	int on = 1;

	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
}

static void server(int port)
{
	struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons(port), .sin6_addr = in6addr_any};
	struct pollfd ready[2] = {{.events = POLLIN}, {.events = POLLIN}};
	struct sockaddr_storage peer;
	socklen_t size;
	char byte[64];
	int on = 1, tcp = socket(AF_INET6, SOCK_STREAM, 0), udp = socket(AF_INET6, SOCK_DGRAM, 0);

	setsockopt(tcp, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (bind(tcp, (void *)&any, sizeof(any)) || bind(udp, (void *)&any, sizeof(any)) || listen(tcp, 1024))
		die("bind");
	ready[0].fd = tcp;
	ready[1].fd = udp;
	printf("ready\n");
	fflush(stdout);
	for (;;) {
		if (poll(ready, 2, -1) < 0)
			die("poll");
		if (ready[0].revents) {
			int fd = accept(tcp, 0, 0);

			if (fd >= 0) {
				no_delay(fd);
				while (read(fd, byte, 1) == 1 && write(fd, byte, 1) == 1)
					;
				close(fd);
			}
		}
		if (ready[1].revents) {
			size = sizeof(peer);
			if (recvfrom(udp, byte, sizeof(byte), 0, (void *)&peer, &size) > 0)
				sendto(udp, byte, 1, 0, (void *)&peer, size);
		}
	}
}

static int by_value(const void *a, const void *b)
{
	unsigned x = *(const unsigned *)a, y = *(const unsigned *)b;

	return x < y ? -1 : x > y;
}

int main(int argc, char **argv)
{
	struct linger reset = {.l_onoff = 1, .l_linger = 0};
	struct timeval patience = {.tv_sec = 2};
	struct addrinfo hints = {.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV}, *to;
	unsigned long long begin, end, before, after;
	unsigned long count = 0, kept;
	int crr, con, udp, sendto_mode, datagrams, fd = -1;
	char byte = 'x';

	if (argc == 4 && !strcmp(argv[1], "server")) {
		pin(atoi(argv[3]));
		server(atoi(argv[2]));
	}
	if (argc != 6)
		return 2;
	crr = !strcmp(argv[1], "crr");
	con = !strcmp(argv[1], "con");
	udp = !strcmp(argv[1], "udp");
	sendto_mode = !strcmp(argv[1], "sendto");
	datagrams = udp || sendto_mode;
	hints.ai_socktype = datagrams ? SOCK_DGRAM : SOCK_STREAM;
	if (getaddrinfo(argv[2], argv[3], &hints, &to))
		die("address");
	pin(atoi(argv[5]));
	alarm((unsigned)atof(argv[4]) + PATIENCE);

	if (!crr && !con) {
		fd = socket(to->ai_family, to->ai_socktype, 0);
		setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
		if (!sendto_mode && connect(fd, to->ai_addr, to->ai_addrlen))
			die("connect");
		if (!datagrams)
			no_delay(fd);
	}
	begin = now();
	end = begin + (unsigned long long)(atof(argv[4]) * 1e9);
	do {
		before = now();
		if (crr || con) {
			fd = socket(to->ai_family, SOCK_STREAM, 0);
			if (fd < 0 || connect(fd, to->ai_addr, to->ai_addrlen))
				die("connect");
			after = now();
			setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
			if (crr && (write(fd, &byte, 1) != 1 || read(fd, &byte, 1) != 1))
				die("request");
			close(fd);
		} else {
			if (sendto(fd, &byte, 1, 0, sendto_mode ? to->ai_addr : 0, sendto_mode ? to->ai_addrlen : 0) != 1)
				die("send");
			if (recv(fd, &byte, 1, 0) != 1)
				die("recv");
			after = now();
		}
		samples[count++ % MAX_SAMPLES] = (unsigned)(after - before);
	} while (now() < end);
	kept = count < MAX_SAMPLES ? count : MAX_SAMPLES;
	after = now();
	qsort(samples, kept, sizeof(*samples), by_value);
	printf("{\"count\": %lu, \"seconds\": %.6f, \"p50\": %u, \"p99\": %u}\n", count, (after - begin) / 1e9,
	       samples[kept / 2], samples[kept * 99 / 100]);
	return 0;
}
