// Exact attention over pages, as partial softmax states that are merged in logical order.
//
// The state of a row of queries over a page is a function of the row and of the page's keys that it may see, and states
// are merged one page after the other. Both ways below, for a few rows and for many, do just that, so a token's bits
// depend neither on the tokens beside it nor on where a page lies.
#pragma once

#include <cmath>

#include "gemm.hpp"
#include "scratch.hpp"

namespace {

struct Shape {
    int64_t heads, kv_heads, dim, page_size;

    int64_t group() const { return heads / kv_heads; }
    int64_t part() const { return page_size * dim; }            // elements of a head's keys, or values, of a page
    int64_t page() const { return kv_heads * page_size * dim; }  // of all heads' keys, or values
};

// New tokens of a sequence, and which of its pages they meet in this call.
struct Chunk {
    int64_t row;         // the first of its rows of q
    int64_t num_tokens;
    int64_t start;       // the position of its first token
    int64_t table;       // where its pages begin in the table
    int64_t first, end;  // the pages
    int64_t is_last;     // whether the result is wanted: else the states are kept
};

// Where pages lie: an entry of the table is a slot of the pool, or -1 - an index in the buffer.
template <class T>
struct Pages {
    const T *pool, *buffer;
    int64_t num_slots;

    // the keys of a head, and how far behind them its values lie
    std::pair<const T*, int64_t> find(int64_t entry, int64_t head, const Shape& shape) const {
        if (entry >= 0) return {pool + entry * shape.page() + head * shape.part(), num_slots * shape.page()};
        return {buffer + (-1 - entry) * 2 * shape.page() + head * shape.part(), shape.page()};
    }
};

// --- packing of keys and values ---

// Transposes 16 rows of 32-bit elements.
inline void transpose(Vec* rows) {
#ifdef __AVX512F__
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
        a[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
    }
    for (int i = 0; i < 16; i += 4) {
        auto pair = [&](int x, int y) { return std::pair(_mm512_castps_pd(a[i + x]), _mm512_castps_pd(a[i + y])); };
        auto [p, q] = pair(0, 2);
        auto [r, s] = pair(1, 3);
        b[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(p, q));
        b[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(p, q));
        b[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(r, s));
        b[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(r, s));
    }
    for (int i = 0; i < 4; ++i) {
        __m512 low = _mm512_shuffle_f32x4(b[i], b[4 + i], 0x88), high = _mm512_shuffle_f32x4(b[i], b[4 + i], 0xdd);
        __m512 low2 = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0x88);
        __m512 high2 = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0xdd);
        rows[i].v = _mm512_shuffle_f32x4(low, low2, 0x88);
        rows[4 + i].v = _mm512_shuffle_f32x4(high, high2, 0x88);
        rows[8 + i].v = _mm512_shuffle_f32x4(low, low2, 0xdd);
        rows[12 + i].v = _mm512_shuffle_f32x4(high, high2, 0xdd);
    }
#else
    alignas(64) float in[16][16], out[16][16];
    for (int i = 0; i < 16; ++i) store(in[i], rows[i]);
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 16; ++j) out[j][i] = in[i][j];
    for (int i = 0; i < 16; ++i) rows[i] = load(out[i]);
#endif
}

// Sixteen 32-bit units of a row of keys from element d on: pairs of bf16, or single elements widened.
template <class T>
inline Vec units(const T* row, int64_t d, int64_t dim) {
    if constexpr (IN_PAIRS<T>) {
        if (d + 32 <= dim) return load(reinterpret_cast<const float*>(row + d));
        alignas(64) bf16 held[32] = {};
        std::memcpy(held, row + d, sizeof(T) * (dim - d));
        return load(reinterpret_cast<const float*>(held));
    } else {
        return load(row + d, static_cast<int>(std::min<int64_t>(LANES, dim - d)));
    }
}

// Keys `[count, dim]` as panels of 16 keys, `dim` deep.
template <class T>
void pack_keys(const T* keys, int64_t count, int64_t dim, RowElement<T>* panels) {
    constexpr int64_t UNIT = IN_PAIRS<T> ? 2 : 1;
    int64_t size = panel_size<RowElement<T>>(dim), units_deep = padded_depth<RowElement<T>>(dim) / UNIT;
    for (int64_t first = 0; first < count; first += LANES) {
        auto* panel = reinterpret_cast<float*>(panels + first / LANES * size);
        for (int64_t unit = 0; unit < units_deep; unit += LANES) {
            Vec rows[16];
            for (int64_t i = 0; i < 16; ++i)
                rows[i] = first + i < count ? units(keys + (first + i) * dim, unit * UNIT, dim) : zeros();
            transpose(rows);
            for (int64_t i = 0; i < std::min<int64_t>(16, units_deep - unit); ++i)
                store(panel + (unit + i) * LANES, rows[i]);
        }
    }
}

// Values `[count, dim]` as panels of 16 of their dimensions, `count` deep, and zeros up to `depth`.
template <class T>
void pack_values(const T* values, int64_t count, int64_t dim, int64_t depth, RowElement<T>* panels) {
    for (int64_t d = 0; d < dim; d += LANES, panels += depth * LANES) {
        int lanes = static_cast<int>(std::min<int64_t>(LANES, dim - d));
        if constexpr (IN_PAIRS<T>) {
            for (int64_t k = 0; k < depth; k += 2) {
                alignas(64) bf16 held[2][16] = {};
                const bf16* pair[2];
                for (int64_t i = 0; i < 2; ++i) {
                    const bf16* row = values + (k + i) * dim + d;
                    pair[i] = held[i];
                    if (k + i < count && lanes == LANES)
                        pair[i] = row;
                    else if (k + i < count)
                        std::memcpy(held[i], row, sizeof(bf16) * lanes);
                }
#ifdef __AVX512F__
                auto wide = [](const bf16* p) {
                    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
                };
                __m512i both = _mm512_or_si512(wide(pair[0]), _mm512_slli_epi32(wide(pair[1]), 16));
                _mm512_storeu_si512(panels + k * LANES, both);
#endif
            }
        } else {
            for (int64_t k = 0; k < depth; ++k)
                store(panels + k * LANES, k < count ? load(values + k * dim + d, lanes) : zeros());
        }
    }
}

// --- states ---

// The state of a row: `out` not yet divided by the sum of its weights, which are powers of 2 less the highest score. A
// row that has seen no key has the sum 0; that of any other is about 1 or more, or not a number.
struct State {
    float* out;
    float *highest, *sum;

    // In memory for `dim + 2` numbers.
    State(float* memory, int64_t dim) : out(memory), highest(memory + dim), sum(memory + dim + 1) {}
};

// Merges the state of later keys, if there is any, into that of earlier ones.
inline void merge(State to, const float* out, float highest, float total, int64_t dim) {
    if (total == 0) return;
    if (*to.sum == 0) {
        std::memcpy(to.out, out, sizeof(float) * dim);
        *to.highest = highest, *to.sum = total;
        return;
    }
    float top = highest > *to.highest ? highest : *to.highest;
    Vec before = power_of_2<6>(all(*to.highest) - all(top)), after = power_of_2<6>(all(highest) - all(top));
    *to.highest = top;
    *to.sum = first_lane(fma(all(*to.sum), before, all(total) * after));
    for (int64_t d = 0; d < dim; d += LANES) store(to.out + d, fma(load(to.out + d), before, load(out + d) * after));
}

// Divides, rounds and writes the result of a row.
template <class T>
inline void finish(State state, T* out, int64_t dim) {
    Vec share = all(1.f / *state.sum);
    for (int64_t d = 0; d < dim; d += LANES)
        store(out + d, load(state.out + d) * share, static_cast<int>(std::min<int64_t>(LANES, dim - d)));
}

// --- a page ---

constexpr int64_t TILE_ROWS = 32;  // rows of queries that meet a page together

// A page's keys and values, packed, and the states of some rows over it.
template <class T>
class PageAttention {
  public:
    using E = RowElement<T>;

    explicit PageAttention(const Shape& shape)
        : shape_(shape),
          scale_(LOG2_E / std::sqrt(static_cast<float>(shape.dim))),
          dim_(round_up(shape.dim, LANES)),
          depth_(padded_depth<E>(shape.dim)),
          most_(padded_depth<E>(round_up(shape.page_size, LANES))),
          stride_(most_ + 64 / sizeof(float)),  // not a power of two, which many lines of a cache would share
          weight_stride_(most_ + 64 / sizeof(E)) {
        static thread_local Scratch packed_memory, number_memory;
        int64_t keys = round_up(shape.page_size, LANES) * depth_, values = most_ * dim_;
        keys_ = packed_memory.get<E>(keys + values + TILE_ROWS * weight_stride_);
        values_ = keys_ + keys;
        weights_ = values_ + values;
        scores_ = number_memory.get<float>(TILE_ROWS * (stride_ + dim_ + 2));
        out_ = scores_ + TILE_ROWS * stride_;
        highest_ = out_ + TILE_ROWS * dim_;
        sums_ = highest_ + TILE_ROWS;
    }

    int64_t dim() const { return dim_; }      // of a row of a state
    int64_t depth() const { return depth_; }  // of a row of queries

    void pack(std::pair<const T*, int64_t> page, int64_t count) {
        count_ = count;
        pack_keys(page.first, count, shape_.dim, keys_);
        pack_values(page.first + page.second, count, shape_.dim, padded_depth<E>(round_up(count, LANES)), values_);
    }

    // Gives the state of each row of queries `[rows][depth]` over the page to `use(row, out, highest, sum)`. Row r sees
    // the first `visible(r)` keys; for 0 its sum is 0. Tiles have been configured for so many rows, or for 16, and there
    // are zeros up to whole tiles then.
    template <class Visible, class Use>
    void attend(const E* queries, int64_t num_rows, Visible visible, Use use) {
        for (int64_t first = 0; first < num_rows; first += TILE_ROWS) {
            int64_t count = std::min(TILE_ROWS, num_rows - first);
            attend_together(queries + first * depth_, count, [&](int64_t r) { return visible(first + r); });
            for (int64_t r = 0; r < count; ++r) use(first + r, out_ + r * dim_, highest_[r], sums_[r]);
        }
    }

  private:
    // The states of up to TILE_ROWS rows.
    template <class Visible>
    void attend_together(const E* queries, int64_t num_rows, Visible visible) {
        int64_t seen = 0;
        for (int64_t r = 0; r < num_rows; ++r) seen = std::max(seen, visible(r));
        if (!seen) {
            for (int64_t r = 0; r < num_rows; ++r) sums_[r] = 0;
            return;
        }
        int64_t panels = (seen + LANES - 1) / LANES, depth = padded_depth<E>(panels * LANES);
        int64_t values_depth = padded_depth<E>(round_up(count_, LANES));
        multiply<E>(Rows<E>::plain(queries, depth_), num_rows, keys_, panel_size<E>(shape_.dim), panels, depth_,
                    scores_, stride_);
        for (int64_t r = 0; r < num_rows; ++r) weigh(r, visible(r), depth);
        multiply<E>(Rows<E>::plain(weights_, weight_stride_), num_rows, values_, values_depth * LANES, dim_ / LANES,
                    depth, out_, dim_);
    }

    void weigh(int64_t r, int64_t visible, int64_t depth) {
        const float* scores = scores_ + r * stride_;
        E* weights = weights_ + r * weight_stride_;
        int64_t whole = visible / LANES * LANES;  // up to which all lanes are visible
        int rest = static_cast<int>(visible - whole);
        Vec high = all(-std::numeric_limits<float>::infinity());
        for (int64_t k = 0; k < whole; k += LANES) high = larger(load(scores + k), high);
        if (rest) high = larger(lowest_from(load(scores + whole), rest), high);
        float top = highest_[r] = largest(high) * scale_;
        Vec total = zeros(), scale = all(scale_), low = all(-top);
        auto weight_of = [&](int64_t k) { return power_of_2<DEGREE<T>>(fma(load(scores + k), scale, low)); };
        int64_t k = 0;
        for (; k + 2 * LANES <= whole; k += 2 * LANES) {
            Vec weight = weight_of(k), next = weight_of(k + LANES);
            total = total + weight + next;
            store(weights + k, weight, next);
        }
        if (k < whole) {
            Vec weight = weight_of(k);
            total = total + weight;
            store(weights + k, weight);
        }
        if (rest) {
            Vec weight = zero_from(weight_of(whole), rest);
            total = total + weight;
            store(weights + whole, weight);
        }
        for (k = round_up(visible, LANES); k < depth; k += LANES) store(weights + k, zeros());
        sums_[r] = ::sum(total);
    }

    Shape shape_;
    float scale_;
    int64_t dim_, depth_, most_, stride_, weight_stride_, count_ = 0;
    E *keys_, *values_, *weights_;
    float *scores_, *out_, *highest_, *sums_;
};

// --- sequences ---

// All that a call is given. `kept` holds states between calls, `[rows][heads][dim() + 2]`; it is null where every chunk
// meets all its pages in one call.
template <class T>
struct Call {
    Shape shape;
    Pages<T> pages;
    const int64_t* table;
    const T* q;
    int64_t q_stride;
    float* kept;
    T* out;
    int num_threads;

    int64_t kept_dim() const { return round_up(shape.dim, LANES); }

    State kept_state(int64_t row, int64_t head) const {
        return {kept + (row * shape.heads + head) * (kept_dim() + 2), kept_dim()};
    }

    // Queries of the rows of a KV head from row `first` on, `[count][depth]`, with zeros up to whole tiles.
    void pack_queries(int64_t row, int64_t head, int64_t first, int64_t count, int64_t depth, RowElement<T>* to) const {
        int64_t group = shape.group(), whole = round_up(count, 16);
        for (int64_t r = 0; r < whole; ++r, to += depth) {
            int64_t done = 0;
            if (r < count) {
                int64_t token = (first + r) / group, member = (first + r) % group;
                const T* from = q + (row + token) * q_stride + (head * group + member) * shape.dim;
                for (; done < shape.dim; done += LANES) {
                    int lanes = static_cast<int>(std::min<int64_t>(LANES, shape.dim - done));
                    store(to + done, load(from + done, lanes), lanes);
                }
                done = shape.dim;
            }
            std::memset(static_cast<void*>(to + done), 0, sizeof(*to) * (depth - done));
        }
    }

    // Puts the state with which a row begins into memory for `kept_dim() + 2` numbers.
    void begin(const Chunk& chunk, int64_t r, int64_t head, float* memory) const {
        State state(memory, kept_dim());
        int64_t group = shape.group();
        if (chunk.first)
            std::memcpy(memory, kept_state(chunk.row + r / group, head * group + r % group).out,
                        sizeof(float) * (kept_dim() + 2));
        else
            *state.sum = 0;
    }

    // Writes a row's result, or keeps its state.
    void end(const Chunk& chunk, int64_t r, int64_t head, State state) const {
        int64_t group = shape.group(), row = chunk.row + r / group, query_head = head * group + r % group;
        if (chunk.is_last)
            finish(state, out + (row * shape.heads + query_head) * shape.dim, shape.dim);
        else
            std::memcpy(kept_state(row, query_head).out, state.out, sizeof(float) * (kept_dim() + 2));
    }
};

// How many keys of a page row r of a chunk sees.
inline int64_t visible_keys(const Chunk& chunk, int64_t token, int64_t page, int64_t page_size) {
    return std::clamp<int64_t>(chunk.start + token + 1 - page * page_size, 0, page_size);
}

// Chunks of few rows: states of pages side by side, then their merge.
template <class T>
void attend_few(const Call<T>& call, const Chunk* chunks, int64_t num_chunks) {
    static thread_local Scratch state_memory, index_memory;
    const Shape& shape = call.shape;
    int64_t group = shape.group(), size = call.kept_dim() + 2, most_rows = 0;
    // numbers pages over all chunks
    auto* firsts = index_memory.get<int64_t>(num_chunks + 1);
    firsts[0] = 0;
    for (int64_t i = 0; i < num_chunks; ++i) {
        firsts[i + 1] = firsts[i] + chunks[i].end - chunks[i].first;
        most_rows = std::max(most_rows, chunks[i].num_tokens * group);
    }
    auto number_of = [&](int64_t number) { return std::upper_bound(firsts, firsts + num_chunks, number) - firsts - 1; };

    int64_t per_page = shape.kv_heads * most_rows * size, total = firsts[num_chunks];
    int64_t window = std::min(total, std::max<int64_t>(1, (2 << 20) / per_page));  // whose states are held: 8 MiB
    int64_t running_rows = num_chunks * shape.kv_heads * most_rows;
    float* states = state_memory.get<float>(window * per_page + running_rows * size);
    float* running = states + window * per_page;
    int64_t num_tasks = std::max<int64_t>(1, (1 << 15) / shape.part());  // pages a task

#pragma omp parallel num_threads(call.num_threads)
    {
        static thread_local Scratch query_memory;
        PageAttention<T> one(shape);
        auto* queries = query_memory.get<RowElement<T>>(round_up(most_rows, TILE_ROWS) * one.depth());
        for (int64_t from = 0; from < total; from += window) {
            int64_t to = std::min(total, from + window);
#pragma omp for schedule(dynamic, num_tasks)
            for (int64_t task = from * shape.kv_heads; task < to * shape.kv_heads; ++task) {
                int64_t number = task / shape.kv_heads, head = task % shape.kv_heads, at = number_of(number);
                const Chunk& chunk = chunks[at];
                int64_t page = chunk.first + number - firsts[at], rows = chunk.num_tokens * group;
                int64_t count = visible_keys(chunk, chunk.num_tokens - 1, page, shape.page_size);
                call.pack_queries(chunk.row, head, 0, rows, one.depth(), queries);
                one.pack(call.pages.find(call.table[chunk.table + page], head, shape), count);
                float* state = states + (number - from) * per_page + head * most_rows * size;
                Tiles tiles(rows);
                auto visible = [&](int64_t r) { return visible_keys(chunk, r / group, page, shape.page_size); };
                one.attend(queries, rows, visible, [&](int64_t r, const float* out, float highest, float sum) {
                    float* to = state + r * size;
                    std::memcpy(to, out, sizeof(float) * one.dim());
                    to[one.dim()] = highest, to[one.dim() + 1] = sum;
                });
            }
            int64_t begins = number_of(from), ends = number_of(to - 1) + 1;
#pragma omp for schedule(static)
            for (int64_t task = begins * shape.kv_heads; task < ends * shape.kv_heads; ++task) {
                int64_t at = task / shape.kv_heads, head = task % shape.kv_heads;
                const Chunk& chunk = chunks[at];
                for (int64_t r = 0; r < chunk.num_tokens * group; ++r) {
                    State state(running + (task * most_rows + r) * size, one.dim());
                    if (firsts[at] >= from) call.begin(chunk, r, head, state.out);
                    for (int64_t n = std::max(from, firsts[at]); n < std::min(to, firsts[at + 1]); ++n) {
                        const float* next = states + (n - from) * per_page + (head * most_rows + r) * size;
                        merge(state, next, next[one.dim()], next[one.dim() + 1], one.dim());
                    }
                    if (firsts[at + 1] <= to) call.end(chunk, r, head, state);
                }
            }
        }
    }
}

// Chunks of many rows: a task takes some tokens of a KV head through all pages.
template <class T>
void attend_many(const Call<T>& call, const Chunk* chunks, int64_t num_chunks) {
    static thread_local Scratch index_memory;
    const Shape& shape = call.shape;
    int64_t group = shape.group(), size = call.kept_dim() + 2, all_tokens = 0;
    for (int64_t i = 0; i < num_chunks; ++i) all_tokens += chunks[i].num_tokens;
    // tokens of a task: as many as pay for the packing of each page, and few enough that all threads have work
    int64_t block = all_tokens * shape.kv_heads / (4 * call.num_threads);
    block = std::clamp<int64_t>(block, 16, std::max<int64_t>(16, 768 / group)) / 16 * 16;
    auto* firsts = index_memory.get<int64_t>(num_chunks + 1);
    firsts[0] = 0;
    for (int64_t i = 0; i < num_chunks; ++i)
        firsts[i + 1] = firsts[i] + (chunks[i].num_tokens + block - 1) / block * shape.kv_heads;

#pragma omp parallel num_threads(call.num_threads)
    {
        static thread_local Scratch state_memory, query_memory;
        PageAttention<T> one(shape);
        auto* queries = query_memory.get<RowElement<T>>(round_up(block * group, TILE_ROWS) * one.depth());
        float* states = state_memory.get<float>(block * group * size);
        Tiles tiles(16);
#pragma omp for schedule(dynamic)
        for (int64_t task = firsts[num_chunks] - 1; task >= 0; --task) {  // the later ones of a chunk see more keys
            int64_t at = std::upper_bound(firsts, firsts + num_chunks, task) - firsts - 1;
            const Chunk& chunk = chunks[at];
            int64_t head = (task - firsts[at]) % shape.kv_heads, token = (task - firsts[at]) / shape.kv_heads * block;
            int64_t num_tokens = std::min(block, chunk.num_tokens - token), rows = num_tokens * group;
            int64_t first = token * group;
            call.pack_queries(chunk.row, head, first, rows, one.depth(), queries);
            for (int64_t r = 0; r < rows; ++r) call.begin(chunk, first + r, head, states + r * size);
            for (int64_t page = chunk.first; page < chunk.end; ++page) {
                int64_t count = visible_keys(chunk, token + num_tokens - 1, page, shape.page_size);
                if (!count) break;
                one.pack(call.pages.find(call.table[chunk.table + page], head, shape), count);
                auto visible = [&](int64_t r) {
                    return visible_keys(chunk, (first + r) / group, page, shape.page_size);
                };
                one.attend(queries, rows, visible, [&](int64_t r, const float* out, float highest, float sum) {
                    merge({states + r * size, one.dim()}, out, highest, sum, one.dim());
                });
            }
            for (int64_t r = 0; r < rows; ++r) call.end(chunk, first + r, head, {states + r * size, one.dim()});
        }
    }
}

}  // namespace
