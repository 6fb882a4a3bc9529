"""Builds the Cython extension, optionally: without a compiler or <linux/kvm.h> the rest installs."""

from glob import glob

from setuptools import Extension, setup


def extension(name: str, **options: object) -> Extension:
    source = f"ext/{name.replace('.', '/')}.pyx"
    depends = glob("ext/pykvm/*.px[id]")
    return Extension(name, [source], include_dirs=["ext"], depends=depends, optional=True, **options)


setup(ext_modules=[extension("pykvm.device"), extension("pykvm._kvm")])
