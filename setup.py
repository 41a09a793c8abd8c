"""Builds the kernels for live weights where there is a C++ compiler; all else is in setup.cfg."""

import importlib.util
import pathlib

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError


class BuildKernels(build_ext):
    """A library that ctypes loads; its name tells Python that it is no module."""

    def get_ext_filename(self, fullname):
        *folders, name = fullname.split(".")
        return str(pathlib.Path(*folders, f"{name}.kernels"))

    def get_export_symbols(self, ext):
        return []

    def build_extension(self, ext):
        jaxlib = importlib.util.find_spec("jaxlib")
        if jaxlib is None:
            raise CompileError("jaxlib is not here, and the kernels need its headers")
        (folder,) = jaxlib.submodule_search_locations
        ext.include_dirs.append(str(pathlib.Path(folder, "include")))
        super().build_extension(ext)


class PlatformWheel(bdist_wheel):
    """For any Python 3 of one platform."""

    def get_tag(self):
        *_, platform = super().get_tag()
        return "py3", "none", platform


setup(
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
    ext_modules=[
        Extension(
            "granet_jax.compact.native",
            ["granet_jax/compact/native.cc", "granet_jax/compact/convolutions.cc"],
            depends=["granet_jax/compact/native.h"],
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-Wno-psabi"],
            language="c++",
            optional=True,
        )
    ],
)
