// Collectives of the ranks of one machine, in memory that they share.
//
// A rank lays what it has into its slot, says so, waits until all have, and reads. Slots come in two sets that take
// turns: who has met the others a second time knows that all have read what was laid down the first time.
#pragma once

#include <sched.h>
#include <unistd.h>

#include <atomic>

#include "tokens.hpp"

namespace {

constexpr int64_t MOST_RANKS = 64;

// The shared memory: zeros at first; the slots `[2][ranks][capacity]` begin at `SLOTS`.
struct Meeting {
    struct alignas(64) Count {
        std::atomic<uint64_t> value;
    };
    Count met[MOST_RANKS];  // how often each rank has laid something down
};
constexpr int64_t SLOTS = 8192;
static_assert(sizeof(Meeting) <= SLOTS / 2 && std::atomic<uint64_t>::is_always_lock_free);

struct Ranks {
    Meeting* meeting;
    int64_t capacity;  // of a slot, in bytes
    int rank, size;

    // This rank's slot for what comes next.
    char* own() const { return slot(meeting->met[rank].value.load(std::memory_order_relaxed), rank); }

    // Those of all ranks, once they are filled: how to find one.
    auto meet() const {
        uint64_t number = meeting->met[rank].value.load(std::memory_order_relaxed);
        meeting->met[rank].value.store(number + 1, std::memory_order_release);
        for (int r = 0; r < size; ++r) await(meeting->met[r].value, number + 1);
        return [this, number](int r) { return slot(number, r); };
    }

  private:
    char* slot(uint64_t number, int r) const {
        return reinterpret_cast<char*>(meeting) + SLOTS + (number % 2 * size + r) * capacity;
    }

    // Ranks that compute alike come within microseconds; one that reads from a disk may take long.
    static void await(const std::atomic<uint64_t>& count, uint64_t number) {
        for (int64_t tries = 0; count.load(std::memory_order_acquire) < number; ++tries) {
            if (tries < 300)
                _mm_pause();
            else if (tries < 3000)
                sched_yield();
            else
                usleep(50);
        }
    }
};

// x = the sum of x over the ranks, in fp32 and in their order, rounded once.
template <class T>
void all_reduce(Ranks ranks, T* x, int64_t count, int num_threads) {
    int64_t step = ranks.capacity / int64_t(sizeof(T)) / LANES * LANES;
    for (int64_t done = 0; done < count; done += step, x += step) {
        int64_t here = std::min(step, count - done);
        std::memcpy(static_cast<void*>(ranks.own()), x, sizeof(T) * here);
        auto slot = ranks.meet();
#pragma omp parallel for schedule(static) num_threads(threads_for(here, num_threads))
        for (int64_t i = 0; i < here; i += LANES) {
            int lanes = static_cast<int>(std::min<int64_t>(LANES, here - i));
            auto part = [&](int r) { return load(reinterpret_cast<const T*>(slot(r)) + i, lanes); };
            Vec total = part(0);
            for (int r = 1; r < ranks.size; ++r) total = total + part(r);
            store(x + i, total, lanes);
        }
    }
}

// Lays the ranks' x side by side into `parts [ranks][bytes]`, where that is wanted.
inline void gather(Ranks ranks, const char* x, int64_t bytes, char* parts) {
    for (int64_t done = 0; done < bytes; done += ranks.capacity) {
        int64_t here = std::min(ranks.capacity, bytes - done);
        std::memcpy(ranks.own(), x + done, here);
        auto slot = ranks.meet();
        for (int r = 0; parts && r < ranks.size; ++r) std::memcpy(parts + r * bytes + done, slot(r), here);
    }
}

}  // namespace
