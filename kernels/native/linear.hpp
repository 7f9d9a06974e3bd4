// Linear layers over weights that are packed once.
#pragma once

#include "gemm.hpp"
#include "scratch.hpp"

namespace {

// A weight `[outputs, depth]` as panels. Of a gated one the first half of the outputs are gates and the second half what
// they let through (`up`): their panels take turns.
struct Layout {
    int64_t outputs, depth;
    bool gated;

    int64_t width() const { return gated ? outputs / 2 : outputs; }  // of the result
    int64_t num_panels() const { return (width() + LANES - 1) / LANES * (gated ? 2 : 1); }

    // The output at column n of a panel; -1 for padding.
    int64_t output(int64_t panel, int64_t n) const {
        int64_t column = (gated ? panel / 2 : panel) * LANES + n;
        if (column >= width()) return -1;
        return gated && panel % 2 ? width() + column : column;
    }
};

template <class T>
void pack_weight(const T* weight, Layout layout, T* packed, int num_threads) {
    int64_t size = panel_size<T>(layout.depth), num_panels = layout.num_panels();
#pragma omp parallel for num_threads(num_threads)
    for (int64_t p = 0; p < num_panels; ++p) {
        T* panel = packed + p * size;
        std::memset(static_cast<void*>(panel), 0, sizeof(T) * size);
        for (int64_t n = 0; n < LANES; ++n) {
            int64_t output = layout.output(p, n);
            if (output < 0) continue;
            const T* row = weight + output * layout.depth;
            for (int64_t k = 0; k < layout.depth; ++k) panel[panel_index<T>(k, n)] = row[k];
        }
    }
}

// --- rows of A ---

// Whether rows of x can be multiplied where they lie.
template <class T>
bool lies_ready(int64_t num_rows, int64_t depth) {
    if (!std::is_same_v<T, RowElement<T>>) return false;
    if (padded_depth<T>(depth) != depth) return false;
    return !IN_TILES<T> || num_rows <= 16;  // more would meet in the same lines of the cache
}

// How rows lie that `pack_row` copies to `data`: with tiles, each of these in one piece.
template <class T>
Rows<RowElement<T>> packed_rows(const RowElement<T>* data, int64_t padded) {
    if (IN_TILES<T>) return {data, 32, 16 * padded, 512};
    return Rows<RowElement<T>>::plain(data, padded);
}

// Copies row r of x, or zeros where x is null.
template <class T>
void pack_row(const T* x, int64_t depth, Rows<RowElement<T>> rows, RowElement<T>* to, int64_t r, int64_t padded) {
    using E = RowElement<T>;
    if constexpr (IN_TILES<T>) {
        E* row = to + r / 16 * rows.block + r % 16 * rows.stride;
        for (int64_t k = 0; k < padded; k += 32) {
            int64_t count = x ? std::clamp<int64_t>(depth - k, 0, 32) : 0;
            E* part = row + k / 32 * rows.step;
            if (count) std::memcpy(static_cast<void*>(part), x + k, sizeof(E) * count);
            if (count < 32) std::memset(static_cast<void*>(part + count), 0, sizeof(E) * (32 - count));
        }
    } else {
        E* row = to + r * rows.stride;
        if constexpr (std::is_same_v<T, E>) {
            std::memcpy(static_cast<void*>(row), x, sizeof(E) * depth);
        } else {
            for (int64_t k = 0; k < depth; k += LANES) {
                int count = static_cast<int>(std::min<int64_t>(LANES, depth - k));
                store(row + k, load(x + k, count), count);
            }
        }
        std::memset(static_cast<void*>(row + depth), 0, sizeof(E) * (padded - depth));
    }
}

// --- the end of a product ---

// Adds the bias, gates, rounds, and writes some panels of a block of rows.
template <class T>
void finish(const float* c, int64_t c_stride, int64_t num_rows, int64_t panel, int64_t num_panels, const T* bias,
            Layout layout, T* out, int64_t out_stride) {
    int64_t step = layout.gated ? 2 : 1, width = layout.width();
    int64_t first_column = panel / step * LANES, columns = std::min(num_panels / step * LANES, width - first_column);
    for (int64_t r = 0; r < num_rows; ++r)
        for (int64_t i = 0; i < columns; i += LANES) {
            int count = static_cast<int>(std::min<int64_t>(LANES, columns - i));
            const float* from = c + r * c_stride + i * step;
            Vec x = load(from);
            if (bias) x = x + load(bias + first_column + i, count);
            if (layout.gated) {
                Vec up = load(from + LANES);
                if (bias) up = up + load(bias + width + first_column + i, count);
                x = silu<T>(x) * up;
            }
            store(out + r * out_stride + first_column + i, x, count);
        }
}

// `x @ weight.T + bias`, gated where the layout says so. x `[num_rows, depth]`, its rows `x_stride` apart; out
// `[num_rows, width]`.
template <class T>
void linear(const T* x, int64_t num_rows, int64_t x_stride, const T* packed, const T* bias, Layout layout, T* out,
            int num_threads) {
    using E = RowElement<T>;
    static thread_local Scratch row_memory;
    int64_t padded = padded_depth<T>(layout.depth), size = panel_size<T>(layout.depth);
    int64_t width = layout.width(), num_panels = layout.num_panels();
    bool ready = lies_ready<T>(num_rows, layout.depth);
    int64_t in_memory = IN_TILES<T> ? round_up(num_rows, 16) : num_rows;
    E* copy = ready ? nullptr : row_memory.get<E>(in_memory * padded);
    auto rows = packed_rows<T>(copy, padded);
    if constexpr (std::is_same_v<T, E>)
        if (ready) rows = Rows<E>::plain(x, x_stride);

    // a block of rows stays in a core's second cache while all panels pass by
    constexpr int64_t CACHE = 512 << 10;
    int64_t block = std::clamp<int64_t>(CACHE / (padded * int64_t(sizeof(E))) / 32 * 32, 32, 256);
    int64_t num_blocks = (num_rows + block - 1) / block;
    // panels of a task: as many as MOST, and so that all threads have the same work where they share a block of rows
    constexpr int64_t MOST = 8, c_stride = MOST * LANES;
    int64_t per_thread = (num_panels + num_threads - 1) / num_threads, parts = (per_thread + MOST - 1) / MOST;
    int64_t group = num_blocks < num_threads ? round_up((per_thread + parts - 1) / parts, 2) : MOST;
    int64_t num_groups = (num_panels + group - 1) / group;
    int num_workers = static_cast<int>(std::min<int64_t>(num_threads, num_blocks * num_groups));

#pragma omp parallel num_threads(num_workers)
    {
        if (!ready) {
#pragma omp for schedule(static)
            for (int64_t r = 0; r < in_memory; ++r)
                pack_row(r < num_rows ? x + r * x_stride : nullptr, layout.depth, rows, copy, r, padded);
        }
        static thread_local Scratch sum_memory;
        Tiles tiles(num_rows);
        float* sums = sum_memory.get<float>(std::min(round_up(num_rows, 16), block) * c_stride);
#pragma omp for collapse(2) schedule(static) nowait
        for (int64_t b = 0; b < num_blocks; ++b)
            for (int64_t g = 0; g < num_groups; ++g) {
                int64_t first = b * block, count = std::min(block, num_rows - first);
                int64_t panel = g * group, panels = std::min(group, num_panels - panel);
                auto part = rows;
                part.data += IN_TILES<T> ? first / 16 * rows.block : first * rows.stride;
                multiply<T>(part, count, packed + panel * size, size, panels, padded, sums, c_stride);
                finish(sums, c_stride, count, panel, panels, bias, layout, out + first * width, width);
            }
    }
}

}  // namespace
