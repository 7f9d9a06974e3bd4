// Memory that a thread keeps from call to call, so that kernels allocate nothing once they have run.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace {

class Scratch {
  public:
    ~Scratch() { std::free(data_); }

    // Room for `count` elements, in which nothing is left of before; aligned to a cache line.
    template <class E>
    E* get(int64_t count) {
        auto bytes = (static_cast<size_t>(count) * sizeof(E) + 4095) / 4096 * 4096;
        if (bytes > size_) {
            std::free(data_);
            data_ = std::aligned_alloc(4096, bytes);
            size_ = data_ ? bytes : 0;
            if (!data_) {  // in the middle of a step, on any thread: there is nobody to tell
                std::fprintf(stderr, "distkv: no memory for %zu bytes that a kernel works in\n", bytes);
                std::abort();
            }
        }
        return static_cast<E*>(data_);
    }

  private:
    void* data_ = nullptr;
    size_t size_ = 0;
};

}  // namespace
