#!/bin/sh
# Says what the machine lacks, all of it at once. PYTHON and CXX come from the Makefile.
missing=0
lack() {
    echo "missing: $1" >&2
    missing=1
}

if ! command -v "$PYTHON" >/dev/null 2>&1; then
    lack "Python 3.11 or later ('$PYTHON' is not on the PATH; name another with: make PYTHON=python3.12 ...)"
elif ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    version=$("$PYTHON" -c 'import platform; print(platform.python_version())' 2>/dev/null || echo "not working")
    lack "Python 3.11 or later ('$PYTHON' is $version; name another with: make PYTHON=python3.12 ...)"
elif ! "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null; then
    lack "Python's venv module (Debian: apt-get install python3-venv)"
elif ! "$PYTHON" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))'; then
    lack "Python's headers (Debian: apt-get install python3-dev)"
fi

if ! command -v "$CXX" >/dev/null 2>&1; then
    lack "a C++20 compiler ('$CXX' is not on the PATH; Debian: apt-get install g++)"
elif ! echo 'int main() { return __cplusplus >= 202002L ? 0 : 1; }' | "$CXX" -std=c++20 -x c++ -fsyntax-only - 2>/dev/null; then
    lack "a compiler that knows C++20 ('$CXX' does not; g++ 11 or later does)"
fi

exit $missing
