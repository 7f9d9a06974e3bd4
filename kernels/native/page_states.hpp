// The states of attention over pages by themselves, and their merge: for pages that several computers of one head share
// out, or that a device and its host do. What comes of both is what `attention.hpp` gives, bit for bit.
#pragma once

#include "attention.hpp"

namespace {

// New tokens of a sequence, of few rows, and one of the pages that they meet.
struct Item {
    int64_t row;         // the first of its rows of q
    int64_t num_tokens;
    int64_t start;       // the position of its first token
    int64_t page;        // counted from the sequence's first one
    int64_t entry;       // where it lies, see `Pages`
    int64_t exact;       // its index in `Pages::exact`, -1: where the entry says
    int64_t state;       // the first of its rows of states
};

// Where the state of a row and a head lies among `[rows][heads][dim + 2]`, with dim rounded up to whole vectors.
struct KeptStates {
    int64_t heads, dim;

    int64_t at(int64_t row, int64_t head) const { return (row * heads + head) * (dim + 2); }
};

// Writes the states of each item's rows over its page.
template <class T>
void page_states(const Shape& shape, const Pages<T>& pages, const Queries<T>& q, const Item* items, int64_t num_items,
                 float* states, int num_threads) {
    int64_t group = shape.group(), most_rows = 0;
    for (int64_t i = 0; i < num_items; ++i) most_rows = std::max(most_rows, items[i].num_tokens * group);
    int64_t num_tasks = std::max<int64_t>(1, (1 << 15) / shape.part());  // pages a task

#pragma omp parallel num_threads(num_threads)
    {
        static thread_local Scratch query_memory;
        PageAttention<T> one(shape);
        KeptStates kept{shape.heads, one.dim()};
        auto* queries = query_memory.get<RowElement<T>>(round_up(most_rows, TILE_ROWS) * one.depth());
#pragma omp for schedule(dynamic, num_tasks)
        for (int64_t task = 0; task < num_items * shape.kv_heads; ++task) {
            const Item& item = items[task / shape.kv_heads];
            int64_t head = task % shape.kv_heads, rows = item.num_tokens * group;
            auto seen = [&](int64_t token) { return visible_keys(item.start, token, item.page, shape.page_size); };
            q.pack(shape, item.row, head, 0, rows, one.depth(), queries);
            one.pack(item.exact < 0 ? pages.find(item.entry, head, shape) : pages.find_exact(item.exact, head, shape),
                     pages.codec, seen(item.num_tokens - 1));
            Tiles tiles(rows);
            auto visible = [&](int64_t r) { return seen(r / group); };
            one.attend(queries, rows, visible, [&](int64_t first, int64_t count, States found) {
                for (int64_t i = 0; i < count; ++i) {
                    int64_t r = first + i;
                    keep(found.out + i * one.dim(), found.highest[i], found.sums[i], one.dim(),
                         states + kept.at(item.state + r / group, head * group + r % group));
                }
            });
        }
    }
}

// Merges, for each of some rows, the rows of states `order[offsets[row]]` to `order[offsets[row + 1] - 1]`, one after the
// other. What comes of it is divided and rounded, as `Call::end` does, into row `targets[row]` of out; a target -1 - r is
// row r of the states, which goes on.
template <class T>
void merge_page_states(float* states, int64_t heads, int64_t dim, const int64_t* order, const int64_t* offsets,
                       const int64_t* targets, int64_t num_rows, T* out, int num_threads) {
    KeptStates kept{heads, round_up(dim, LANES)};
    // heads of a task: up to as many as are merged by one instruction, and few enough that all threads have work
    int64_t num_blocks = std::clamp<int64_t>(2 * num_threads / std::max<int64_t>(1, num_rows), 1, heads);
    int64_t block = std::min<int64_t>(LANES, (heads + num_blocks - 1) / num_blocks);
    num_blocks = (heads + block - 1) / block;

#pragma omp parallel num_threads(num_threads)
    {
        static thread_local Scratch memory;
        int64_t size = States::size(block, kept.dim);
        float* held = memory.get<float>(2 * size);
        States merged(held, block, kept.dim), next(held + size, block, kept.dim);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < num_rows * num_blocks; ++task) {
            int64_t row = task / num_blocks, head = task % num_blocks * block, count = std::min(block, heads - head);
            std::memset(static_cast<void*>(held), 0, sizeof(float) * 2 * size);
            for (int64_t i = offsets[row]; i < offsets[row + 1]; ++i) {
                const float* from = states + kept.at(order[i], head);
                for (int64_t h = 0; h < count; ++h, from += kept.dim + 2) {
                    std::memcpy(next.out + h * kept.dim, from, sizeof(float) * kept.dim);
                    next.highest[h] = from[kept.dim], next.sums[h] = from[kept.dim + 1];
                }
                merge(merged, next, count, kept.dim);
            }
            int64_t target = targets[row];
            for (int64_t h = 0; h < count; ++h) {
                const float* found = merged.out + h * kept.dim;
                if (target < 0)
                    keep(found, merged.highest[h], merged.sums[h], kept.dim, states + kept.at(-1 - target, head + h));
                else
                    finish(found, merged.sums[h], dim, out + (target * heads + head + h) * dim);
            }
        }
    }
}

}  // namespace
