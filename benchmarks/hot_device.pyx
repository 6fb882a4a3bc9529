# cython: language_level=3
"""A device served in C, for benchmarks/exits.py: a write sets its value, a read returns it."""

from libc.stdint cimport uint32_t, uint64_t

from pykvm.device cimport CDevice


cdef class HotLatch(CDevice):
    cdef uint64_t value

    cdef int c_read(self, uint64_t offset, uint32_t size, uint64_t *value) noexcept nogil:
        value[0] = self.value
        return 0

    cdef int c_write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        self.value = value
        return 0
