#!/bin/sh
# The C++ tests need GoogleTest. Installs Debian's package where that is possible, else says how and fails: never a silent skip.
has_gtest() {
    echo '#include <gtest/gtest.h>' | "${CXX:-g++}" -std=c++20 -x c++ -fsyntax-only - 2>/dev/null
}

has_gtest && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "== installing libgtest-dev"
    { apt-get install -y -qq libgtest-dev || { apt-get update -qq && apt-get install -y -qq libgtest-dev; }; } >/dev/null 2>&1
    has_gtest && exit 0
fi
echo "missing: GoogleTest, for the C++ tests. Install it with:  sudo apt-get install libgtest-dev" >&2
exit 1
