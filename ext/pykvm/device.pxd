# The C-level device interface: a device whose accesses are served inside KVM's run loop, with no GIL.
#
#     from pykvm.device cimport CDevice
#
#     cdef class Counter(CDevice):
#         cdef uint64_t n
#         cdef int c_read(self, uint64_t offset, uint32_t size, uint64_t *value) noexcept nogil:
#             self.n += 1
#             value[0] = self.n
#             return 0
from libc.stdint cimport uint32_t, uint64_t

cdef class CDevice:
    # Both return 0 when they have served the access, and anything else to hand it to the Python
    # methods `read` and `write` of a subclass. Offsets, sizes and values are as in
    # pykvm.interfaces.Device. They run on whichever thread runs the vCPU; with several vCPUs
    # they may run at the same time: shared state needs atomics or a lock of its own.
    cdef int c_read(self, uint64_t offset, uint32_t size, uint64_t *value) noexcept nogil
    cdef int c_write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil
