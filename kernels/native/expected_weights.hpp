// Which part of a query's softmax weight lies on a page, if all keys of a page were their mean.
#pragma once

#include "simd.hpp"

namespace {

// By row and KV head `out [rows][kv_heads][pages]`, the sum of these parts over the group's query heads, each relative to
// the first `counts [rows]` pages; what lies behind them is left alone. Queries `[rows][heads][dim]`; `means
// [ids][kv_heads][dim]`; `scores [rows][heads][pages]` holds what comes between. All sums are taken in one order, so what
// a row has depends on its queries and its pages alone.
template <class T>
void expected_weights(const T* q, int64_t num_rows, int64_t heads, int64_t kv_heads, int64_t dim, const T* means,
                      const int64_t* ids, int64_t num_pages, const int64_t* counts, float scale, float* scores,
                      float* out, int num_threads) {
    int64_t group = heads / kv_heads;
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t task = 0; task < kv_heads * num_pages; ++task) {
        int64_t head = task / num_pages, page = task % num_pages;
        const T* mean = means + (ids[page] * kv_heads + head) * dim;
        for (int64_t row = 0; row < num_rows; ++row) {
            for (int64_t member = head * group; page < counts[row] && member < (head + 1) * group; ++member) {
                const T* x = q + (row * heads + member) * dim;
                Vec total = zeros();
                for (int64_t d = 0; d < dim; d += LANES) {
                    int lanes = static_cast<int>(std::min<int64_t>(LANES, dim - d));
                    total = fma(load(x + d, lanes), load(mean + d, lanes), total);
                }
                scores[(row * heads + member) * num_pages + page] = sum(total) * (scale * LOG2_E);
            }
        }
    }
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t task = 0; task < num_rows * kv_heads; ++task) {
        int64_t count = counts[task / kv_heads];
        float* to = out + task * num_pages;
        std::fill(to, to + count, 0.f);
        for (int64_t member = 0; member < group; ++member) {
            float* own = scores + (task * group + member) * num_pages;
            Vec highest = all(count ? *std::max_element(own, own + count) : 0), total = zeros();
            for (int64_t page = 0; page < count; page += LANES) {
                int lanes = static_cast<int>(std::min<int64_t>(LANES, count - page));
                Vec weight = power_of_2<6>(load(own + page, lanes) - highest);
                store(own + page, weight, lanes);
                total = total + zero_from(weight, lanes);
            }
            Vec whole = all(sum(total));
            for (int64_t page = 0; page < count; page += LANES) {
                int lanes = static_cast<int>(std::min<int64_t>(LANES, count - page));
                store(to + page, load(to + page, lanes) + load(own + page, lanes) / whole, lanes);
            }
        }
    }
}

}  // namespace
