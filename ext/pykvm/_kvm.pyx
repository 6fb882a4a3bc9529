# cython: language_level=3, embedsignature=True, auto_pickle=False, autotestdict=False
"""The KVM API, one class per kind of file descriptor: System, Vm, Vcpu, DeviceFd.

This layer is thin: a method per ioctl, under the ioctl's kernel name, that checks its result.
Structures cross as frozen dataclasses, or as bytes where Linux calls them opaque. Policy lives
above it, in `pykvm.kvm.backend`. Reference: Linux Documentation/virt/kvm/api.rst, "KVM API".

Every call but `Vcpu.run` holds the GIL. That is what makes them safe against `close` in another
thread: a descriptor is never closed between the test and the ioctl. Ioctls are short; the one that
is not, KVM_RUN, is protected by `Vcpu.begin` and `Vcpu.finish`. The same GIL orders a run against
`kick` and guards the tables of slots and devices, so this module does not declare
`freethreading_compatible`: a free-threaded Python that imports it switches its GIL on, as it must.
"""
cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from cpython.weakref cimport PyWeakref_NewRef
from libc.errno cimport E2BIG, EAGAIN, EBADF, EFAULT, EINTR, EINVAL, ENOENT, ENOTTY, ENXIO, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.unistd cimport close as c_close

from pykvm._abi cimport *
from pykvm.device cimport CDevice

from _thread import allocate_lock
from operator import index as as_integer

from pykvm.errors import ConfigurationError, KvmError
from pykvm.exits import Debug, EmulationFailure, Halt, Interrupted, Shutdown, Unhandled
from pykvm.registers import DescriptorTable, Registers, Segment, SystemRegisters

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)

cdef extern from "<fcntl.h>" nogil:
    int c_open "open"(const char *path, int flags)
    int O_RDWR, O_CLOEXEC

cdef extern from "<unistd.h>" nogil:
    long sysconf(int name)
    int _SC_PAGESIZE

cdef extern from "<pthread.h>" nogil:
    ctypedef unsigned long pthread_t
    pthread_t pthread_self()
    int pthread_kill(pthread_t, int)
    int pthread_equal(pthread_t, pthread_t)

cdef enum:
    MEM_READONLY = 2
    CAP_SPLIT_IRQCHIP = 121
    CAP_DIRTY_LOG_RING_ACQ_REL = 223
    PAYLOAD_ROOM = 4096  # bytes, more than any attribute of a device has


cdef int fail(const char *request, int error, str detail="") except -1:
    raise KvmError(request.decode("ascii"), error, detail)


cdef inline int check(int rc, const char *request) except -1:
    """Every ioctl's result goes through here."""
    if rc < 0:
        fail(request, errno)
    return rc


cdef class Fd:
    """Owner of one file descriptor of KVM. Collecting it as garbage closes it."""

    cdef int fd

    def __cinit__(self, *args):
        self.fd = -1

    def __del__(self):
        self.close()

    def fileno(self) -> int:
        """The descriptor, or -1 when closed."""
        return self.fd

    def close(self) -> None:
        """Close the descriptor. May be called twice, in any order, from any thread."""
        cdef int fd = self.fd
        self.fd = -1  # first: from here on nobody else uses or closes it
        if fd >= 0:
            with nogil:  # the end of a VM takes its time
                c_close(fd)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def __repr__(self):
        state = f"fd {self.fd}" if self.fd >= 0 else "closed"
        return f"<{type(self).__name__} {state}>"


cdef class DeviceFd(Fd):
    """A device inside KVM (KVM_CREATE_DEVICE), driven by attributes (KVM API 4.80)."""

    def __init__(self) -> None:
        raise TypeError("a DeviceFd is made by Vm.create_device()")

    def set_device_attr(self, uint32_t group, uint64_t attr, value: bytes) -> None:
        """Write an attribute; `value` is its payload in the layout that the device documents."""
        set_device_attr(self.fd, group, attr, value)

    def get_device_attr(self, uint32_t group, uint64_t attr, Py_ssize_t size) -> bytes:
        """Read an attribute of `size` bytes."""
        return get_device_attr(self.fd, group, attr, size)

    def has_device_attr(self, uint32_t group, uint64_t attr) -> bool:
        """Whether the device has this attribute."""
        return has_device_attr(self.fd, group, attr)


# KVM reads and writes as many bytes as the attribute has, whatever the caller says: there is room for all.

cdef int set_device_attr(int fd, uint32_t group, uint64_t attr, bytes value) except -1:
    cdef kvm_device_attr arg
    cdef Block payload = Block(max(len(value), PAYLOAD_ROOM))
    memcpy(payload.data, PyBytes_AS_STRING(value), len(value))
    memset(&arg, 0, sizeof(arg))
    arg.group = group
    arg.attr = attr
    arg.addr = <uintptr_t>payload.data  # SAFETY: payload lives until the ioctl is done
    return check(ioctl(fd, KVM_SET_DEVICE_ATTR, &arg), "KVM_SET_DEVICE_ATTR")


cdef bytes get_device_attr(int fd, uint32_t group, uint64_t attr, Py_ssize_t size):
    cdef kvm_device_attr arg
    cdef Block payload
    if size < 0:
        raise ConfigurationError(f"an attribute of {size} bytes")
    payload = Block(max(size, PAYLOAD_ROOM))
    memset(&arg, 0, sizeof(arg))
    arg.group = group
    arg.attr = attr
    arg.addr = <uintptr_t>payload.data  # SAFETY: payload lives until the ioctl is done
    check(ioctl(fd, KVM_GET_DEVICE_ATTR, &arg), "KVM_GET_DEVICE_ATTR")
    return raw(payload.data, size)


cdef bint has_device_attr(int fd, uint32_t group, uint64_t attr) except *:
    cdef kvm_device_attr arg
    memset(&arg, 0, sizeof(arg))
    arg.group = group
    arg.attr = attr
    if ioctl(fd, KVM_HAS_DEVICE_ATTR, &arg) == 0:
        return True
    if errno in (ENXIO, ENOENT, EINVAL, ENOTTY):
        return False
    return check(-1, "KVM_HAS_DEVICE_ATTR")


cdef int enable_cap(int fd, uint32_t cap, uint32_t flags, tuple args) except -1:
    cdef kvm_enable_cap arg
    if len(args) > 4:
        raise ConfigurationError(f"a capability has at most 4 arguments, not {len(args)}")
    memset(&arg, 0, sizeof(arg))
    arg.cap = cap
    arg.flags = flags
    for i, value in enumerate(args):
        arg.args[i] = value
    return check(ioctl(fd, KVM_ENABLE_CAP, &arg), "KVM_ENABLE_CAP")


@cython.internal
cdef class Block:
    """A zeroed C structure with a variable-length tail, freed with its owner."""

    cdef void *data

    def __cinit__(self, size_t size):
        self.data = calloc(1, size)
        if self.data == NULL:
            raise MemoryError(size)

    def __dealloc__(self):
        free(self.data)


include "convert.pxi"
include "system.pxi"
include "devices.pxi"
include "vm.pxi"
include "vcpu.pxi"
include "run.pxi"
