// The one matrix product, C = A B, behind the linear layers and attention alike.
//
// Each element of C is a sum over K in one order that the instruction set fixes, whatever the number of rows, and in one
// accumulator. So a row of C is a function of its row of A, and of B.
//
// B comes in panels of 16 columns, A in rows (`Rows`), C leaves as fp32.
#pragma once

#include "simd.hpp"

namespace {

// --- how operands lie in memory ---

#ifdef __AVX512BF16__
constexpr bool HAS_PAIRS = true;  // products of pairs of bf16, by AMX or AVX512-BF16
#else
constexpr bool HAS_PAIRS = false;
#endif

#ifdef __AMX_BF16__
constexpr bool HAS_TILES = true;
#else
constexpr bool HAS_TILES = false;
#endif

// What is multiplied where the elements of B are of type T: rows of bf16, or rows widened to fp32.
template <class T>
constexpr bool IN_PAIRS = HAS_PAIRS && std::is_same_v<T, bf16>;

// Whether that is done by tiles.
template <class T>
constexpr bool IN_TILES = HAS_TILES && IN_PAIRS<T>;

template <class T>
using RowElement = std::conditional_t<IN_PAIRS<T>, bf16, float>;

// A panel holds 16 columns of B: of bf16 `[K / 2][16][2]`, two rows interleaved, K padded with zeros to a multiple of 32
// (a tile's), else `[K][16]`.
template <class T>
constexpr int64_t padded_depth(int64_t depth) {
    return std::is_same_v<T, bf16> ? round_up(depth, 32) : depth;
}
template <class T>
constexpr int64_t panel_size(int64_t depth) {
    return padded_depth<T>(depth) * LANES;
}

// Where the element of row k and column n of a panel lies.
template <class T>
constexpr int64_t panel_index(int64_t k, int64_t n) {
    return std::is_same_v<T, bf16> ? k / 2 * 32 + n * 2 + k % 2 : k * LANES + n;
}

// Rows of A. With tiles, 16 rows by 32 elements are a tile: it lies at `data + row / 16 * block + k / 32 * step`, its
// rows `stride` apart, and there are as many rows in memory as fill the last tile. Else a row lies at
// `data + row * stride`. Either has zeros up to `padded_depth`.
template <class E>
struct Rows {
    const E* data;
    int64_t stride, block, step;

    static Rows plain(const E* data, int64_t stride) { return {data, stride, 16 * stride, 32}; }
};

// --- tiles ---

#ifdef __AMX_BF16__

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};

    explicit TileConfig(int num_rows) {
        for (int i = 0; i < 8; ++i) bytes[i] = 64, rows[i] = 16;
        for (int i = 0; i < 6; ++i) rows[i] = static_cast<uint8_t>(num_rows);  // those of C and A, see `Tiles`
    }
};

// What the compiler cannot know: instructions of tiles read and write memory.
inline void memory_is_used() { asm volatile("" ::: "memory"); }

// Tiles 0 to 3 are C, 4 (and 5 where there are two rows of tiles) A, the others B. For fewer than 16 rows, tiles of A
// and C are that much shorter; the arithmetic of a row is the same.
struct Tiles {
    explicit Tiles(int64_t num_rows) {
        TileConfig config(static_cast<int>(std::min<int64_t>(num_rows, 16)));
        asm volatile("" ::"r"(&config) : "memory");
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
};

// C of up to 4 panels for one row of tiles.
template <int PANELS>
inline void tile_row(Rows<bf16> a, int64_t tile, const bf16* const* b, int64_t depth, float* c, int64_t c_stride) {
    const bf16* rows = a.data + tile * a.block;
    memory_is_used();
    _tile_zero(0);
    if constexpr (PANELS > 1) _tile_zero(1);
    if constexpr (PANELS > 2) _tile_zero(2);
    if constexpr (PANELS > 3) _tile_zero(3);
    for (int64_t k = 0; k < depth; k += 32) {
        _tile_loadd(4, rows + k / 32 * a.step, a.stride * 2);
        _tile_loadd(6, b[0] + k * 16, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (PANELS > 1) {
            _tile_loadd(7, b[1] + k * 16, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (PANELS > 2) {
            _tile_loadd(6, b[2] + k * 16, 64);
            _tile_dpbf16ps(2, 4, 6);
        }
        if constexpr (PANELS > 3) {
            _tile_loadd(7, b[3] + k * 16, 64);
            _tile_dpbf16ps(3, 4, 7);
        }
    }
    _tile_stored(0, c, c_stride * 4);
    if constexpr (PANELS > 1) _tile_stored(1, c + 16, c_stride * 4);
    if constexpr (PANELS > 2) _tile_stored(2, c + 32, c_stride * 4);
    if constexpr (PANELS > 3) _tile_stored(3, c + 48, c_stride * 4);
    memory_is_used();
}

// C of two rows of tiles, 2 panels at a time, by steps of 32 elements of K, so that other work can come between them:
// what a step gives to the tiles goes on while the instructions after it do.
class TileSteps {
  public:
    TileSteps() = default;  // that are done
    TileSteps(Rows<bf16> a, const bf16* b, int64_t panel_stride, int64_t num_panels, int64_t depth, float* c,
              int64_t c_stride)
        : a_(a),
          b_(b),
          panel_stride_(panel_stride),
          num_panels_(num_panels),
          depth_(depth),
          c_(c),
          c_stride_(c_stride) {}

    bool is_done() const { return num_panels_ <= 0; }

    void step() {
        const bf16 *upper = a_.data + k_ / 32 * a_.step, *lower = upper + a_.block, *b = b_ + k_ * LANES;
        bool is_pair = num_panels_ > 1;
        memory_is_used();
        if (k_ == 0) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        _tile_loadd(6, b, 64);
        _tile_loadd(4, upper, a_.stride * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, lower, a_.stride * 2);
        _tile_dpbf16ps(2, 5, 6);
        if (is_pair) {
            _tile_loadd(7, b + panel_stride_, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        k_ += 32;
        if (k_ < depth_) return;
        float* lower_c = c_ + 16 * c_stride_;
        _tile_stored(0, c_, c_stride_ * 4);
        _tile_stored(2, lower_c, c_stride_ * 4);
        if (is_pair) {
            _tile_stored(1, c_ + 16, c_stride_ * 4);
            _tile_stored(3, lower_c + 16, c_stride_ * 4);
        }
        memory_is_used();
        b_ += 2 * panel_stride_, c_ += 2 * LANES, num_panels_ -= 2, k_ = 0;
    }

    void finish() {
        while (!is_done()) step();
    }

  private:
    Rows<bf16> a_{};
    const bf16* b_ = nullptr;
    int64_t panel_stride_ = 0, num_panels_ = 0, depth_ = 0, k_ = 0;
    float* c_ = nullptr;
    int64_t c_stride_ = 0;
};

#else

struct Tiles {
    explicit Tiles(int64_t) {}
};

#endif

// --- registers ---

// What the registers hold: that many rows by that many panels, or one row by 4 panels.
#ifdef __AVX512F__
constexpr int MOST_ROWS = 6, MOST_PANELS = 4;
#else
constexpr int MOST_ROWS = 4, MOST_PANELS = 1;
#endif

// C of some rows and panels, in registers.
template <class T, int ROWS, int PANELS>
inline void in_registers(const RowElement<T>* a, int64_t stride, const T* const* b, int64_t depth, float* c,
                         int64_t c_stride) {
    Vec sums[ROWS][PANELS];
    for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < PANELS; ++p) sums[r][p] = zeros();
    if constexpr (std::is_same_v<T, bf16>) {
        for (int64_t k = 0; k < depth; k += 2) {
#ifdef __AVX512BF16__
            __m512bh panels[PANELS];
            for (int p = 0; p < PANELS; ++p) panels[p] = (__m512bh)_mm512_loadu_si512(b[p] + k * LANES);
            for (int r = 0; r < ROWS; ++r) {
                int32_t pair;
                std::memcpy(&pair, a + r * stride + k, 4);
                __m512bh two = (__m512bh)_mm512_set1_epi32(pair);
                for (int p = 0; p < PANELS; ++p) sums[r][p].v = _mm512_dpbf16_ps(sums[r][p].v, two, panels[p]);
            }
#else
            for (int p = 0; p < PANELS; ++p) {
                Vec even = even_of(b[p] + k * LANES), odd = odd_of(b[p] + k * LANES);
                for (int r = 0; r < ROWS; ++r) {
                    sums[r][p] = fma(all(a[r * stride + k]), even, sums[r][p]);
                    sums[r][p] = fma(all(a[r * stride + k + 1]), odd, sums[r][p]);
                }
            }
#endif
        }
    } else {
        for (int64_t k = 0; k < depth; ++k)
            for (int p = 0; p < PANELS; ++p) {
                Vec panel = load(b[p] + k * LANES);
                for (int r = 0; r < ROWS; ++r) sums[r][p] = fma(all(a[r * stride + k]), panel, sums[r][p]);
            }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < PANELS; ++p) store(c + r * c_stride + p * LANES, sums[r][p]);
}

template <class T, int PANELS>
inline void rows_in_registers(int count, const RowElement<T>* a, int64_t stride, const T* const* b, int64_t depth,
                              float* c, int64_t c_stride) {
    if (count == 1) return in_registers<T, 1, PANELS>(a, stride, b, depth, c, c_stride);
    if constexpr (PANELS <= MOST_PANELS) {
        if (count == 2) return in_registers<T, 2, PANELS>(a, stride, b, depth, c, c_stride);
        if (count == 3) return in_registers<T, 3, PANELS>(a, stride, b, depth, c, c_stride);
        if (count == 4) return in_registers<T, 4, PANELS>(a, stride, b, depth, c, c_stride);
        if constexpr (MOST_ROWS > 4) {
            if (count == 5) return in_registers<T, 5, PANELS>(a, stride, b, depth, c, c_stride);
            return in_registers<T, 6, PANELS>(a, stride, b, depth, c, c_stride);
        }
    }
}

// --- the product ---

// C `[rows][panels * 16]` of A and panels that lie `panel_stride` elements apart. `depth` is padded. With tiles, C has
// rows for whole tiles where there are 16 or more, and the caller has configured `Tiles` for as many rows.
template <class T>
inline void multiply(Rows<RowElement<T>> a, int64_t num_rows, const T* b, int64_t panel_stride, int64_t num_panels,
                     int64_t depth, float* c, int64_t c_stride) {
    const T* panels[4];
#ifdef __AMX_BF16__
    if constexpr (IN_TILES<T>) {
        int64_t num_tiles = (num_rows + 15) / 16, tile = num_tiles / 2 * 2;
        for (int64_t p = 0; p < num_panels; p += 2)  // of which two stay in the first cache while rows pass by
            for (int64_t t = 0; t < tile; t += 2) {
                auto rows = a;
                rows.data += t * a.block;
                TileSteps(rows, b + p * panel_stride, panel_stride, std::min<int64_t>(2, num_panels - p), depth,
                          c + t * 16 * c_stride + p * LANES, c_stride)
                    .finish();
            }
        if (tile < num_tiles)
            for (int64_t p = 0; p < num_panels; p += 4) {
                float* to = c + tile * 16 * c_stride + p * LANES;
                for (int i = 0; i < 4; ++i) panels[i] = b + (p + i) * panel_stride;
                switch (num_panels - p) {
                    case 1: tile_row<1>(a, tile, panels, depth, to, c_stride); break;
                    case 2: tile_row<2>(a, tile, panels, depth, to, c_stride); break;
                    case 3: tile_row<3>(a, tile, panels, depth, to, c_stride); break;
                    default: tile_row<4>(a, tile, panels, depth, to, c_stride);
                }
            }
        return;
    }
#endif
    int64_t most = num_rows == 1 ? 4 : MOST_PANELS;
    for (int64_t p = 0; p < num_panels; p += most) {
        int64_t width = std::min(num_panels - p, most);
        for (int64_t i = 0; i < width; ++i) panels[i] = b + (p + i) * panel_stride;
        for (int64_t r = 0; r < num_rows; r += MOST_ROWS) {
            int count = static_cast<int>(std::min<int64_t>(num_rows - r, MOST_ROWS));
            const auto* rows = a.data + r * a.stride;
            float* to = c + r * c_stride + p * LANES;
            switch (width) {
                case 1: rows_in_registers<T, 1>(count, rows, a.stride, panels, depth, to, c_stride); break;
                case 2: rows_in_registers<T, 2>(count, rows, a.stride, panels, depth, to, c_stride); break;
                case 3: rows_in_registers<T, 3>(count, rows, a.stride, panels, depth, to, c_stride); break;
                default: rows_in_registers<T, 4>(count, rows, a.stride, panels, depth, to, c_stride);
            }
        }
    }
}

}  // namespace
