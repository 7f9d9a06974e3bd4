// Pages as codes and scales, see `codec_format.py`, which says how they lie, and `page_codec.py`, which defines them bit for
// bit.
#pragma once

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

// How a head's keys, or values, of a page lie.
template <class T, Codec C>
struct Coded {
    int64_t page_size, dim;

    int64_t group() const { return std::gcd(std::gcd(int64_t{64}, page_size), dim); }
    int64_t row() const { return C == Codec::INT4 ? dim / 2 : dim; }  // bytes of a token's codes
    int64_t scales_at() const { return page_size * row(); }
    int64_t bytes() const {
        return scales_at() + page_size * dim / group() * NUM_SCALES<C> * static_cast<int64_t>(sizeof(T));
    }
};

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

// The codes of channels d to d + 15 of a token, whose row begins at p.
template <Codec C>
inline Vec codes_of(const uint8_t* p, int64_t d) {
    if constexpr (C == Codec::INT4) {
        __m128i both = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + d / 2)), mask = _mm_set1_epi8(15);
        __m128i low = _mm_and_si128(both, mask), high = _mm_and_si128(_mm_srli_epi16(both, 4), mask);
        return of_unsigned(_mm_unpacklo_epi8(low, high));
    } else {
        __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + d));
        return C == Codec::INT8 ? of_signed(bytes) : of_fp8(bytes);
    }
}

// What sixteen codes stand for, each with its own scales or all with the same.
template <class T, Codec C>
struct Scales {
    Vec lowest, highest, step;

    Scales() = default;
    Scales(Vec lowest, Vec highest)
        : lowest(lowest), highest(highest), step((highest - lowest) * all(1.f / LEVELS<C>)) {}

    static Scales of_channels(const T* first, int64_t distance) {
        if constexpr (NUM_SCALES<C> == 1) return {zeros(), load(first)};
        return {load(first), load(first + distance)};
    }
    static Scales of_token(const T* first, int64_t distance) {
        if constexpr (NUM_SCALES<C> == 1) return {zeros(), all(number_of(*first))};
        return {all(number_of(*first)), all(number_of(first[distance]))};
    }

    // not yet rounded to T; the ends of a group are kept as they are
    Vec numbers(Vec codes) const {
        Vec found = lowest + codes * step;
        found = where_equal(codes, all(LEVELS<C>), highest, found);
        if constexpr (NUM_SCALES<C> == 1) found = where_equal(codes, all(-LEVELS<C>), zeros() - highest, found);
        return found;
    }
};

// Keys of a page: channels share their scales over `group` tokens.
template <class T, Codec C>
class CodedKeys {
  public:
    CodedKeys(const uint8_t* block, const Coded<T, C>& shape)
        : codes_(block), scales_(reinterpret_cast<const T*>(block + shape.scales_at())), shape_(shape) {}

    // Those of tokens from `token` on to the end of their group, channels d to d + 15.
    Scales<T, C> scales(int64_t token, int64_t d) const {
        return Scales<T, C>::of_channels(scales_ + token / shape_.group() * NUM_SCALES<C> * shape_.dim + d, shape_.dim);
    }
    Vec codes(int64_t token, int64_t d) const { return codes_of<C>(codes_ + token * shape_.row(), d); }

  private:
    const uint8_t* codes_;
    const T* scales_;
    Coded<T, C> shape_;
};

// Values of a page: tokens share their scales over `group` channels.
template <class T, Codec C>
class CodedValues {
  public:
    CodedValues(const uint8_t* block, const Coded<T, C>& shape)
        : codes_(block), scales_(reinterpret_cast<const T*>(block + shape.scales_at())), shape_(shape) {}

    Vec numbers(int64_t token, int64_t d) const {
        const T* first = scales_ + d / shape_.group() * NUM_SCALES<C> * shape_.page_size + token;
        return Scales<T, C>::of_token(first, shape_.page_size).numbers(codes_of<C>(codes_ + token * shape_.row(), d));
    }

  private:
    const uint8_t* codes_;
    const T* scales_;
    Coded<T, C> shape_;
};

template <class T, Codec C>
void decode_keys(const uint8_t* block, const Coded<T, C>& shape, T* keys) {
    CodedKeys<T, C> coded(block, shape);
    for (int64_t first = 0; first < shape.page_size; first += LANES)
        for (int64_t d = 0; d < shape.dim; d += LANES) {
            Scales<T, C> scales = coded.scales(first, d);
            for (int64_t token = first; token < first + LANES; ++token)
                store(keys + token * shape.dim + d, scales.numbers(coded.codes(token, d)));
        }
}

template <class T, Codec C>
void decode_values(const uint8_t* block, const Coded<T, C>& shape, T* values) {
    CodedValues<T, C> coded(block, shape);
    for (int64_t token = 0; token < shape.page_size; ++token)
        for (int64_t d = 0; d < shape.dim; d += LANES)
            store(values + token * shape.dim + d, coded.numbers(token, d));
}

// --- encoding: a page once, when it is full, and when it goes to another tier ---

// A number that is no larger than the highest one as e4m3, rounded to the nearest, to even in the middle.
inline uint8_t fp8_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    uint32_t sign = bits >> 24 & 0x80, size = bits & 0x7fffffff;
    if (size < (121u << 23)) return static_cast<uint8_t>(sign | static_cast<uint32_t>(std::nearbyint(std::fabs(x) * 512)));
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

template <Codec C>
inline void put(uint8_t* row, int64_t d, float code) {
    if constexpr (C == Codec::FP8)
        row[d] = fp8_of(code);
    else if constexpr (C == Codec::INT8)
        row[d] = static_cast<uint8_t>(static_cast<int8_t>(code));
    else
        row[d / 2] = static_cast<uint8_t>(d % 2 ? row[d / 2] | static_cast<int>(code) << 4 : static_cast<int>(code));
}

template <class T, Codec C>
void encode_keys(const T* keys, const Coded<T, C>& shape, uint8_t* block) {
    int64_t group = shape.group();
    T* scales = reinterpret_cast<T*>(block + shape.scales_at());
    for (int64_t first = 0; first < shape.page_size; first += group, scales += NUM_SCALES<C> * shape.dim)
        for (int64_t d = 0; d < shape.dim; ++d) {
            Encoder<T, C> encoder(keys + first * shape.dim + d, group, shape.dim);
            for (int64_t i = 0; i < NUM_SCALES<C>; ++i) scales[i * shape.dim + d] = encoder.scales[i];
            for (int64_t token = first; token < first + group; ++token)
                put<C>(block + token * shape.row(), d, encoder.code(keys[token * shape.dim + d]));
        }
}

template <class T, Codec C>
void encode_values(const T* values, const Coded<T, C>& shape, uint8_t* block) {
    int64_t group = shape.group();
    T* scales = reinterpret_cast<T*>(block + shape.scales_at());
    for (int64_t token = 0; token < shape.page_size; ++token)
        for (int64_t first = 0; first < shape.dim; first += group) {
            Encoder<T, C> encoder(values + token * shape.dim + first, group, 1);
            T* to = scales + first / group * NUM_SCALES<C> * shape.page_size + token;
            for (int64_t i = 0; i < NUM_SCALES<C>; ++i) to[i * shape.page_size] = encoder.scales[i];
            for (int64_t d = first; d < first + group; ++d)
                put<C>(block + token * shape.row(), d, encoder.code(values[token * shape.dim + d]));
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
    Coded<T, C> shape{pages.page_size, pages.dim};
    for (int64_t part = 0; part < pages.num_parts; ++part)
        for (int64_t head = 0; head < pages.kv_heads; ++head, to += shape.bytes())
            (part % 2 ? encode_values<T, C> : encode_keys<T, C>)(pool + pages.at(part, slot, head), shape, to);
}
template <class T, Codec C>
void decode_page(const uint8_t* from, const CodedPages& pages, int64_t slot, T* pool) {
    Coded<T, C> shape{pages.page_size, pages.dim};
    for (int64_t part = 0; part < pages.num_parts; ++part)
        for (int64_t head = 0; head < pages.kv_heads; ++head, from += shape.bytes())
            (part % 2 ? decode_values<T, C> : decode_keys<T, C>)(from, shape, pool + pages.at(part, slot, head));
}

// Gives each page of some slots the values of its codes; what it held before goes to `exact`
// `[pages][parts][kv_heads][page_size][dim]`, where that is wanted.
template <class T, Codec C>
void round_pages(T* pool, const CodedPages& pages, const int64_t* slots, int64_t count, T* exact, int num_threads) {
    Coded<T, C> shape{pages.page_size, pages.dim};
    int64_t of_page = pages.num_parts * pages.kv_heads, size = pages.page_size * pages.dim;
#pragma omp parallel for schedule(dynamic) num_threads(num_threads)
    for (int64_t task = 0; task < count * of_page; ++task) {
        static thread_local Scratch memory;
        auto* block = memory.get<uint8_t>(shape.bytes());
        int64_t part = task % of_page / pages.kv_heads, head = task % pages.kv_heads;
        T* numbers = pool + pages.at(part, slots[task / of_page], head);
        if (exact) std::memcpy(static_cast<void*>(exact + task * size), numbers, sizeof(T) * size);
        if (part % 2) {
            encode_values<T, C>(numbers, shape, block);
            decode_values<T, C>(block, shape, numbers);
        } else {
            encode_keys<T, C>(numbers, shape, block);
            decode_keys<T, C>(block, shape, numbers);
        }
    }
}

}  // namespace
