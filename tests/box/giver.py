"""Makes sockets on behalf of the tests: runs in a node's cgroup, and enters the namespace that each one is for.

A socket belongs for good to the namespace and the cgroup in which it was made, whoever uses it then. So the tests drive
clients and servers everywhere from one process, and what the kernel sees is a pod's socket all the same. Run with the
number of a SOCK_SEQPACKET descriptor; a request is "<namespace file> <family> <type>". Two messages answer it: the
socket, and one by which it is closed here: before that, its new owner's close would end no connection.
"""

import ctypes
import os
import socket
import sys

libc = ctypes.CDLL(None, use_errno=True)


def enter(path: str) -> None:
    namespace = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    if libc.setns(namespace, 0x40000000):
        raise OSError(ctypes.get_errno(), f"setns {path}")
    os.close(namespace)


home = f"/proc/{os.getpid()}/fd/{os.open('/proc/self/ns/net', os.O_RDONLY | os.O_CLOEXEC)}"
channel = socket.socket(fileno=int(sys.argv[1]))
while request := channel.recv(4096).decode():
    path, family, kind = request.split()
    enter(path)
    made = socket.socket(int(family), int(kind))
    enter(home)  # a pod's namespace is removed with all that runs in it
    socket.send_fds(channel, [b"."], [made.fileno()])
    made.close()
    channel.send(b".")
