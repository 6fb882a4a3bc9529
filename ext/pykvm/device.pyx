# cython: language_level=3, embedsignature=True, auto_pickle=False, autotestdict=False
"""The C-level device interface: devices that KVM's run loop serves without the GIL.

A subclass in Cython overrides `c_read` and `c_write` (see ``pykvm/device.pxd`` and docs/c-devices.md).
It is an ordinary `pykvm.Device` too: on the emulator the same C methods are called through `read` and
`write`.
"""
from libc.stdint cimport uint32_t, uint64_t


cdef class CDevice:
    """Base class of devices written in Cython. Attach it like any other device."""

    cdef int c_read(self, uint64_t offset, uint32_t size, uint64_t *value) noexcept nogil:
        return -1

    cdef int c_write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        return -1

    def read(self, offset: int, size: int) -> int:
        """The value at `offset`; all ones where the C method does not serve it."""
        cdef uint64_t value = 0
        if self.c_read(offset, size, &value) != 0:
            return (1 << (8 * size)) - 1
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Write `value` at `offset`; ignored where the C method does not serve it."""
        self.c_write(offset, size, value)
