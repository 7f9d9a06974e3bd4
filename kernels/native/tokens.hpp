// What is done to tokens one by one: norms, and rotation with the write into pages.
#pragma once

#include "simd.hpp"

namespace {

constexpr int64_t WORTH_A_THREAD = 1 << 14;  // elements: less is done before another thread has woken up

inline int threads_for(int64_t elements, int num_threads) {
    return static_cast<int>(std::clamp<int64_t>(elements / WORTH_A_THREAD, 1, num_threads));
}

// out = x / sqrt(mean(x^2) + eps) * weight by rows, after x = x + delta, rounded, where there is a delta. All rows lie
// side by side.
template <class T>
void rms_norm(T* x, const T* delta, const T* weight, float eps, int64_t num_rows, int64_t size, T* out,
              int num_threads) {
#pragma omp parallel for schedule(static) num_threads(threads_for(num_rows* size, num_threads))
    for (int64_t r = 0; r < num_rows; ++r) {
        T *row = x + r * size, *to = out + r * size;
        Vec squares = zeros();
        for (int64_t i = 0; i < size; i += LANES) {
            int count = static_cast<int>(std::min<int64_t>(LANES, size - i));
            Vec value = load(row + i, count);
            if (delta) {
                store(row + i, value + load(delta + r * size + i, count), count);
                value = load(row + i, count);  // as rounded
            }
            squares = fma(value, value, squares);
        }
        Vec scale = all(1.f / std::sqrt(sum(squares) / static_cast<float>(size) + eps));
        for (int64_t i = 0; i < size; i += LANES) {
            int count = static_cast<int>(std::min<int64_t>(LANES, size - i));
            store(to + i, load(row + i, count) * scale * load(weight + i, count), count);
        }
    }
}

// Rotates the pairs (x[i], x[i + dim / 2]) of the first `heads + kv_heads` heads of each row in place, and writes keys
// and values into their pages, those of a row whose page is negative nowhere: qkv `[num_rows, heads + 2 * kv_heads,
// dim]`, its rows `stride` apart; cos, sin `[num_rows, dim / 2]`; a layer of the pool `[2, pages, kv_heads, page_size,
// dim]`.
template <class T>
void rope_and_write(T* qkv, int64_t stride, int64_t num_rows, int64_t heads, int64_t kv_heads, int64_t dim,
                    const float* cos, const float* sin, T* pool, int64_t num_pages, int64_t page_size,
                    const int64_t* page, const int64_t* offset, int num_threads) {
    int64_t half = dim / 2, row_size = (heads + 2 * kv_heads) * dim, values = num_pages * kv_heads * page_size * dim;
#pragma omp parallel for schedule(static) num_threads(threads_for(num_rows* row_size, num_threads))
    for (int64_t r = 0; r < num_rows; ++r) {
        T* row = qkv + r * stride;
        for (int64_t h = 0; h < heads + kv_heads; ++h) {
            T *first = row + h * dim, *second = first + half;
            for (int64_t i = 0; i < half; i += LANES) {
                int count = static_cast<int>(std::min<int64_t>(LANES, half - i));
                Vec a = load(first + i, count), b = load(second + i, count);
                Vec c = load(cos + r * half + i, count), s = load(sin + r * half + i, count);
                store(first + i, fma(a, c, zeros() - b * s), count);
                store(second + i, fma(b, c, a * s), count);
            }
        }
        for (int64_t h = 0; h < kv_heads && page[r] >= 0; ++h) {
            T* to = pool + ((page[r] * kv_heads + h) * page_size + offset[r]) * dim;
            std::memcpy(static_cast<void*>(to), row + (heads + h) * dim, sizeof(T) * dim);
            std::memcpy(static_cast<void*>(to + values), row + (heads + kv_heads + h) * dim, sizeof(T) * dim);
        }
    }
}

}  // namespace
