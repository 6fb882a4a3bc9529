"""Builds the Cython extension, optionally: without a compiler or <linux/kvm.h> the rest installs.

Everything else about the package is in pyproject.toml. Set PYKVM_REQUIRE_EXTENSION=1 to make a
failed build of the extension an error.
"""

from __future__ import annotations

import os
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# What other people's Cython may `cimport`. An empty __init__.pxd makes the package visible to Cython.
PUBLIC_DECLARATIONS = ("ext/pykvm/__init__.pxd", "ext/pykvm/device.pxd")

NOT_BUILT = """\
pykvm: {name} was not built: there will be no kvm backend, but the emulator backend works without it.
pykvm: it needs a C compiler, Python.h and <linux/kvm.h> (Debian: apt-get install gcc libc6-dev python3-dev).
"""


class BuildExtension(build_ext):
    """The usual build, which also installs the public declarations and says when it has failed."""

    def run(self) -> None:
        # In the package's source directory for an editable install, else in the build directory.
        package = Path(self.get_ext_fullpath("pykvm.device")).parent
        self.mkpath(str(package))
        for declaration in PUBLIC_DECLARATIONS:
            self.copy_file(declaration, str(package))
        super().run()

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception:
            # An older build must not be packaged in its place.
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            sys.stderr.write(NOT_BUILT.format(name=ext.name))
            raise


def extension(name: str) -> Extension:
    return Extension(
        name,
        [f"ext/{name.replace('.', '/')}.pyx"],
        include_dirs=["ext"],
        depends=glob("ext/pykvm/*.px[id]"),
        optional=os.environ.get("PYKVM_REQUIRE_EXTENSION") != "1",
    )


setup(
    cmdclass={"build_ext": BuildExtension},
    ext_modules=[extension("pykvm.device"), extension("pykvm._kvm")],
)
