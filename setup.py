"""Builds the Cython extension, optionally: without a compiler or <linux/kvm.h> the rest installs."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension("pykvm.device", ["ext/pykvm/device.pyx"], include_dirs=["ext"], optional=True),
        Extension("pykvm._kvm", ["ext/pykvm/_kvm.pyx"], include_dirs=["ext"], optional=True),
    ]
)
