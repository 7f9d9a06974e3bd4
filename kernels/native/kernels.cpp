// The C functions of the kernels. One library is built for each instruction set, all from this source; `library.py`
// picks one and describes the arguments. Dtypes: 0 fp32, 1 fp16, 2 bf16.

#include <omp.h>

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "attention.hpp"
#include "codecs.hpp"
#include "collectives.hpp"
#include "expected_weights.hpp"
#include "linear.hpp"
#include "page_states.hpp"
#include "page_weights.hpp"
#include "tokens.hpp"

namespace {

template <class Run>
void by_dtype(int dtype, Run run) {
    if (dtype == 0)
        run(float{});
    else if (dtype == 1)
        run(fp16{});
    else
        run(bf16{});
}

template <Codec C>
struct Number {
    static constexpr Codec CODEC = C;
};

template <class Run>
void by_codec(int codec, Run run) {
    if (codec == 1)
        run(Number<Codec::FP8>{});
    else if (codec == 2)
        run(Number<Codec::INT8>{});
    else
        run(Number<Codec::INT4>{});
}

template <class T>
Pages<T> pages_of(const void* pool, int64_t num_slots, const void* buffer, int64_t stride, int codec, int64_t block,
                  const void* exact) {
    return {static_cast<const T*>(pool), num_slots, buffer, stride, Codec{codec}, block, static_cast<const T*>(exact)};
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Asks the system for what the instruction set needs, once a process; 0 where it is granted.
int start() {
#ifdef __AMX_BF16__
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18;
    return static_cast<int>(syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA));
#else
    return 0;
#endif
}

// Elements of a packed weight.
int64_t packed_size(int dtype, int64_t outputs, int64_t depth, int gated) {
    int64_t size = 0;
    Layout layout{outputs, depth, gated != 0};
    by_dtype(dtype, [&](auto one) { size = layout.num_panels() * panel_size<decltype(one)>(depth); });
    return size;
}

void pack_weight(int dtype, const void* weight, int64_t outputs, int64_t depth, int gated, void* packed,
                 int num_threads) {
    by_dtype(dtype, [&](auto one) {
        using T = decltype(one);
        pack_weight(static_cast<const T*>(weight), Layout{outputs, depth, gated != 0}, static_cast<T*>(packed),
                    num_threads);
    });
}

void linear(int dtype, const void* x, int64_t num_rows, int64_t x_stride, const void* packed, const void* bias,
            int64_t outputs, int64_t depth, int gated, void* out, int num_threads) {
    by_dtype(dtype, [&](auto one) {
        using T = decltype(one);
        linear(static_cast<const T*>(x), num_rows, x_stride, static_cast<const T*>(packed),
               static_cast<const T*>(bias), Layout{outputs, depth, gated != 0}, static_cast<T*>(out), num_threads);
    });
}

void rms_norm(int dtype, void* x, const void* delta, const void* weight, float eps, int64_t num_rows, int64_t size,
              void* out, int num_threads) {
    by_dtype(dtype, [&](auto one) {
        using T = decltype(one);
        rms_norm(static_cast<T*>(x), static_cast<const T*>(delta), static_cast<const T*>(weight), eps, num_rows, size,
                 static_cast<T*>(out), num_threads);
    });
}

void rope_and_write(int dtype, void* qkv, int64_t stride, int64_t num_rows, int64_t heads, int64_t kv_heads,
                    int64_t dim, const float* cos, const float* sin, void* pool, int64_t num_pages, int64_t page_size,
                    const int64_t* page, const int64_t* offset, int num_threads) {
    by_dtype(dtype, [&](auto one) {
        using T = decltype(one);
        rope_and_write(static_cast<T*>(qkv), stride, num_rows, heads, kv_heads, dim, cos, sin, static_cast<T*>(pool),
                       num_pages, page_size, page, offset, num_threads);
    });
}

// `chunks` are `Chunk`s; the first `num_few` of them have few tokens. Codecs: 0 none, 1 fp8, 2 int8, 3 int4.
void attention(int dtype, const void* q, int64_t q_stride, int64_t heads, int64_t kv_heads, int64_t dim,
               int64_t page_size, const void* pool, int64_t num_slots, const void* buffer, int64_t stride, int codec,
               int64_t block, const void* exact, const int64_t* table, const int64_t* chunks, int64_t num_chunks,
               int64_t num_few, float* kept, float* page_states, int64_t page_rows, void* out, int num_threads) {
    by_dtype(dtype, [&](auto one) {
        using T = decltype(one);
        Call<T> call{{heads, kv_heads, dim, page_size},
                     pages_of<T>(pool, num_slots, buffer, stride, codec, block, exact),
                     table,
                     {static_cast<const T*>(q), q_stride},
                     kept,
                     page_states,
                     page_rows,
                     static_cast<T*>(out),
                     num_threads};
        auto* all = reinterpret_cast<const Chunk*>(chunks);
        if (num_few) attend_few(call, all, num_few);
        if (num_chunks > num_few) attend_many(call, all + num_few, num_chunks - num_few);
    });
}

// `items` are `Item`s.
void page_states(int dtype, const void* q, int64_t q_stride, int64_t heads, int64_t kv_heads, int64_t dim,
                 int64_t page_size, const void* pool, int64_t num_slots, const void* buffer, int64_t stride, int codec,
                 int64_t block, const void* exact, const int64_t* items, int64_t num_items, float* states,
                 int num_threads) {
    by_dtype(dtype, [&](auto one) {
        using T = decltype(one);
        page_states({heads, kv_heads, dim, page_size},
                    pages_of<T>(pool, num_slots, buffer, stride, codec, block, exact),
                    {static_cast<const T*>(q), q_stride}, reinterpret_cast<const Item*>(items), num_items, states,
                    num_threads);
    });
}

void merge_page_states(int dtype, float* states, int64_t heads, int64_t dim, const int64_t* order,
                       const int64_t* offsets, const int64_t* targets, int64_t num_rows, void* out, int num_threads) {
    by_dtype(dtype, [&](auto one) {
        merge_page_states(states, heads, dim, order, offsets, targets, num_rows, static_cast<decltype(one)*>(out),
                          num_threads);
    });
}

void expected_weights(int dtype, const void* q, int64_t num_rows, int64_t heads, int64_t kv_heads, int64_t dim,
                      const void* means, int64_t blocks, const int64_t* ids, int64_t num_pages, const int64_t* counts,
                      float scale, float* scores, float* out, int num_threads) {
    by_dtype(dtype, [&](auto one) {
        using T = decltype(one);
        expected_weights(static_cast<const T*>(q), num_rows, heads, kv_heads, dim, static_cast<const T*>(means), blocks,
                         ids, num_pages, counts, scale, scores, out, num_threads);
    });
}

void page_weights(const float* states, const int64_t* counts, int64_t num_choices, int64_t tokens, int64_t group,
                  double* out, int num_threads) {
    sum_page_weights(states, counts, num_choices, tokens, group, out, num_threads);
}

// The page in a slot of a pool `[parts, num_slots, kv_heads, page_size, dim]` as codes, and back.
void encode_page(int dtype, int codec, const void* pool, int64_t num_parts, int64_t num_slots, int64_t kv_heads,
                 int64_t page_size, int64_t dim, int64_t slot, void* to) {
    by_dtype(dtype, [&](auto one) {
        using T = decltype(one);
        by_codec(codec, [&](auto number) {
            encode_page<T, number.CODEC>(static_cast<const T*>(pool), {num_parts, num_slots, kv_heads, page_size, dim},
                                         slot, static_cast<uint8_t*>(to));
        });
    });
}

void decode_page(int dtype, int codec, const void* from, int64_t num_parts, int64_t num_slots, int64_t kv_heads,
                 int64_t page_size, int64_t dim, int64_t slot, void* pool) {
    by_dtype(dtype, [&](auto one) {
        using T = decltype(one);
        by_codec(codec, [&](auto number) {
            decode_page<T, number.CODEC>(static_cast<const uint8_t*>(from),
                                         {num_parts, num_slots, kv_heads, page_size, dim}, slot, static_cast<T*>(pool));
        });
    });
}

void round_pages(int dtype, int codec, void* pool, int64_t num_parts, int64_t num_slots, int64_t kv_heads,
                 int64_t page_size, int64_t dim, const int64_t* slots, int64_t count, void* exact, int num_threads) {
    by_dtype(dtype, [&](auto one) {
        using T = decltype(one);
        by_codec(codec, [&](auto number) {
            round_pages<T, number.CODEC>(static_cast<T*>(pool), {num_parts, num_slots, kv_heads, page_size, dim}, slots,
                                         count, static_cast<T*>(exact), num_threads);
        });
    });
}

// `shared` is memory of `shared_size` bytes, zeros at first, that all ranks of a group see.
int64_t shared_size(int64_t capacity, int size) { return size <= MOST_RANKS ? SLOTS + 2 * size * capacity : 0; }

// Both give MET, SIZES_DIFFER, or the number of a rank whose process is gone.
int all_reduce(int dtype, void* shared, int64_t capacity, int rank, int size, void* x, int64_t count, int num_threads) {
    Ranks ranks{static_cast<Meeting*>(shared), capacity, rank, size};
    int end = MET;
    by_dtype(dtype, [&](auto one) { end = all_reduce(ranks, static_cast<decltype(one)*>(x), count, num_threads); });
    return end;
}

int gather(void* shared, int64_t capacity, int rank, int size, const void* x, int64_t bytes, int64_t first,
           int64_t last, void* parts) {
    return gather({static_cast<Meeting*>(shared), capacity, rank, size}, static_cast<const char*>(x), bytes, first, last,
                  static_cast<char*>(parts));
}
}
#pragma GCC visibility pop
