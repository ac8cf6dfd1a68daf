// What a sanitizer must report, or its silence means nothing: a data race, a read after free and an overflow.
#include <thread>

extern "C" int race(int rounds) {
  int shared = 0;
  const auto work = [&shared, rounds] {
    for (int round = 0; round < rounds; ++round) ++shared;
  };
  std::thread one(work);
  std::thread two(work);
  one.join();
  two.join();
  return shared;
}

extern "C" int overflow(int value) {
  return value + value;
}

extern "C" int after_free(int value) {
  volatile int* freed = new int(value);
  delete freed;
  return *freed;
}
