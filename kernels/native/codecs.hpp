// Pages as codes and scales, see `codec_format.py`, which says how they lie, and `page_codec.py`, which defines them bit for
// bit.
#pragma once

#include <array>
#include <cmath>
#include <numeric>

#include "scratch.hpp"
#include "simd.hpp"

namespace {

enum class Codec : int { NONE, FP8, INT8, INT4 };

template <Codec C>
constexpr float LEVELS = C == Codec::FP8 ? 448.f : C == Codec::INT8 ? 127.f : 15.f;
template <Codec C>
constexpr int64_t NUM_SCALES = C == Codec::INT4 ? 2 : 1;

// --- decoding ---

inline float number_of(float x) { return x; }
inline float number_of(bf16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}
inline float number_of(fp16 x) { return _cvtsh_ss(x.bits); }

// Sixteen bytes as numbers.
#ifdef __AVX512F__
inline Vec of_signed(__m128i bytes) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))}; }
inline Vec of_unsigned(__m128i bytes) { return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))}; }
inline Vec of_fp8(__m128i bytes) {
    __m512i wide = _mm512_cvtepu8_epi32(bytes), size = _mm512_and_si512(wide, _mm512_set1_epi32(0x7f));
    __m512i shifted = _mm512_slli_epi32(size, 20);
    // below the least normal number there is no leading one: that of 2^-6 is taken off again
    __m512 least = _mm512_castsi512_ps(_mm512_set1_epi32(121 << 23));
    __m512 small = _mm512_sub_ps(_mm512_castsi512_ps(_mm512_add_epi32(shifted, _mm512_set1_epi32(121 << 23))), least);
    __m512 normal = _mm512_castsi512_ps(_mm512_add_epi32(shifted, _mm512_set1_epi32(120 << 23)));
    __m512 found = _mm512_mask_mov_ps(normal, _mm512_cmplt_epi32_mask(size, _mm512_set1_epi32(8)), small);
    __m512i sign = _mm512_slli_epi32(_mm512_and_si512(wide, _mm512_set1_epi32(0x80)), 24);
    return {_mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(found), sign))};
}
// `then` in the lanes where a is b, else `otherwise`
inline Vec where_equal(Vec a, Vec b, Vec then, Vec otherwise) {
    return {_mm512_mask_mov_ps(otherwise.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ), then.v)};
}
#else
inline __m256i low_bytes(__m128i bytes) { return _mm256_cvtepu8_epi32(bytes); }
inline __m256i high_bytes(__m128i bytes) { return _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)); }
inline Vec of_signed(__m128i bytes) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
inline Vec of_unsigned(__m128i bytes) {
    return {_mm256_cvtepi32_ps(low_bytes(bytes)), _mm256_cvtepi32_ps(high_bytes(bytes))};
}
inline __m256 of_fp8(__m256i wide) {
    __m256i size = _mm256_and_si256(wide, _mm256_set1_epi32(0x7f)), shifted = _mm256_slli_epi32(size, 20);
    __m256 least = _mm256_castsi256_ps(_mm256_set1_epi32(121 << 23));
    __m256 small = _mm256_sub_ps(_mm256_castsi256_ps(_mm256_add_epi32(shifted, _mm256_set1_epi32(121 << 23))), least);
    __m256 normal = _mm256_castsi256_ps(_mm256_add_epi32(shifted, _mm256_set1_epi32(120 << 23)));
    __m256i is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(8), size);
    __m256 found = _mm256_blendv_ps(normal, small, _mm256_castsi256_ps(is_small));
    __m256i sign = _mm256_slli_epi32(_mm256_and_si256(wide, _mm256_set1_epi32(0x80)), 24);
    return _mm256_castsi256_ps(_mm256_or_si256(_mm256_castps_si256(found), sign));
}
inline Vec of_fp8(__m128i bytes) { return {of_fp8(low_bytes(bytes)), of_fp8(high_bytes(bytes))}; }
inline __m256 where_equal(__m256 a, __m256 b, __m256 then, __m256 otherwise) {
    return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(a, b, _CMP_EQ_OQ));
}
inline Vec where_equal(Vec a, Vec b, Vec then, Vec otherwise) {
    return {where_equal(a.low, b.low, then.low, otherwise.low), where_equal(a.high, b.high, then.high, otherwise.high)};
}
#endif

// What codes of one row and group stand for.
template <class T, Codec C>
struct Scales {
    Vec lowest, highest, step;

    Scales(float first, float last)
        : lowest(all(NUM_SCALES<C> == 1 ? 0.f : first)),
          highest(all(last)),
          step(all((last - (NUM_SCALES<C> == 1 ? 0.f : first)) * (1.f / LEVELS<C>))) {}

    // Not yet rounded to T. The ends of a group are kept as they are; rounding to fewer bits does so by itself for those
    // that are a multiple of the step.
    Vec numbers(Vec codes) const {
        if constexpr (C == Codec::INT4) return where_equal(codes, all(LEVELS<C>), highest, lowest + codes * step);
        Vec found = codes * step;
        if constexpr (std::is_same_v<T, float>) {
            found = where_equal(codes, all(LEVELS<C>), highest, found);
            found = where_equal(codes, all(-LEVELS<C>), zeros() - highest, found);
        }
        return found;
    }
};

// As it would lie in a page of numbers.
template <class T>
inline Vec as_stored(Vec numbers) {
    if constexpr (std::is_same_v<T, float>) return numbers;
    alignas(64) T held[LANES];
    store(held, numbers);
    return load(held);
}

// A head's keys of a page, a row for each channel, or its values, a row for each token: `count` numbers each.
template <class T, Codec C>
class CodedRows {
  public:
    const int64_t rows, count;

    CodedRows(const uint8_t* block, int64_t rows, int64_t count)
        : rows(rows), count(count), codes_(block), scales_(reinterpret_cast<const T*>(block + scales_at(rows, count))) {}

    static int64_t row_bytes(int64_t count) { return C == Codec::INT4 ? count / 2 : count; }
    static int64_t scales_at(int64_t rows, int64_t count) { return rows * row_bytes(count); }
    static int64_t bytes(int64_t rows, int64_t count) {
        int64_t scales = count / group_of(rows, count) * NUM_SCALES<C> * rows;
        return scales_at(rows, count) + scales * static_cast<int64_t>(sizeof(T));
    }
    // Neighbours in a row that share their scales.
    static int64_t group_of(int64_t rows, int64_t count) { return std::gcd(std::gcd(int64_t{64}, rows), count); }
    int64_t group() const { return group_of(rows, count); }

    Scales<T, C> scales(int64_t row, int64_t at) const {
        const T* first = scales_ + at / group() * NUM_SCALES<C> * rows + row;
        return {number_of(first[0]), number_of(first[(NUM_SCALES<C> - 1) * rows])};
    }

    // Sixteen from `at` on.
    Vec codes(int64_t row, int64_t at) const {
        const uint8_t* from = codes_ + row * row_bytes(count);
        if constexpr (C == Codec::INT4) {
            __m128i mask = _mm_set1_epi8(15);
            if (group() % 32) {
                __m128i both = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + at / 2));
                __m128i high = _mm_and_si128(_mm_srli_epi16(both, 4), mask);
                return of_unsigned(_mm_unpacklo_epi64(_mm_and_si128(both, mask), high));
            }
            __m128i both = bytes_at(from + at / 32 * 16);
            return of_unsigned(_mm_and_si128(at % 32 ? _mm_srli_epi16(both, 4) : both, mask));
        } else {
            return C == Codec::INT8 ? of_signed(bytes_at(from + at)) : of_fp8(bytes_at(from + at));
        }
    }

    // A group's numbers from `first` on, sixteen at a time to places `stride` apart: of one row, widened, or of two rows by
    // turns.
    void pack_row(int64_t row, int64_t first, float* to, int64_t stride) const {
        Scales<T, C> one = scales(row, first);
        for (int64_t at = first; at < first + group(); at += LANES, to += stride)
            store(to, as_stored<T>(one.numbers(codes(row, at))));
    }
#ifdef __AVX512BF16__
    void pack_pair(int64_t row, int64_t first, bf16* to, int64_t stride) const {
        Scales<T, C> one = scales(row, first), two = scales(row + 1, first);
        if (C == Codec::INT4 && group() % 32 == 0) {
            // what each of the sixteen codes stands for is looked up
            __m512i low = table(one), high = _mm512_slli_epi32(table(two), 16);
            const uint8_t* from = codes_ + row * row_bytes(count);
            for (int64_t at = first; at < first + group(); at += 32) {
                __m512i a = _mm512_cvtepu8_epi32(bytes_at(from + at / 2));
                __m512i b = _mm512_cvtepu8_epi32(bytes_at(from + row_bytes(count) + at / 2));
                for (int half = 0; half < 2; ++half, to += stride) {
                    __m512i found = _mm512_or_si512(_mm512_permutexvar_epi32(a, low), _mm512_permutexvar_epi32(b, high));
                    _mm512_storeu_si512(to, found);
                    a = _mm512_srli_epi32(a, 4), b = _mm512_srli_epi32(b, 4);
                }
            }
        } else {
            alignas(64) static constexpr auto BY_TURNS = [] {
                std::array<int16_t, 32> places{};
                for (int16_t i = 0; i < 32; ++i) places[i] = static_cast<int16_t>(i / 2 + i % 2 * 16);
                return places;
            }();
            __m512i by_turns = _mm512_load_si512(BY_TURNS.data());
            for (int64_t at = first; at < first + group(); at += LANES, to += stride) {
                Vec a = one.numbers(codes(row, at)), b = two.numbers(codes(row + 1, at));
                auto both = (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v);
                _mm512_storeu_si512(to, _mm512_permutexvar_epi16(by_turns, both));
            }
        }
    }
#endif

  private:
    static __m128i bytes_at(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
#ifdef __AVX512BF16__
    static __m512i table(const Scales<T, C>& scales) {
        Vec all_codes{_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
        return _mm512_cvtepu16_epi32(rounded(scales.numbers(all_codes)));
    }
#endif

    const uint8_t* codes_;
    const T* scales_;
};

// A head's keys, or values, of a page `[page_size][dim]`.
template <class T, Codec C>
void decode_block(const uint8_t* block, int64_t page_size, int64_t dim, bool are_keys, T* numbers) {
    CodedRows<T, C> coded(block, are_keys ? dim : page_size, are_keys ? page_size : dim);
    for (int64_t row = 0; row < coded.rows; ++row)
        for (int64_t at = 0; at < coded.count; at += LANES) {
            Vec found = coded.scales(row, at).numbers(coded.codes(row, at));
            if (!are_keys) {
                store(numbers + row * dim + at, found);
                continue;
            }
            alignas(64) T held[LANES];
            store(held, found);
            for (int64_t i = 0; i < LANES; ++i) numbers[(at + i) * dim + row] = held[i];
        }
}

// --- encoding: a page once, when it is full, and when it goes to another tier ---

// A number that is no larger than the highest one as e4m3, rounded to the nearest, to even in the middle.
inline uint8_t fp8_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    uint32_t sign = bits >> 24 & 0x80, size = bits & 0x7fffffff;
    if (size < (121u << 23)) {
        auto small = static_cast<uint32_t>(std::nearbyint(std::fabs(x) * 512));
        return static_cast<uint8_t>(small ? sign | small : 0);
    }
    size += (1u << 19) - 1 + (size >> 20 & 1);
    return static_cast<uint8_t>(sign | ((size >> 20) - (120 << 3)));
}

// The scales of a group, and what makes codes with them.
template <class T, Codec C>
struct Encoder {
    T scales[2];
    float lowest = 0, step = 0;

    // Of `count` numbers that lie `stride` apart.
    Encoder(const T* from, int64_t count, int64_t stride) {
        // where one is not finite, so are the scales
        float low = std::numeric_limits<float>::infinity(), high = -low, poison = 0, largest = 0;
        T at_low = from[0], at_high = from[0], at_largest = from[0];
        for (int64_t i = 0; i < count; ++i) {
            float x = number_of(from[i * stride]), size = std::fabs(x);
            poison += x * 0;
            if (x < low) low = x, at_low = from[i * stride];
            if (x > high) high = x, at_high = from[i * stride];
            if (size > largest) largest = size, at_largest = from[i * stride];
        }
        if constexpr (NUM_SCALES<C> == 1) {
            scales[0] = at_largest;
            set_positive(scales[0]);
            high = largest, low = 0;
        } else {
            scales[0] = at_low, scales[1] = at_high;
        }
        if (poison != 0) {
            for (T& scale : scales) set_nan(scale);
            return;
        }
        lowest = low;
        step = (high - low) * (1.f / LEVELS<C>);
    }

    float code(T number) const {
        if (step == 0) return 0;
        float least = C == Codec::INT4 ? 0.f : -LEVELS<C>;
        float code = (number_of(number) - lowest) / step;
        code = std::min(std::max(code, least), LEVELS<C>);
        return C == Codec::FP8 ? code : std::nearbyint(code);
    }

    static void set_positive(float& x) { x = std::fabs(x); }
    template <class Half>
    static void set_positive(Half& x) {
        x.bits &= 0x7fff;
    }
    static void set_nan(float& x) { x = std::numeric_limits<float>::quiet_NaN(); }
    static void set_nan(bf16& x) { x.bits = 0x7fc0; }
    static void set_nan(fp16& x) { x.bits = 0x7e00; }
};

// Writes the code of the number at a place in a row, of int4 two of each `unit` side by side in a byte.
template <Codec C>
inline void put(uint8_t* row, int64_t at, int64_t unit, float code) {
    if constexpr (C == Codec::FP8) {
        row[at] = fp8_of(code);
    } else if constexpr (C == Codec::INT8) {
        row[at] = static_cast<uint8_t>(static_cast<int8_t>(code));
    } else {
        uint8_t& byte = row[at / unit * unit / 2 + at % (unit / 2)];
        auto whole = static_cast<int>(code);
        byte = static_cast<uint8_t>(at % unit < unit / 2 ? whole : byte | whole << 4);
    }
}

template <class T, Codec C>
void encode_block(const T* numbers, int64_t page_size, int64_t dim, bool are_keys, uint8_t* block) {
    using Coded = CodedRows<T, C>;
    int64_t rows = are_keys ? dim : page_size, count = are_keys ? page_size : dim, group = Coded::group_of(rows, count);
    int64_t row_stride = are_keys ? 1 : dim, stride = are_keys ? dim : 1, unit = std::min(int64_t{32}, group);
    T* scales = reinterpret_cast<T*>(block + Coded::scales_at(rows, count));
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t first = 0; first < count; first += group) {
            const T* from = numbers + row * row_stride + first * stride;
            Encoder<T, C> encoder(from, group, stride);
            T* to = scales + first / group * NUM_SCALES<C> * rows + row;
            for (int64_t i = 0; i < NUM_SCALES<C>; ++i) to[i * rows] = encoder.scales[i];
            for (int64_t i = 0; i < group; ++i)
                put<C>(block + row * Coded::row_bytes(count), first + i, unit, encoder.code(from[i * stride]));
        }
}

// --- pages ---

// Of pages in a pool `[parts][slots][kv_heads][page_size][dim]`, where parts are keys and values by turns, of each layer.
struct CodedPages {
    int64_t num_parts, num_slots, kv_heads, page_size, dim;

    int64_t at(int64_t part, int64_t slot, int64_t head) const {
        return ((part * num_slots + slot) * kv_heads + head) * page_size * dim;
    }
};

// The page in a slot as codes `[parts][kv_heads][bytes]`, and back.
template <class T, Codec C>
void encode_page(const T* pool, const CodedPages& pages, int64_t slot, uint8_t* to) {
    int64_t bytes = CodedRows<T, C>::bytes(pages.page_size, pages.dim);
    for (int64_t part = 0; part < pages.num_parts; ++part)
        for (int64_t head = 0; head < pages.kv_heads; ++head, to += bytes)
            encode_block<T, C>(pool + pages.at(part, slot, head), pages.page_size, pages.dim, part % 2 == 0, to);
}
template <class T, Codec C>
void decode_page(const uint8_t* from, const CodedPages& pages, int64_t slot, T* pool) {
    int64_t bytes = CodedRows<T, C>::bytes(pages.page_size, pages.dim);
    for (int64_t part = 0; part < pages.num_parts; ++part)
        for (int64_t head = 0; head < pages.kv_heads; ++head, from += bytes)
            decode_block<T, C>(from, pages.page_size, pages.dim, part % 2 == 0, pool + pages.at(part, slot, head));
}

// Gives each page of some slots the values of its codes; what it held before goes to `exact`
// `[pages][parts][kv_heads][page_size][dim]`, where that is wanted.
template <class T, Codec C>
void round_pages(T* pool, const CodedPages& pages, const int64_t* slots, int64_t count, T* exact, int num_threads) {
    int64_t of_page = pages.num_parts * pages.kv_heads, size = pages.page_size * pages.dim;
#pragma omp parallel for schedule(dynamic) num_threads(num_threads)
    for (int64_t task = 0; task < count * of_page; ++task) {
        static thread_local Scratch memory;
        auto* block = memory.get<uint8_t>(CodedRows<T, C>::bytes(pages.page_size, pages.dim));
        int64_t part = task % of_page / pages.kv_heads, head = task % pages.kv_heads;
        T* numbers = pool + pages.at(part, slots[task / of_page], head);
        if (exact) std::memcpy(static_cast<void*>(exact + task * size), numbers, sizeof(T) * size);
        encode_block<T, C>(numbers, pages.page_size, pages.dim, part % 2 == 0, block);
        decode_block<T, C>(block, pages.page_size, pages.dim, part % 2 == 0, numbers);
    }
}

}  // namespace
