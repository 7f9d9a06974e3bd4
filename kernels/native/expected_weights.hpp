// Which part of a query's softmax weight lies on a page, if the keys of each block of its tokens were their mean.
#pragma once

#include "simd.hpp"

namespace {

// By row and KV head `out [rows][kv_heads][pages]`, the sum of these parts over the group's query heads, each relative to
// the first `counts [rows]` pages; what lies behind them is left alone. Queries `[rows][heads][dim]`; `means
// [ids][blocks][kv_heads][dim]`; `scores [rows][heads][pages][blocks]` holds what comes between. All sums are taken in one
// order, so what a row has depends on its queries and its pages alone.
template <class T>
void expected_weights(const T* q, int64_t num_rows, int64_t heads, int64_t kv_heads, int64_t dim, const T* means,
                      int64_t blocks, const int64_t* ids, int64_t num_pages, const int64_t* counts, float scale,
                      float* scores, float* out, int num_threads) {
    int64_t group = heads / kv_heads, num_blocks = num_pages * blocks;
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t first = 0; first < num_blocks; first += LANES) {
        const T* means_of[LANES];
        for (int i = 0; i < LANES; ++i) {
            int64_t block = std::min<int64_t>(first + i, num_blocks - 1);
            means_of[i] = means + (ids[block / blocks] * blocks + block % blocks) * kv_heads * dim;
        }
        int side_by_side = static_cast<int>(std::min<int64_t>(LANES, num_blocks - first));
        for (int64_t row = 0; row < num_rows; ++row) {
            for (int64_t head = 0; first < counts[row] * blocks && head < heads; ++head) {
                Vec totals[LANES];
                std::fill(totals, totals + LANES, zeros());
                for (int64_t d = 0; d < dim; d += LANES) {
                    int lanes = static_cast<int>(std::min<int64_t>(LANES, dim - d));
                    Vec x = load(q + (row * heads + head) * dim + d, lanes);
                    for (int i = 0; i < LANES; ++i)
                        totals[i] = fma(x, load(means_of[i] + head / group * dim + d, lanes), totals[i]);
                }
                float* to = scores + (row * heads + head) * num_blocks + first;
                store(to, sums(totals) * all(scale * LOG2_E), side_by_side);
            }
        }
    }
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t task = 0; task < num_rows * kv_heads; ++task) {
        int64_t num_seen = counts[task / kv_heads], count = num_seen * blocks;
        float* to = out + task * num_pages;
        std::fill(to, to + num_seen, 0.f);
        for (int64_t member = 0; member < group; ++member) {
            float* own = scores + (task * group + member) * num_blocks;
            Vec highest = all(count ? *std::max_element(own, own + count) : 0), total = zeros();
            for (int64_t block = 0; block < count; block += LANES) {
                int lanes = static_cast<int>(std::min<int64_t>(LANES, count - block));
                Vec weight = power_of_2<6>(load(own + block, lanes) - highest);
                store(own + block, weight, lanes);
                total = total + zero_from(weight, lanes);
            }
            float whole = sum(total);
            for (int64_t page = 0; page < num_seen; ++page) {
                float weight = 0;
                for (int64_t block = page * blocks; block < (page + 1) * blocks; ++block) weight += own[block];
                to[page] += weight / whole;
            }
        }
    }
}

}  // namespace
