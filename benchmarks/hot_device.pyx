# cython: language_level=3
"""A device served in C, for benchmarks/exits.py: counts accesses, adds up what is written."""

from libc.stdint cimport uint32_t, uint64_t

from pykvm.device cimport CDevice


cdef class HotDevice(CDevice):
    cdef readonly uint64_t served
    cdef readonly uint64_t total

    cdef int c_read(self, uint64_t offset, uint32_t size, uint64_t *value) noexcept nogil:
        self.served += 1
        value[0] = self.served
        return 0

    cdef int c_write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        self.served += 1
        self.total += value
        return 0
