"""Which C++ compiler this machine has."""

import os
import shlex
import shutil

CPP_COMPILERS = ("g++", "clang++", "c++")


def cpp_compiler() -> list[str]:
    """The command that compiles C++: that of the environment variable CXX, which may have options, or the first found.

    Raises FileNotFoundError if none is found, and ValueError for a CXX with an open quotation mark.
    """
    if named := shlex.split(os.environ.get("CXX", "")):
        return named
    for name in CPP_COMPILERS:
        if shutil.which(name):
            return [name]
    raise FileNotFoundError(f"there is no {' or '.join(CPP_COMPILERS)} here")
