# The extension pykvm.device (ext/pykvm/device.pyx). What a subclass in Cython sees is in device.pxd.

from typing_extensions import disjoint_base

@disjoint_base
class CDevice:
    def read(self, offset: int, size: int) -> int: ...
    def write(self, offset: int, size: int, value: int) -> None: ...
