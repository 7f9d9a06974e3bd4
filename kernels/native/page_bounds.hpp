// How high a score with a key of a page can be, from the least and the largest key of each channel.
#pragma once

#include "simd.hpp"

namespace {

// Upper bounds `out [rows][kv_heads][pages]` of the products of a KV head's queries with the keys of pages: the sum over
// channels of the larger of q * least and q * largest, and the highest of the group's query heads (Quest,
// https://arxiv.org/abs/2406.10774). Queries `[rows][heads][dim]`; `summaries [ids][2][kv_heads][dim]`, the least
// first. The sum is taken in one order, so an element depends on its queries and its page alone.
template <class T>
void page_bounds(const T* q, int64_t num_rows, int64_t heads, int64_t kv_heads, int64_t dim, const T* summaries,
                 const int64_t* ids, int64_t num_pages, float* out, int num_threads) {
    int64_t group = heads / kv_heads;
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t task = 0; task < kv_heads * num_pages; ++task) {
        int64_t head = task / num_pages, page = task % num_pages;
        const T* least = summaries + (ids[page] * 2 * kv_heads + head) * dim;
        const T* largest = least + kv_heads * dim;
        for (int64_t row = 0; row < num_rows; ++row) {
            float highest = -std::numeric_limits<float>::infinity();
            for (int64_t member = 0; member < group; ++member) {
                const T* x = q + (row * heads + head * group + member) * dim;
                Vec total = zeros();
                for (int64_t d = 0; d < dim; d += LANES) {
                    int lanes = static_cast<int>(std::min<int64_t>(LANES, dim - d));
                    Vec value = load(x + d, lanes);
                    total = total + larger(value * load(least + d, lanes), value * load(largest + d, lanes));
                }
                highest = std::max(highest, sum(total));
            }
            out[(row * kv_heads + head) * num_pages + page] = highest;
        }
    }
}

}  // namespace
