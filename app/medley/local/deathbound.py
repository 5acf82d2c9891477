"""Replaces itself with a program that dies when its parent does. Run as a file, never imported.

It knows nothing but the standard library: it runs as `python -I -S deathbound.py` before every child. In
this order: leave root for good, ask the kernel for a signal at the parent's death (changing ids clears that
request), make sure that the parent has not died meanwhile, exec.

Usage: deathbound.py PARENT_PID SIGNAL UID:GID|- PROGRAM [ARGUMENT ...]
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, death_signal, account = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    if account != "-":
        uid, gid = (int(part) for part in account.split(":"))
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
        os.umask(0o077)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(death_signal), 0, 0, 0) != 0:
        sys.exit(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    os.execv(sys.argv[4], sys.argv[4:])


if __name__ == "__main__":
    main()
