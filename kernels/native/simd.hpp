// Sixteen fp32 lanes at a time, in one AVX-512 register or two of AVX2, and what the kernels do with them.
//
// Every operation here is fixed lane by lane, so a kernel that is written with them sums in one order whatever the
// number of rows it is given.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace {

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

constexpr int LANES = 16;

constexpr int64_t round_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

#ifdef __AVX512F__

struct Vec {
    __m512 v;
};

inline Vec zeros() { return {_mm512_setzero_ps()}; }
inline Vec all(float x) { return {_mm512_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec larger(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where either is NaN
inline __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1); }

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const bf16* p) {
    __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline Vec load(const fp16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }

// both elements of 16 pairs of bf16: those at even places, and those at odd ones
inline Vec even_of(const bf16* p) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))}; }
inline Vec odd_of(const bf16* p) {
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(0xffff0000)))};
}

inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
inline __m256i rounded(Vec x) {
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh(x.v);
#else
    __m512i bits = _mm512_castps_si512(x.v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
    up = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
#endif
}
inline void store(bf16* p, Vec x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded(x)); }
inline void store(fp16* p, Vec x) {
    __m256i bits = _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
}

inline __m256 high_half(Vec x) { return _mm512_extractf32x8_ps(x.v, 1); }
inline __m256 low_half(Vec x) { return _mm512_castps512_ps256(x.v); }

// x less the next whole number below, and x times 2 to the power of the whole number below n
inline Vec fraction(Vec x) { return {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
inline Vec scaled(Vec x, Vec n) { return {_mm512_scalef_ps(x.v, n.v)}; }
inline Vec with_exponent(Vec x) { return x; }

// x with zeros, or the lowest number, in the lanes from `count` on, which are some
inline Vec zero_from(Vec x, int count) { return {_mm512_maskz_mov_ps(first(count), x.v)}; }
inline Vec lowest_from(Vec x, int count) {
    constexpr float low = -std::numeric_limits<float>::infinity();
    return {_mm512_mask_mov_ps(_mm512_set1_ps(low), first(count), x.v)};
}

#else

struct Vec {
    __m256 low, high;
};

inline Vec zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Vec all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Vec fma(Vec a, Vec b, Vec c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Vec larger(Vec a, Vec b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Vec smaller(Vec a, Vec b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }

inline __m256 widened(__m128i bits) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)); }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Vec load(const bf16* p) {
    auto q = reinterpret_cast<const __m128i*>(p);
    return {widened(_mm_loadu_si128(q)), widened(_mm_loadu_si128(q + 1))};
}
inline Vec load(const fp16* p) {
    auto q = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
inline Vec even_of(const bf16* p) {
    auto q = reinterpret_cast<const __m256i*>(p);
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(q), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(q + 1), 16))};
}
inline Vec odd_of(const bf16* p) {
    auto q = reinterpret_cast<const __m256i*>(p);
    __m256i mask = _mm256_set1_epi32(0xffff0000);
    return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(q), mask)),
            _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(q + 1), mask))};
}

inline void store(float* p, Vec x) {
    _mm256_storeu_ps(p, x.low);
    _mm256_storeu_ps(p + 8, x.high);
}
inline __m128i rounded(__m256 x) {
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    up = _mm256_blendv_epi8(up, quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
    up = _mm256_srli_epi32(up, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(up), _mm256_extracti128_si256(up, 1));
}
inline void store(bf16* p, Vec x) {
    auto q = reinterpret_cast<__m128i*>(p);
    _mm_storeu_si128(q, rounded(x.low));
    _mm_storeu_si128(q + 1, rounded(x.high));
}
inline void store(fp16* p, Vec x) {
    auto q = reinterpret_cast<__m128i*>(p);
    _mm_storeu_si128(q, _mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(q + 1, _mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT));
}

inline __m256 high_half(Vec x) { return x.high; }
inline __m256 low_half(Vec x) { return x.low; }

inline Vec whole(Vec x) { return {_mm256_floor_ps(x.low), _mm256_floor_ps(x.high)}; }
inline Vec fraction(Vec x) { return x - whole(x); }
inline __m256 scaled(__m256 x, __m256 n) {
    __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(x, _mm256_castsi256_ps(exponent));
}
inline Vec scaled(Vec x, Vec n) {
    n = whole(n);
    return {scaled(x.low, n.low), scaled(x.high, n.high)};
}
// x as far as 2 ^ x is a normal number: less comes out as 1e-38
inline Vec with_exponent(Vec x) { return smaller(all(127), larger(all(-126), x)); }

inline __m256i below(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec zero_from(Vec x, int count) {
    return {_mm256_and_ps(x.low, _mm256_castsi256_ps(below(count))),
            _mm256_and_ps(x.high, _mm256_castsi256_ps(below(count - 8)))};
}
inline Vec lowest_from(Vec x, int count) {
    __m256 low = _mm256_set1_ps(-std::numeric_limits<float>::infinity());
    return {_mm256_blendv_ps(low, x.low, _mm256_castsi256_ps(below(count))),
            _mm256_blendv_ps(low, x.high, _mm256_castsi256_ps(below(count - 8)))};
}

#endif

// The lanes in a fixed order: halves onto each other until one is left.
inline float sum(Vec x) {
    __m256 eight = _mm256_add_ps(low_half(x), high_half(x));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Of each of 16 rows, in lane r that of row r.
#ifdef __AVX512F__
// Sixteen of `sum`, or of another operation in its order, side by side: each step lays halves of two rows, that are folded
// already, beside each other.
template <class Op>
inline Vec fold(const Vec* rows, Op op) {
    Vec eight[8], four[4], two[2];
    for (int i = 0; i < 8; ++i) {  // rows in the order that the steps below bring into that of lanes
        __m512 x = rows[i % 2 * 8 + i / 2].v, y = rows[i % 2 * 8 + i / 2 + 4].v;
        eight[i] = op(Vec{_mm512_shuffle_f32x4(x, y, 0x44)}, Vec{_mm512_shuffle_f32x4(x, y, 0xee)});
    }
    for (int i = 0; i < 4; ++i) {
        __m512 x = eight[2 * i].v, y = eight[2 * i + 1].v;
        four[i] = op(Vec{_mm512_shuffle_f32x4(x, y, 0x88)}, Vec{_mm512_shuffle_f32x4(x, y, 0xdd)});
    }
    for (int i = 0; i < 2; ++i) {
        __m512d x = _mm512_castps_pd(four[2 * i].v), y = _mm512_castps_pd(four[2 * i + 1].v);
        two[i] = op(Vec{_mm512_castpd_ps(_mm512_unpacklo_pd(x, y))}, Vec{_mm512_castpd_ps(_mm512_unpackhi_pd(x, y))});
    }
    __m512 x = two[0].v, y = two[1].v;
    return op(Vec{_mm512_shuffle_ps(x, y, 0x88)}, Vec{_mm512_shuffle_ps(x, y, 0xdd)});
}
inline Vec sums(const Vec* rows) {
    return fold(rows, [](Vec x, Vec y) { return x + y; });
}
inline Vec largest(const Vec* rows) {
    return fold(rows, [](Vec x, Vec y) { return larger(x, y); });
}
#else
inline float largest(Vec x) {
    __m256 eight = _mm256_max_ps(low_half(x), high_half(x));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline Vec sums(const Vec* rows) {
    alignas(64) float each[LANES];
    for (int i = 0; i < LANES; ++i) each[i] = sum(rows[i]);
    return load(each);
}
inline Vec largest(const Vec* rows) {
    alignas(64) float each[LANES];
    for (int i = 0; i < LANES; ++i) each[i] = largest(rows[i]);
    return load(each);
}
#endif

// The first `count` lanes of 16 elements at p, zeros after them; only those are read or written.
template <class T>
inline Vec load(const T* p, int count) {
    if (count >= LANES) return load(p);
    alignas(64) T held[LANES] = {};
    std::memcpy(held, p, sizeof(T) * count);
    return load(held);
}
template <class T>
inline void store(T* p, Vec x, Vec y) {
    store(p, x);
    store(p + LANES, y);
}
#ifdef __AVX512BF16__
inline void store(bf16* p, Vec x, Vec y) { _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(y.v, x.v)); }
#endif
template <class T>
inline void store(T* p, Vec x, int count) {
    if (count >= LANES) return store(p, x);
    alignas(64) T held[LANES];
    store(held, x);
    std::memcpy(p, held, sizeof(T) * count);
}

constexpr float SERIES_3[] = {1.f, 0.695116758f, 0.22764498f, 0.0770670474f};
constexpr float SERIES_6[] = {1.f,           0.693147063f,   0.240229309f,  0.0554852821f,
                              0.00967545155f, 0.00124678458f, 0.000216129163f};

// 2 ^ x: of the fraction by the polynomial of DEGREE with the least relative error (3: 9e-5, 6: less than a rounding)
// among those that are 1 at 0, of the rest by the exponent. NaN stays.
template <int DEGREE>
inline Vec power_of_2(Vec x) {
    static_assert(DEGREE == 3 || DEGREE == 6);
    const float* terms = DEGREE == 3 ? SERIES_3 : SERIES_6;
    x = with_exponent(x);
    Vec rest = fraction(x), series = all(terms[DEGREE]);
    for (int i = DEGREE - 1; i >= 0; --i) series = fma(series, rest, all(terms[i]));
    return scaled(series, x);
}

// What is enough for a result of type T.
template <class T>
constexpr int DEGREE = std::is_same_v<T, bf16> ? 3 : 6;

constexpr float LOG2_E = 1.4426950408889634f;

// x / (1 + e^-x)
template <class T>
inline Vec silu(Vec x) {
    return x / (all(1) + power_of_2<DEGREE<T>>(x * all(-LOG2_E)));
}

}  // namespace
