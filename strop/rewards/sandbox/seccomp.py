"""The system calls that a box may make: what Python needs to compute and to use its own /tmp, and nothing else."""

from __future__ import annotations

import errno
import tempfile

_CLONE_THREAD = 0x00010000

_ALLOWED = """
    read write readv writev pread64 pwrite64 preadv pwritev lseek close close_range dup dup2 dup3 fcntl pipe pipe2
    open openat creat access faccessat faccessat2 stat lstat fstat newfstatat statx statfs fstatfs getcwd chdir fchdir
    readlink readlinkat getdents getdents64 mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 symlink
    symlinkat link linkat truncate ftruncate fsync fdatasync utimensat chmod fchmod fchmodat umask flock sendfile
    copy_file_range fadvise64
    mmap mprotect munmap mremap madvise brk mincore msync
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigsuspend sigaltstack tgkill alarm setitimer getitimer
    restart_syscall pause
    getpid gettid getppid getuid geteuid getgid getegid getgroups getresuid getresgid getpgrp getpgid getsid
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times getrusage getrlimit sysinfo uname
    getrandom sched_yield sched_getaffinity getcpu getpriority
    futex set_robust_list get_robust_list set_tid_address rseq membarrier arch_prctl
    poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait eventfd2
    recvfrom shutdown
    execve exit exit_group wait4
"""
"""Anything else gives EPERM: no socket, no fork, no mount, no namespace, no key ring, no io_uring, no shared memory."""

_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX."""


def seccomp_filter() -> bytes:
    """The filter as BPF, for bwrap --seccomp. Raises ImportError when pyseccomp or libseccomp is missing."""
    try:
        import pyseccomp as seccomp
    except (ImportError, RuntimeError) as error:
        raise ImportError(f"the sandbox needs pyseccomp and libseccomp ({error}): pip install 'strop[code]'") from None

    rules = seccomp.SyscallFilter(seccomp.ERRNO(errno.EPERM))
    for name in _ALLOWED.split():
        if seccomp.resolve_syscall(seccomp.Arch.NATIVE, name) >= 0:  # some exist on one architecture only
            rules.add_rule(seccomp.ALLOW, name)
    for number in _IOCTLS:
        rules.add_rule(seccomp.ALLOW, "ioctl", seccomp.Arg(1, seccomp.EQ, number))
    # Threads, not processes. glibc tries clone3 first, whose flags a filter cannot see.
    rules.add_rule(seccomp.ALLOW, "clone", seccomp.Arg(0, seccomp.MASKED_EQ, _CLONE_THREAD, _CLONE_THREAD))
    rules.add_rule(seccomp.ERRNO(errno.ENOSYS), "clone3")
    # The pair that asyncio wakes itself with; without an address nothing else can be reached through it.
    rules.add_rule(seccomp.ALLOW, "socketpair")
    rules.add_rule(seccomp.ALLOW, "sendto", seccomp.Arg(4, seccomp.EQ, 0))
    rules.add_rule(seccomp.ALLOW, "prlimit64", seccomp.Arg(0, seccomp.EQ, 0))
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()
