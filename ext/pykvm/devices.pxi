# Devices as the run loop calls them: which answers an access, its lock, its methods.
#
# Whatever executes once after an exit is cold in the processor's caches and costs several times what it costs in
# a loop. So the loop does not go through the VM's buses: they hand it their ranges, and it calls devices itself.

cdef extern from "Python.h":
    uint64_t PyLong_AsUnsignedLongLongMask(object) except? 0xFFFF_FFFF_FFFF_FFFF


cdef enum:
    FREE = 0
    HANDED_OVER = 0xFFFF_FFFF  # more threads than that are never made


@cython.final
cdef class DeviceLock:
    """A re-entrant lock like `threading.RLock`, which the run loop takes without a call of any function.

    All of it is guarded by the GIL. Who has to wait queues up, and gets it before whoever comes later.
    """

    cdef object __weakref__
    cdef unsigned long owner  # a thread, by its number; or FREE, or HANDED_OVER to one who has waited
    cdef unsigned long depth  # how often its owner has taken it
    cdef list queue  # of those who wait: a lock each, which is released to wake them

    def __cinit__(self):
        self.queue = []

    def __enter__(self) -> None:
        self.take()

    def __exit__(self, kind, error, trace, /) -> None:
        self.give_back()

    cdef inline int take(self) except -1:
        cdef unsigned long thread = pykvm_this_thread()
        if self.owner != thread:
            if self.owner != FREE:
                self.wait()
            self.owner = thread
        self.depth += 1
        return 0

    cdef inline int give_back(self) except -1:
        if self.owner != pykvm_this_thread():
            raise RuntimeError("a device's lock is given back by a thread that does not hold it")
        self.depth -= 1
        if self.depth == 0:
            self.hand_over()
        return 0

    cdef inline int hand_over(self) except -1:
        self.owner = FREE
        if self.queue:
            self.owner = HANDED_OVER
            self.queue.pop(0).release()
        return 0

    cdef int wait(self) except -1:
        """Wait until it is handed over. Python's signal handlers run meanwhile; what they raise ends the wait."""
        gate = allocate_lock()
        gate.acquire()
        self.queue.append(gate)
        try:
            gate.acquire()
        except BaseException:
            if gate in self.queue:
                self.queue.remove(gate)
            else:  # it was handed over at the same time
                self.hand_over()
            raise
        return 0


@cython.final
@cython.internal
cdef class Handler:
    """A device written in Python at a range: its bound methods, and the lock to hold during a call."""

    cdef object attachment, read_method, write_method
    cdef DeviceLock lock

    def __cinit__(self, attachment, DeviceLock lock not None):
        self.attachment = attachment
        self.read_method = attachment.device.read
        self.write_method = attachment.device.write
        self.lock = lock

    cdef int write(self, uint64_t offset, uint32_t size, uint64_t value) except -1:
        self.lock.take()
        try:
            self.write_method(offset, size, value)
        finally:
            self.lock.give_back()
        return 0

    cdef int read(self, uint64_t offset, uint32_t size, uint64_t *value) except -1:
        self.lock.take()
        try:
            answer = self.read_method(offset, size)
        finally:
            self.lock.give_back()
        value[0] = PyLong_AsUnsignedLongLongMask(answer if type(answer) is int else self.integer(answer))
        return 0

    cdef object integer(self, answer):
        """Accept what Python accepts as an index: int, bool, NumPy integers."""
        try:
            return as_integer(answer)
        except TypeError:
            raise TypeError(f"{self.attachment}: read returned {answer!r}, not an integer") from None


cdef struct Range:
    uint64_t first
    uint64_t last
    void *device  # a CDevice, or NULL
    void *handler  # a Handler, or NULL: a lock of another kind is for the bus to take


@cython.final
@cython.internal
cdef class Ranges:
    """The ranges of one address space that the run loop serves, by address.

    Never changed, so that a running vCPU reads it with no lock.
    """

    cdef Range *ranges
    cdef size_t count
    cdef list keep  # what the pointers in `ranges` point to

    def __cinit__(self, entries=()):
        cdef list wanted = list(entries)
        cdef Range *target
        self.keep = []
        self.ranges = <Range *>calloc(len(wanted) + 1, sizeof(Range))
        if self.ranges == NULL:
            raise MemoryError
        end = 0
        for attachment, lock in wanted:
            if attachment.size <= 0 or attachment.address < end or attachment.end > 1 << 64:
                raise ConfigurationError(f"{attachment}: a range is not empty and comes after the one before it")
            end = attachment.end
            handler = Handler(attachment, lock) if isinstance(lock, DeviceLock) else None
            target = &self.ranges[self.count]
            target.first = attachment.address
            target.last = end - 1
            target.device = <void *>attachment.device if isinstance(attachment.device, CDevice) else NULL
            target.handler = <void *>handler if handler is not None else NULL
            self.keep.append((attachment, handler))
            self.count += 1

    def __dealloc__(self):
        free(self.ranges)

    cdef Range *find(self, uint64_t address, uint32_t size) noexcept nogil:
        """The range that holds all of the access, or NULL. Valid for as long as this object lives."""
        cdef size_t low = 0, high = self.count, middle
        cdef Range *found
        while low < high:
            middle = (low + high) // 2
            found = &self.ranges[middle]
            if address < found.first:
                high = middle
            elif address > found.last:
                low = middle + 1
            else:
                return found if size - 1 <= found.last - address else NULL
        return NULL
