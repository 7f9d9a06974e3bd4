// Collectives of the ranks of one machine, in memory that they share.
//
// A rank lays what it has into its slot, says so, waits until all have, and reads. Slots come in two sets that take
// turns: who has met the others a second time knows that all have read what was laid down the first time.
#pragma once

#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>

#include "tokens.hpp"

namespace {

constexpr int64_t MOST_RANKS = 64;

// The shared memory: zeros at first; the slots `[2][ranks][capacity]` begin at `SLOTS`.
struct Meeting {
    struct alignas(64) Rank {
        std::atomic<uint64_t> met;      // how often it has laid something down
        std::atomic<int64_t> bytes[2];  // of what it has laid into the slot of either set
        std::atomic<int64_t> process;
    };
    Rank ranks[MOST_RANKS];
};
constexpr int64_t SLOTS = 8192;
static_assert(sizeof(Meeting) <= SLOTS / 2 && std::atomic<uint64_t>::is_always_lock_free);

// How a meeting ends, but for the number of a rank whose process is gone.
constexpr int MET = -1, SIZES_DIFFER = -2;

struct Ranks {
    Meeting* meeting;
    int64_t capacity;  // of a slot, in bytes
    int rank, size;

    // Which meeting comes next.
    uint64_t number() const { return meeting->ranks[rank].met.load(std::memory_order_relaxed); }

    char* slot(uint64_t number, int r) const {
        return reinterpret_cast<char*>(meeting) + SLOTS + (number % 2 * size + r) * capacity;
    }

    // Tells the others that so many bytes lie in this rank's slot, and waits for theirs.
    int meet(uint64_t number, int64_t bytes) const {
        auto& own = meeting->ranks[rank];
        own.bytes[number % 2].store(bytes, std::memory_order_relaxed);
        own.process.store(getpid(), std::memory_order_relaxed);
        own.met.store(number + 1, std::memory_order_release);
        for (int r = 0; r < size; ++r)
            if (!await(meeting->ranks[r], number + 1)) return r;
        for (int r = 0; r < size; ++r)
            if (meeting->ranks[r].bytes[number % 2].load(std::memory_order_relaxed) != bytes) return SIZES_DIFFER;
        return MET;
    }

  private:
    // Whether it came. Ranks that compute alike come within microseconds; one that reads from a disk may take long.
    static bool await(const Meeting::Rank& other, uint64_t number) {
        for (int64_t tries = 0; other.met.load(std::memory_order_acquire) < number; ++tries) {
            if (tries < 300)
                _mm_pause();
            else if (tries < 3000)
                sched_yield();
            else
                usleep(50);
            if (tries % 10000 == 9999) {  // about once a second
                int64_t process = other.process.load(std::memory_order_relaxed);
                if (process && kill(static_cast<pid_t>(process), 0) && errno == ESRCH) return false;
            }
        }
        return true;
    }
};

// x = the sum of x over the ranks, in fp32 and in their order, rounded once.
template <class T>
int all_reduce(Ranks ranks, T* x, int64_t count, int num_threads) {
    int64_t step = ranks.capacity / int64_t(sizeof(T)) / LANES * LANES;
    for (int64_t done = 0; done < count; done += step, x += step) {
        int64_t here = std::min(step, count - done);
        uint64_t number = ranks.number();
        std::memcpy(static_cast<void*>(ranks.slot(number, ranks.rank)), x, sizeof(T) * here);
        if (int end = ranks.meet(number, sizeof(T) * here); end != MET) return end;
#pragma omp parallel for schedule(static) num_threads(threads_for(here, num_threads))
        for (int64_t i = 0; i < here; i += LANES) {
            int lanes = static_cast<int>(std::min<int64_t>(LANES, here - i));
            auto part = [&](int r) { return load(reinterpret_cast<const T*>(ranks.slot(number, r)) + i, lanes); };
            Vec total = part(0);
            for (int r = 1; r < ranks.size; ++r) total = total + part(r);
            store(x + i, total, lanes);
        }
    }
    return MET;
}

// Lays bytes `first` to `last` of the ranks' x side by side into `parts [ranks][last - first]`.
inline int gather(Ranks ranks, const char* x, int64_t bytes, int64_t first, int64_t last, char* parts) {
    for (int64_t done = 0; done < bytes; done += ranks.capacity) {
        int64_t here = std::min(ranks.capacity, bytes - done);
        uint64_t number = ranks.number();
        std::memcpy(ranks.slot(number, ranks.rank), x + done, here);
        if (int end = ranks.meet(number, here); end != MET) return end;
        int64_t from = std::max(first, done), to = std::min(last, done + here);
        for (int r = 0; from < to && r < ranks.size; ++r)
            std::memcpy(parts + r * (last - first) + from - first, ranks.slot(number, r) + from - done, to - from);
    }
    return MET;
}

}  // namespace
