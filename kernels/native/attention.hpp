// Exact attention over pages, as partial softmax states that are merged in logical order.
//
// The state of a row of queries over a page is a function of the row and of the page's keys that it may see, and states
// are merged one page after the other. Both ways below, for a few rows and for many, do just that, so a token's bits
// depend neither on the tokens beside it nor on where a page lies.
#pragma once

#include <cmath>

#include "codecs.hpp"
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
    int64_t exact;       // where the page of its own tokens lies in `Pages::exact`; -1: where the table says
};

// A head's keys and values of a page, as numbers or as codes.
template <class T>
struct Part {
    const T *keys, *values;
    const uint8_t *coded_keys = nullptr, *coded_values = nullptr;
};

// Where pages lie: an entry of the table is a slot of the pool, or -1 - an index in the buffer. Pages in the buffer are
// codes, if there is a codec; a chunk that has its last tokens in a page that was full with them, and lies in the pool
// as its codes have it, finds it in `exact` as it was.
template <class T>
struct Pages {
    const T* pool;
    int64_t num_slots;
    const void* buffer;
    int64_t stride;  // bytes from a page of the buffer to the next one
    Codec codec;
    int64_t block;   // bytes of a head's coded keys, or values, of a page
    const T* exact;  // `[pages][2][kv_heads][page_size][dim]`

    Part<T> find(int64_t entry, int64_t head, const Shape& shape) const {
        if (entry >= 0) {
            const T* keys = pool + entry * shape.page() + head * shape.part();
            return {keys, keys + num_slots * shape.page()};
        }
        auto* page = static_cast<const uint8_t*>(buffer) + (-1 - entry) * stride;
        if (codec == Codec::NONE) return side_by_side(reinterpret_cast<const T*>(page), head, shape);
        auto* keys = page + head * block;
        return {nullptr, nullptr, keys, keys + shape.kv_heads * block};
    }

    // One of `exact`.
    Part<T> find_exact(int64_t index, int64_t head, const Shape& shape) const {
        return side_by_side(exact + index * 2 * shape.page(), head, shape);
    }

    Part<T> find(const Chunk& chunk, const int64_t* table, int64_t page, int64_t head, const Shape& shape) const {
        if (chunk.exact >= 0 && page == chunk.start / shape.page_size) return find_exact(chunk.exact, head, shape);
        return find(table[chunk.table + page], head, shape);
    }

  private:
    static Part<T> side_by_side(const T* page, int64_t head, const Shape& shape) {
        const T* keys = page + head * shape.part();
        return {keys, keys + shape.page()};
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

// Coded rows, of keys by channel and of values by token, as panels of 16 of their columns, and zeros up to `depth`: what
// codes stand for as it would lie in a page of numbers.
template <class T, Codec C>
void pack_coded(const CodedRows<T, C>& coded, int64_t depth, RowElement<T>* panels) {
    int64_t group = coded.group();
    for (int64_t first = 0; first < coded.count; first += group)
        for (int64_t r = 0; r < depth; r += IN_PAIRS<T> ? 2 : 1) {
            auto* to = panels + first * depth + r * LANES;
            if (r >= coded.rows)
                for (int64_t at = first; at < first + group; at += LANES, to += depth * LANES)
                    std::memset(static_cast<void*>(to), 0, sizeof(*to) * LANES * (IN_PAIRS<T> ? 2 : 1));
            else if constexpr (IN_PAIRS<T>)
                coded.pack_pair(r, first, to, depth * LANES);
            else
                coded.pack_row(r, first, to, depth * LANES);
        }
}

// --- states ---

// The states of some rows: `out [rows][dim]`, not yet divided by the sum of a row's weights, which are powers of 2 less
// the highest score. A row that has seen no key has the sum 0; that of any other is about 1 or more, or not a number.
struct States {
    float *out = nullptr, *highest = nullptr, *sums = nullptr;

    static int64_t size(int64_t rows, int64_t dim) { return rows * dim + 2 * round_up(rows, LANES); }

    States() = default;
    States(float* memory, int64_t rows, int64_t dim)
        : out(memory), highest(memory + rows * dim), sums(highest + round_up(rows, LANES)) {}

    // Those from row r on, a multiple of LANES.
    States from(int64_t r, int64_t dim) const {
        States rest = *this;
        rest.out += r * dim, rest.highest += r, rest.sums += r;
        return rest;
    }
};

// Merges the states of later keys, where there are any, into those of earlier ones.
inline void merge(States to, States later, int64_t rows, int64_t dim) {
    for (int64_t first = 0; first < rows; first += LANES) {
        float *highest = to.highest + first, *sums = to.sums + first;
        const float *later_highest = later.highest + first, *later_sums = later.sums + first;
        alignas(64) float earlier[LANES], next[LANES], before[LANES], after[LANES];
        for (int i = 0; i < LANES; ++i) {  // the highest score of what has seen no key is that of the other
            earlier[i] = sums[i] == 0 ? later_highest[i] : highest[i];
            next[i] = later_sums[i] == 0 ? highest[i] : later_highest[i];
        }
        Vec top = larger(load(next), load(earlier));
        store(before, power_of_2<6>(load(earlier) - top));
        store(after, power_of_2<6>(load(next) - top));
        store(highest, top);
        store(sums, fma(load(sums), load(before), load(later_sums) * load(after)));
        for (int64_t r = first; r < std::min(rows, first + LANES); ++r) {
            if (later.sums[r] == 0) continue;
            Vec kept = all(before[r - first]), added = all(after[r - first]);
            for (int64_t d = r * dim; d < (r + 1) * dim; d += LANES)
                store(to.out + d, fma(load(to.out + d), kept, load(later.out + d) * added));
        }
    }
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
        int64_t keys = most_ * depth_, values = most_ * dim_, weights = TILE_ROWS * weight_stride_;
        keys_ = packed_memory.get<E>(keys + values + 2 * weights);
        values_ = keys_ + keys;
        int64_t scores = TILE_ROWS * stride_, states = States::size(TILE_ROWS, dim_);
        float* numbers = number_memory.get<float>(2 * (scores + states));
        for (int64_t i = 0; i < 2; ++i, numbers += scores + states)
            slots_[i] = {numbers, values_ + values + i * weights, States(numbers + scores, TILE_ROWS, dim_)};
    }

    int64_t dim() const { return dim_; }      // of a row of a state
    int64_t depth() const { return depth_; }  // of a row of queries

    void pack(const Part<T>& page, Codec codec, int64_t count) {
        values_depth_ = padded_depth<E>(round_up(count, LANES));
        if (!page.coded_keys) {
            pack_keys(page.keys, count, shape_.dim, keys_);
            pack_values(page.values, count, shape_.dim, values_depth_, values_);
        } else if (codec == Codec::FP8) {
            pack_codes<Codec::FP8>(page);
        } else if (codec == Codec::INT8) {
            pack_codes<Codec::INT8>(page);
        } else {
            pack_codes<Codec::INT4>(page);
        }
    }

    // Gives the states of the rows of queries `[rows][depth]` over the page to `use(first row, count, states)`, up to
    // TILE_ROWS at a time. Row r sees the first `visible(r)` keys, no fewer than the rows before it. Tiles have been
    // configured for so many rows, or for 16, and there are zeros up to whole tiles then.
    template <class Visible, class Use>
    void attend(const E* queries, int64_t num_rows, Visible visible, Use use) {
        const Slot& slot = slots_[0];
        for (int64_t first = 0; first < num_rows; first += TILE_ROWS) {
            int64_t count = std::min(TILE_ROWS, num_rows - first), seen = visible(first + count - 1);
            int64_t panels = (seen + LANES - 1) / LANES, depth = padded_depth<E>(panels * LANES);
            multiply<E>(Rows<E>::plain(queries + first * depth_, depth_), count, keys_, panel_size<E>(shape_.dim),
                        panels, depth_, slot.scores, stride_);
            weigh(slot, count, depth, [&](int64_t r) { return visible(first + r); }, [] {});
            if (depth)
                multiply<E>(Rows<E>::plain(slot.weights, weight_stride_), count, values_, values_depth_ * LANES,
                            dim_ / LANES, depth, slot.states.out, dim_);
            use(first, count, slot.states);
        }
    }

#ifdef __AMX_BF16__
    // As `attend`, for queries that are zeros up to a multiple of TILE_ROWS and with tiles configured for 16 rows; rows
    // that see no key may be left out. While the weights of some rows are computed, the products of those before and
    // after them go on.
    template <class Visible, class Use>
    void attend_overlapped(const E* queries, int64_t num_rows, Visible visible, Use use) {
        auto count_from = [&](int64_t first) { return std::min(TILE_ROWS, num_rows - first); };
        auto depth_from = [&](int64_t first) {
            return padded_depth<E>(round_up(visible(first + count_from(first) - 1), LANES));
        };
        auto scores_from = [&](int64_t first, const Slot& slot) {
            return TileSteps(Rows<E>::plain(queries + first * depth_, depth_), keys_, panel_size<E>(shape_.dim),
                             depth_from(first) / LANES, depth_, slot.scores, stride_);
        };
        auto out_from = [&](int64_t first, const Slot& slot) {
            return TileSteps(Rows<E>::plain(slot.weights, weight_stride_), values_, values_depth_ * LANES,
                             dim_ / LANES, depth_from(first), slot.states.out, dim_);
        };
        int64_t first = 0;
        while (first < num_rows && !depth_from(first)) first += TILE_ROWS;
        if (first >= num_rows) return;
        scores_from(first, slots_[0]).finish();
        TileSteps out;
        for (int64_t i = 0; first < num_rows; first += TILE_ROWS, ++i) {
            const Slot &slot = slots_[i % 2], &other = slots_[1 - i % 2];
            int64_t next = first + TILE_ROWS;
            TileSteps scores;
            if (next < num_rows) scores = scores_from(next, other);
            auto step = [&] {
                if (!out.is_done())
                    out.step();
                else if (!scores.is_done())
                    scores.step();
            };
            weigh(slot, count_from(first), depth_from(first), [&](int64_t r) { return visible(first + r); }, step);
            out.finish();
            scores.finish();
            if (i) use(first - TILE_ROWS, TILE_ROWS, other.states);
            out = out_from(first, slot);
            if (next >= num_rows) {
                out.finish();
                use(first, count_from(first), slot.states);
            }
        }
    }
#endif

  private:
    // Of a whole page, as all are that are codes. Its keys lie as the panels of a product want them, by channel.
    template <Codec C>
    void pack_codes(const Part<T>& page) {
        pack_coded(CodedRows<T, C>(page.coded_keys, shape_.dim, shape_.page_size), depth_, keys_);
        pack_coded(CodedRows<T, C>(page.coded_values, shape_.page_size, shape_.dim), values_depth_, values_);
    }

    // Of up to TILE_ROWS rows.
    struct Slot {
        float* scores;
        E* weights;
        States states;
    };

    // Weights of scores, zeros up to `depth`, and their sums. Calls `between()` after each row.
    template <class Visible, class Between>
    void weigh(const Slot& slot, int64_t num_rows, int64_t depth, Visible visible, Between between) {
        for (int64_t first = 0; first < num_rows; first += LANES) {
            int64_t count = std::min<int64_t>(LANES, num_rows - first);
            const float* scores = slot.scores + first * stride_;
            E* weights = slot.weights + first * weight_stride_;
            Vec rows[LANES];
            for (auto& row : rows) row = zeros();
            for (int64_t r = 0; r < count; ++r) rows[r] = highest_of(scores + r * stride_, visible(first + r));
            store(slot.states.highest + first, largest(rows) * all(scale_));
            for (int64_t r = 0; r < count; ++r) {
                rows[r] = weigh_row(scores + r * stride_, slot.states.highest[first + r], visible(first + r), depth,
                                    weights + r * weight_stride_);
                between();
            }
            store(slot.states.sums + first, sums(rows));
        }
    }

    Vec highest_of(const float* scores, int64_t visible) {
        Vec high[4];  // side by side, since each waits for the one before it
        for (auto& each : high) each = all(-std::numeric_limits<float>::infinity());
        int64_t k = 0;
        for (; k + 4 * LANES <= visible; k += 4 * LANES)
            for (int64_t i = 0; i < 4; ++i) high[i] = larger(load(scores + k + i * LANES), high[i]);
        for (; k + LANES <= visible; k += LANES) high[0] = larger(load(scores + k), high[0]);
        if (k < visible) high[1] = larger(lowest_from(load(scores + k), static_cast<int>(visible - k)), high[1]);
        return larger(larger(high[0], high[1]), larger(high[2], high[3]));
    }

    Vec weigh_row(const float* scores, float highest, int64_t visible, int64_t depth, E* weights) {
        int64_t whole = visible / LANES * LANES;  // up to which all lanes are visible
        int rest = static_cast<int>(visible - whole);
        Vec total = zeros(), scale = all(scale_), low = all(-highest);
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
        return total;
    }

    Shape shape_;
    float scale_;
    int64_t dim_, depth_, most_, stride_, weight_stride_, values_depth_ = 0;
    E *keys_, *values_;
    Slot slots_[2];
};

// --- rows of queries and of results ---

// Queries `[rows][heads][dim]`, whose rows may lie apart.
template <class T>
struct Queries {
    const T* data;
    int64_t stride;

    // Those of the rows of a KV head from row `first` of a chunk on, which begins at `row`: `[count][depth]`, with zeros
    // up to whole tiles.
    void pack(const Shape& shape, int64_t row, int64_t head, int64_t first, int64_t count, int64_t depth,
              RowElement<T>* to) const {
        int64_t group = shape.group(), whole = round_up(count, TILE_ROWS);
        for (int64_t r = 0; r < whole; ++r, to += depth) {
            int64_t done = 0;
            if (r < count) {
                int64_t token = (first + r) / group, member = (first + r) % group;
                const T* from = data + (row + token) * stride + (head * group + member) * shape.dim;
                for (; done < shape.dim; done += LANES) {
                    int lanes = static_cast<int>(std::min<int64_t>(LANES, shape.dim - done));
                    store(to + done, load(from + done, lanes), lanes);
                }
                done = shape.dim;
            }
            std::memset(static_cast<void*>(to + done), 0, sizeof(*to) * (depth - done));
        }
    }
};

// A row's state as it is kept: `out [dim]`, then the highest score and the sum.
inline void keep(const float* out, float highest, float sum, int64_t dim, float* to) {
    std::memcpy(to, out, sizeof(float) * dim);
    to[dim] = highest, to[dim + 1] = sum;
}

// Divides a row's sum of values by its weights, and rounds.
template <class T>
void finish(const float* out, float sum, int64_t dim, T* to) {
    Vec share = all(1.f / sum);
    for (int64_t d = 0; d < dim; d += LANES)
        store(to + d, load(out + d) * share, static_cast<int>(std::min<int64_t>(LANES, dim - d)));
}

// --- sequences ---

// All that a call is given. `kept` holds states between calls, `[rows][heads][dim() + 2]`; it is null where every chunk
// meets all its pages in one call. `page_states` takes the highest score and the sum of each row over each page,
// `[entries of the table][kv_heads][page_rows][2]`, from chunks of few rows; null where nobody wants them.
template <class T>
struct Call {
    Shape shape;
    Pages<T> pages;
    const int64_t* table;
    Queries<T> queries;
    float* kept;
    float* page_states;
    int64_t page_rows;
    T* out;
    int num_threads;

    int64_t kept_dim() const { return round_up(shape.dim, LANES); }

    // The row of q, and the query head, of row r of a chunk's KV head.
    int64_t row_of(const Chunk& chunk, int64_t r) const { return chunk.row + r / shape.group(); }
    int64_t head_of(int64_t r, int64_t head) const { return head * shape.group() + r % shape.group(); }

    // Where the state of a row is kept: `out`, then the highest score and the sum.
    float* kept_state(int64_t row, int64_t head) const { return kept + (row * shape.heads + head) * (kept_dim() + 2); }

    // Makes states those with which `count` rows of a chunk begin, from row `first` on.
    void begin(const Chunk& chunk, int64_t first, int64_t count, int64_t head, States states) const {
        for (int64_t i = 0; i < count; ++i) {
            float* out = states.out + i * kept_dim();
            if (chunk.first) {
                const float* from = kept_state(row_of(chunk, first + i), head_of(first + i, head));
                std::memcpy(out, from, sizeof(float) * kept_dim());
                states.highest[i] = from[kept_dim()], states.sums[i] = from[kept_dim() + 1];
            } else {
                std::memset(out, 0, sizeof(float) * kept_dim());
                states.highest[i] = states.sums[i] = 0;
            }
        }
    }

    // Divides, rounds and writes the results of rows, or keeps their states.
    void end(const Chunk& chunk, int64_t first, int64_t count, int64_t head, States states) const {
        for (int64_t i = 0; i < count; ++i) {
            int64_t row = row_of(chunk, first + i), query_head = head_of(first + i, head);
            const float* from = states.out + i * kept_dim();
            if (chunk.is_last)
                finish(from, states.sums[i], shape.dim, out + (row * shape.heads + query_head) * shape.dim);
            else
                keep(from, states.highest[i], states.sums[i], kept_dim(), kept_state(row, query_head));
        }
    }
};

// How many keys of a page a token sees, the new one `token` of a sequence whose first new token is at `start`.
inline int64_t visible_keys(int64_t start, int64_t token, int64_t page, int64_t page_size) {
    return std::clamp<int64_t>(start + token + 1 - page * page_size, 0, page_size);
}

// Chunks of few rows: states of pages side by side, then their merge.
template <class T>
void attend_few(const Call<T>& call, const Chunk* chunks, int64_t num_chunks) {
    static thread_local Scratch state_memory, index_memory;
    const Shape& shape = call.shape;
    int64_t group = shape.group(), most_rows = 0;
    // numbers pages over all chunks
    auto* firsts = index_memory.get<int64_t>(num_chunks + 1);
    firsts[0] = 0;
    for (int64_t i = 0; i < num_chunks; ++i) {
        firsts[i + 1] = firsts[i] + chunks[i].end - chunks[i].first;
        most_rows = std::max(most_rows, chunks[i].num_tokens * group);
    }
    auto number_of = [&](int64_t number) { return std::upper_bound(firsts, firsts + num_chunks, number) - firsts - 1; };

    int64_t size = States::size(most_rows, call.kept_dim());
    int64_t per_page = shape.kv_heads * size, total = firsts[num_chunks];
    int64_t window = std::min(total, std::max<int64_t>(1, (2 << 20) / per_page));  // whose states are held: 8 MiB
    float* states = state_memory.get<float>((window + num_chunks) * per_page);
    float* running = states + window * per_page;
    auto states_at = [&](float* memory, int64_t number, int64_t head) {
        return States(memory + number * per_page + head * size, most_rows, call.kept_dim());
    };
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
                int64_t count = visible_keys(chunk.start, chunk.num_tokens - 1, page, shape.page_size);
                call.queries.pack(shape, chunk.row, head, 0, rows, one.depth(), queries);
                one.pack(call.pages.find(chunk, call.table, page, head, shape), call.pages.codec, count);
                States to = states_at(states, number - from, head);
                Tiles tiles(rows);
                auto visible = [&](int64_t r) { return visible_keys(chunk.start, r / group, page, shape.page_size); };
                one.attend(queries, rows, visible, [&](int64_t first, int64_t count, States found) {
                    std::memcpy(to.out + first * one.dim(), found.out, sizeof(float) * count * one.dim());
                    std::memcpy(to.highest + first, found.highest, sizeof(float) * count);
                    std::memcpy(to.sums + first, found.sums, sizeof(float) * count);
                });
                if (call.page_states) {
                    int64_t entry = (chunk.table + page) * shape.kv_heads + head;
                    float* told = call.page_states + entry * call.page_rows * 2;
                    for (int64_t r = 0; r < rows; ++r) told[2 * r] = to.highest[r], told[2 * r + 1] = to.sums[r];
                }
            }
            int64_t begins = number_of(from), ends = number_of(to - 1) + 1;
#pragma omp for schedule(static)
            for (int64_t task = begins * shape.kv_heads; task < ends * shape.kv_heads; ++task) {
                int64_t at = task / shape.kv_heads, head = task % shape.kv_heads;
                const Chunk& chunk = chunks[at];
                int64_t rows = chunk.num_tokens * group;
                States state = states_at(running, at, head);
                if (firsts[at] >= from) call.begin(chunk, 0, rows, head, state);
                for (int64_t n = std::max(from, firsts[at]); n < std::min(to, firsts[at + 1]); ++n)
                    merge(state, states_at(states, n - from, head), rows, one.dim());
                if (firsts[at + 1] <= to) call.end(chunk, 0, rows, head, state);
            }
        }
    }
}

// Chunks of many rows: a task takes some tokens of a KV head through all pages.
template <class T>
void attend_many(const Call<T>& call, const Chunk* chunks, int64_t num_chunks) {
    static thread_local Scratch index_memory;
    const Shape& shape = call.shape;
    int64_t group = shape.group(), all_tokens = 0;
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
        int64_t most_rows = block * group;
        States states(state_memory.get<float>(States::size(most_rows, one.dim())), most_rows, one.dim());
        Tiles tiles(16);
#pragma omp for schedule(dynamic)
        for (int64_t task = firsts[num_chunks] - 1; task >= 0; --task) {  // the later ones of a chunk see more keys
            int64_t at = std::upper_bound(firsts, firsts + num_chunks, task) - firsts - 1;
            const Chunk& chunk = chunks[at];
            int64_t head = (task - firsts[at]) % shape.kv_heads, token = (task - firsts[at]) / shape.kv_heads * block;
            int64_t num_tokens = std::min(block, chunk.num_tokens - token), rows = num_tokens * group;
            int64_t first = token * group;
            call.queries.pack(shape, chunk.row, head, first, rows, one.depth(), queries);
            call.begin(chunk, first, rows, head, states);
            for (int64_t page = chunk.first; page < chunk.end; ++page) {
                int64_t count = visible_keys(chunk.start, token + num_tokens - 1, page, shape.page_size);
                if (!count) break;
                one.pack(call.pages.find(chunk, call.table, page, head, shape), call.pages.codec, count);
                auto visible = [&](int64_t r) {
                    return visible_keys(chunk.start, (first + r) / group, page, shape.page_size);
                };
                auto merge_into = [&](int64_t from, int64_t count, States found) {
                    merge(states.from(from, one.dim()), found, count, one.dim());
                };
#ifdef __AMX_BF16__
                if constexpr (IN_TILES<T>) {
                    one.attend_overlapped(queries, rows, visible, merge_into);
                    continue;
                }
#endif
                one.attend(queries, rows, visible, merge_into);
            }
            call.end(chunk, first, rows, head, states);
        }
    }
}

}  // namespace
