// Forks of this process, as the child learns of them.
#pragma once

#include <cstdint>

namespace mimo_ext::comm {

/// How often this process has been forked off, counted from the first call in its line of ancestors. What was made
/// under another number belongs to the parent: its threads do not exist here, its mutexes may be locked for ever, and
/// its connections are the parent's.
std::uint64_t fork_generation();

}  // namespace mimo_ext::comm
