// Which part of a query's softmax weight lies on each of the pages that it meets.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>

namespace {

// `states [pages of all choices][tokens * group][2]`: of each query over a page, the highest score, to the base 2, and
// the sum of the weights relative to it, as `attention.hpp` tells them; choice c has the next `counts[c]` pages. Out
// come, `[pages of all choices][tokens]`, each page's parts of all weight, summed over the `group` query heads of a
// token. Sums are taken in the order of pages and of heads, so an element depends on its token's choice alone.
inline void sum_page_weights(const float* states, const int64_t* counts, int64_t num_choices, int64_t tokens,
                             int64_t group, double* out, int num_threads) {
    int64_t rows = tokens * group;
#pragma omp parallel for schedule(dynamic) num_threads(num_threads)
    for (int64_t choice = 0; choice < num_choices; ++choice) {
        int64_t first = std::accumulate(counts, counts + choice, int64_t{0}), end = first + counts[choice];
        std::fill(out + first * tokens, out + end * tokens, 0.0);
        for (int64_t row = 0; row < rows; ++row) {
            auto highest = [&](int64_t page) { return states[(page * rows + row) * 2]; };
            auto sum = [&](int64_t page) { return states[(page * rows + row) * 2 + 1]; };  // 0 where it sees no key
            double top = -INFINITY, total = 0;
            for (int64_t page = first; page < end; ++page)
                if (sum(page) != 0) top = std::max<double>(top, highest(page));
            auto weight = [&](int64_t page) {
                return sum(page) == 0 ? 0.0 : sum(page) * std::exp2(highest(page) - top);
            };
            for (int64_t page = first; page < end; ++page) total += weight(page);
            if (total == 0) continue;  // a row of another token's chunk, which is not there
            for (int64_t page = first; page < end; ++page) out[page * tokens + row / group] += weight(page) / total;
        }
    }
}

}  // namespace
