// Attention over float16 keys and values for processors with AVX-512.
//
// llama.cpp's computes one query at a time in decoding and walks over every cell of the memory, seen or not. Here the
// cells that a few neighbouring queries see are listed first, so that cells of other sequences cost nothing, and all
// heads that share keys are computed together. Sums are in float32.

#include "attention.h"

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

namespace {

constexpr int64_t LANES = 16;
constexpr int64_t CELLS = 32;       // keys computed at once
constexpr int64_t ROWS = 96;        // about so many queries times heads at once share the work of loading cells
constexpr int64_t JOBS_PER_THREAD = 4;  // at least, where there are queries enough: no thread waits long for another
constexpr int64_t FEW_ROWS = 6;
constexpr int64_t MAX_HEAD = 256;   // values of a head, at most
constexpr int64_t WORD = 64;
constexpr uint16_t MINUS_INFINITY = 0xFC00;  // float16
constexpr int64_t NEW_CELLS = 16;   // a query joins the one before it when it sees at most so many cells more, or
constexpr int64_t NEW_SHARE = 4;    // one in so many

// One attention as ggml lays it out. Strides are in bytes.
struct Problem {
    const ggml_tensor *q, *k, *v, *mask;
    ggml_tensor * out;
    float scale;
    int64_t head, cells, queries, heads, shared, groups, streams;

    explicit Problem(ggml_tensor * op)
        : q(op->src[0]), k(op->src[1]), v(op->src[2]), mask(op->src[3]), out(op), head(k->ne[0]), cells(k->ne[1]),
          queries(q->ne[1]), heads(q->ne[2]), shared(k->ne[2]), groups(heads / shared), streams(q->ne[3]) {
        std::memcpy(&scale, op->op_params, sizeof scale);
    }

    template <typename T>
    static T * at(const ggml_tensor * tensor, int64_t i1, int64_t i2, int64_t i3) {
        return reinterpret_cast<T *>(static_cast<char *>(tensor->data) + i1 * tensor->nb[1] + i2 * tensor->nb[2] +
                                     i3 * tensor->nb[3]);
    }
};

// What one thread works with; kept from call to call.
struct Scratch {
    std::vector<uint64_t> seen;    // a bit for every query and cell
    std::vector<uint64_t> either;  // what any of the queries sees
    std::vector<int32_t> cells;    // the numbers of those cells
    std::vector<int64_t> open;     // so many of them, from the first on, a query sees without a gap
    alignas(64) float keys[MAX_HEAD][CELLS];
    alignas(64) float values[CELLS][MAX_HEAD];
    alignas(64) float queries[ROWS][MAX_HEAD];
    alignas(64) float sums[ROWS][MAX_HEAD];
    alignas(64) float scores[ROWS][CELLS];
    alignas(64) double totals[ROWS][LANES / 2];
    float largest[ROWS];  // rounded up to a whole number
};

// 2 to the power of x - shift, for a whole shift; the error is below 2e-7 of the result (Taylor's series in ln 2, degree
// 6). Another shift changes the exponent alone.
inline __m512 power(__m512 x, __m512 shift) {
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT);
    const __m512 r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(1.5403530e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3333558e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.24022651f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.69314718f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, _mm512_sub_ps(n, shift));
}

inline __m512 from_half(const uint16_t * from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
}

// The bits of the cells that a query sees.
void look(const uint16_t * mask, int64_t cells, uint64_t * bits) {
    std::fill(bits, bits + (cells + WORD - 1) / WORD, 0);
    const __m512i hidden = _mm512_set1_epi16(static_cast<short>(MINUS_INFINITY));
    for (int64_t cell = 0; cell < cells; cell += 32) {
        const __mmask32 valid = cells - cell >= 32 ? ~0u : (1u << (cells - cell)) - 1;
        const __m512i values = _mm512_maskz_loadu_epi16(valid, mask + cell);
        const uint64_t seen = _mm512_mask_cmpneq_epi16_mask(valid, values, hidden);
        bits[cell / WORD] |= seen << (cell % WORD);
    }
}

void transpose(__m512 (&rows)[LANES]) {
    __m512 half[LANES];
    for (int i = 0; i < LANES; i += 2) {
        half[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
        half[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4) {
        rows[i] = _mm512_shuffle_ps(half[i], half[i + 2], 0x44);
        rows[i + 1] = _mm512_shuffle_ps(half[i], half[i + 2], 0xEE);
        rows[i + 2] = _mm512_shuffle_ps(half[i + 1], half[i + 3], 0x44);
        rows[i + 3] = _mm512_shuffle_ps(half[i + 1], half[i + 3], 0xEE);
    }
    for (int i = 0; i < 4; i++) {
        half[i] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0x88);
        half[i + 4] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0xDD);
        half[i + 8] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0x88);
        half[i + 12] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0xDD);
    }
    for (int i = 0; i < 4; i++) {
        rows[i] = _mm512_shuffle_f32x4(half[i], half[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_f32x4(half[i], half[i + 8], 0xDD);
        rows[i + 4] = _mm512_shuffle_f32x4(half[i + 4], half[i + 12], 0x88);
        rows[i + 12] = _mm512_shuffle_f32x4(half[i + 4], half[i + 12], 0xDD);
    }
}

// Sums every 16th product, and then those 16 one after the other, as `score_few` does: how many rows are computed at
// once changes no bit.
template <int COUNT>
void score(Scratch & s, int64_t row, int64_t head) {
    __m512 sums[COUNT][2];
    for (int r = 0; r < COUNT; r++) {
        sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    }
    for (int64_t first = 0; first < LANES; first++) {
        __m512 parts[COUNT][2];
        for (int r = 0; r < COUNT; r++) {
            parts[r][0] = parts[r][1] = _mm512_setzero_ps();
        }
        for (int64_t d = first; d < head; d += LANES) {
            const __m512 left = _mm512_load_ps(s.keys[d]), right = _mm512_load_ps(s.keys[d] + LANES);
#pragma GCC unroll 8
            for (int r = 0; r < COUNT; r++) {
                const __m512 query = _mm512_set1_ps(s.queries[row + r][d]);
                parts[r][0] = _mm512_fmadd_ps(query, left, parts[r][0]);
                parts[r][1] = _mm512_fmadd_ps(query, right, parts[r][1]);
            }
        }
        for (int r = 0; r < COUNT; r++) {
            sums[r][0] = _mm512_add_ps(sums[r][0], parts[r][0]);
            sums[r][1] = _mm512_add_ps(sums[r][1], parts[r][1]);
        }
    }
    for (int r = 0; r < COUNT; r++) {
        _mm512_store_ps(s.scores[row + r], sums[r][0]);
        _mm512_store_ps(s.scores[row + r] + LANES, sums[r][1]);
    }
}

inline __m512d first_half(__m512 x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
inline __m512d second_half(__m512 x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }

// Scores become weights relative to a power of two that is no less than the largest so far; older sums are scaled down
// when a larger one comes. That is exact, and totals are in float64, so where a block of cells ends changes no bit.
void weigh(Scratch & s, int64_t row, int64_t head, uint32_t seen) {
    const __m512 hidden = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    const __m512 left = _mm512_mask_mov_ps(hidden, static_cast<__mmask16>(seen), _mm512_load_ps(s.scores[row]));
    const __m512 right =
        _mm512_mask_mov_ps(hidden, static_cast<__mmask16>(seen >> LANES), _mm512_load_ps(s.scores[row] + LANES));
    const float before = s.largest[row], here = std::ceil(_mm512_reduce_max_ps(_mm512_max_ps(left, right)));
    if (here > before) {
        const float smaller = std::ldexp(1.0f, static_cast<int>(std::max(before - here, -140.0f)));
        for (int64_t d = 0; d < head; d += LANES) {
            _mm512_store_ps(s.sums[row] + d, _mm512_mul_ps(_mm512_load_ps(s.sums[row] + d), _mm512_set1_ps(smaller)));
        }
        _mm512_store_pd(s.totals[row], _mm512_mul_pd(_mm512_load_pd(s.totals[row]), _mm512_set1_pd(smaller)));
        s.largest[row] = here;
    }
    const __m512 largest = _mm512_set1_ps(s.largest[row]);
    const __m512 first = _mm512_maskz_mov_ps(static_cast<__mmask16>(seen), power(left, largest));
    const __m512 second = _mm512_maskz_mov_ps(static_cast<__mmask16>(seen >> LANES), power(right, largest));
    _mm512_store_ps(s.scores[row], first);
    _mm512_store_ps(s.scores[row] + LANES, second);
    const __m512d more = _mm512_add_pd(_mm512_add_pd(first_half(first), second_half(first)),
                                       _mm512_add_pd(first_half(second), second_half(second)));
    _mm512_store_pd(s.totals[row], _mm512_add_pd(_mm512_load_pd(s.totals[row]), more));
}

template <int COUNT, int WIDTH>
void gather(Scratch & s, int64_t row, int64_t d, int64_t cells) {
    __m512 sums[COUNT][WIDTH];
    for (int r = 0; r < COUNT; r++) {
        for (int w = 0; w < WIDTH; w++) {
            sums[r][w] = _mm512_load_ps(s.sums[row + r] + d + w * LANES);
        }
    }
    for (int64_t cell = 0; cell < cells; cell++) {
        __m512 values[WIDTH];
        for (int w = 0; w < WIDTH; w++) {
            values[w] = _mm512_load_ps(s.values[cell] + d + w * LANES);
        }
#pragma GCC unroll 8
        for (int r = 0; r < COUNT; r++) {
            const __m512 weight = _mm512_set1_ps(s.scores[row + r][cell]);
            for (int w = 0; w < WIDTH; w++) {
                sums[r][w] = _mm512_fmadd_ps(weight, values[w], sums[r][w]);
            }
        }
    }
    for (int r = 0; r < COUNT; r++) {
        for (int w = 0; w < WIDTH; w++) {
            _mm512_store_ps(s.sums[row + r] + d + w * LANES, sums[r][w]);
        }
    }
}

template <int WIDTH>
void gather_rows(Scratch & s, int64_t rows, int64_t d, int64_t cells) {
    int64_t row = 0;
    for (; row + 6 <= rows; row += 6) {
        gather<6, WIDTH>(s, row, d, cells);
    }
    for (; row + 3 <= rows; row += 3) {
        gather<3, WIDTH>(s, row, d, cells);
    }
    for (; row < rows; row++) {
        gather<1, WIDTH>(s, row, d, cells);
    }
}

void score_rows(Scratch & s, int64_t rows, int64_t head) {
    int64_t row = 0;
    for (; row + 6 <= rows; row += 6) {
        score<6>(s, row, head);
    }
    for (; row + 3 <= rows; row += 3) {
        score<3>(s, row, head);
    }
    for (; row < rows; row++) {
        score<1>(s, row, head);
    }
}

// The sums of 16 registers, in one.
__m512 sums_of(__m512 (&rows)[LANES]) {
    transpose(rows);
    __m512 sum = rows[0];
    for (int i = 1; i < LANES; i++) {
        sum = _mm512_add_ps(sum, rows[i]);
    }
    return sum;
}

// For so few rows that turning the keys over costs more than adding up each product.
template <int COUNT>
void score_few(Scratch & s, const uint16_t * const (&keys)[LANES], int64_t head, int64_t half) {
    __m512 products[COUNT][LANES];
    for (int64_t i = 0; i < LANES; i++) {
        __m512 sums[COUNT];
        for (int r = 0; r < COUNT; r++) {
            sums[r] = _mm512_setzero_ps();
        }
        for (int64_t d = 0; d < head; d += LANES) {
            const __m512 key = from_half(keys[i] + d);
            for (int r = 0; r < COUNT; r++) {
                sums[r] = _mm512_fmadd_ps(key, _mm512_load_ps(s.queries[r] + d), sums[r]);
            }
        }
        for (int r = 0; r < COUNT; r++) {
            products[r][i] = sums[r];
        }
    }
    for (int r = 0; r < COUNT; r++) {
        _mm512_store_ps(s.scores[r] + half, sums_of(products[r]));
    }
}

void score_few_rows(Scratch & s, const uint16_t * const (&keys)[LANES], int64_t rows, int64_t head, int64_t half) {
    switch (rows) {
        case 1: score_few<1>(s, keys, head, half); break;
        case 2: score_few<2>(s, keys, head, half); break;
        case 3: score_few<3>(s, keys, head, half); break;
        case 4: score_few<4>(s, keys, head, half); break;
        case 5: score_few<5>(s, keys, head, half); break;
        default: score_few<6>(s, keys, head, half);
    }
}

// Scores some cells, and gets their values ready. For many rows the keys are turned over first, so that one register
// holds the same value of 16 of them.
void load_cells(const Problem & p, Scratch & s, const int32_t * cells, int64_t count, int64_t rows, int64_t group,
                int64_t stream) {
    for (int64_t half = 0; half < count; half += LANES) {
        const uint16_t * keys[LANES];
        for (int64_t i = 0; i < LANES; i++) {
            const int64_t cell = cells[std::min(half + i, count - 1)];  // what is too much is masked out of the scores
            keys[i] = Problem::at<uint16_t>(p.k, cell, group, stream);
        }
        if (rows <= FEW_ROWS) {
            score_few_rows(s, keys, rows, p.head, half);
            continue;
        }
        for (int64_t d = 0; d < p.head; d += LANES) {
            __m512 rows[LANES];
            for (int64_t i = 0; i < LANES; i++) {
                rows[i] = from_half(keys[i] + d);
            }
            transpose(rows);
            for (int64_t i = 0; i < LANES; i++) {
                _mm512_store_ps(s.keys[d + i] + half, rows[i]);
            }
        }
    }
    for (int64_t i = 0; i < count; i++) {
        const uint16_t * values = Problem::at<uint16_t>(p.v, cells[i], group, stream);
        for (int64_t d = 0; d < p.head; d += LANES) {
            _mm512_store_ps(s.values[i] + d, from_half(values + d));
        }
    }
}

// Rows of one head lie apart, so that the processor does not guess what comes next.
void fetch(const Problem & p, const Scratch & s, int64_t from, int64_t group, int64_t stream) {
    const int64_t end = std::min<int64_t>(from + CELLS, s.cells.size());
    for (int64_t i = from; i < end; i++) {
        const char * keys = Problem::at<char>(p.k, s.cells[i], group, stream);
        const char * values = Problem::at<char>(p.v, s.cells[i], group, stream);
        for (int64_t offset = 0; offset < p.head * 2; offset += 64) {
            _mm_prefetch(keys + offset, _MM_HINT_T0);
            _mm_prefetch(values + offset, _MM_HINT_T0);
        }
    }
}

uint32_t seen_here(const Scratch & s, const uint64_t * bits, int64_t token, int64_t from, int64_t count) {
    const uint32_t all = count == CELLS ? ~0u : (1u << count) - 1;
    if (from + count <= s.open[token]) {
        return all;
    }
    uint32_t seen = 0;
    for (int64_t i = 0; i < count; i++) {
        const int64_t cell = s.cells[from + i];
        seen |= static_cast<uint32_t>(bits[cell / WORD] >> (cell % WORD) & 1) << i;
    }
    return seen;
}

// All heads over the same keys, for neighbouring queries whose cells are listed in the scratch.
void attend(const Problem & p, Scratch & s, int64_t first, int64_t count, int64_t group, int64_t stream,
            const uint64_t * seen, int64_t words) {
    const int64_t rows = count * p.groups;
    const __m512 scale = _mm512_set1_ps(p.scale * 1.44269504f);  // scores become exponents of 2
    for (int64_t row = 0; row < rows; row++) {
        const float * from = Problem::at<float>(p.q, first + row / p.groups, group * p.groups + row % p.groups, stream);
        for (int64_t d = 0; d < p.head; d += LANES) {
            _mm512_store_ps(s.queries[row] + d, _mm512_mul_ps(_mm512_loadu_ps(from + d), scale));
            _mm512_store_ps(s.sums[row] + d, _mm512_setzero_ps());
        }
        _mm512_store_pd(s.totals[row], _mm512_setzero_pd());
        s.largest[row] = -std::numeric_limits<float>::infinity();
    }
    const int64_t cells = static_cast<int64_t>(s.cells.size());
    for (int64_t from = 0; from < cells; from += CELLS) {
        const int64_t here = std::min(CELLS, cells - from);
        fetch(p, s, from + CELLS, group, stream);
        load_cells(p, s, s.cells.data() + from, here, rows, group, stream);
        if (rows > FEW_ROWS) {
            score_rows(s, rows, p.head);
        }
        for (int64_t token = 0; token < count; token++) {
            const uint32_t visible = seen_here(s, seen + token * words, token, from, here);
            for (int64_t row = token * p.groups; row < (token + 1) * p.groups; row++) {
                weigh(s, row, p.head, visible);
            }
        }
        int64_t d = 0;
        for (; d + 4 * LANES <= p.head; d += 4 * LANES) {
            gather_rows<4>(s, rows, d, here);
        }
        for (; d < p.head; d += LANES) {
            gather_rows<1>(s, rows, d, here);
        }
    }
    for (int64_t row = 0; row < rows; row++) {
        float * to = Problem::at<float>(p.out, group * p.groups + row % p.groups, first + row / p.groups, stream);
        const float total = static_cast<float>(_mm512_reduce_add_pd(_mm512_load_pd(s.totals[row])));
        const __m512 inverse = _mm512_set1_ps(total > 0 ? 1 / total : 0);
        for (int64_t d = 0; d < p.head; d += LANES) {
            _mm512_storeu_ps(to + d, _mm512_mul_ps(_mm512_load_ps(s.sums[row] + d), inverse));
        }
    }
}

// Lists what queries [first, first + count) of those looked at see together.
void list_cells(Scratch & s, const uint64_t * seen, int64_t count, int64_t words) {
    s.cells.clear();
    for (int64_t word = 0; word < words; word++) {
        for (uint64_t bits = s.either[word]; bits != 0; bits &= bits - 1) {
            s.cells.push_back(static_cast<int32_t>(word * WORD + __builtin_ctzll(bits)));
        }
    }
    s.open.assign(count, 0);
    for (int64_t token = 0; token < count; token++) {
        for (int64_t word = 0; word < words; word++) {
            const uint64_t missing = s.either[word] & ~seen[token * words + word];
            const uint64_t before = missing ? (missing & -missing) - 1 : ~0ull;
            s.open[token] += __builtin_popcountll(s.either[word] & before);
            if (missing) {
                break;
            }
        }
    }
}

// How many of the queries, from the first on, see nearly the same cells; `either` becomes what they see together.
int64_t alike(Scratch & s, const uint64_t * seen, int64_t count, int64_t words) {
    s.either.assign(seen, seen + words);
    int64_t together = 0, query = 1;
    for (int64_t word = 0; word < words; word++) {
        together += __builtin_popcountll(s.either[word]);
    }
    for (; query < count; query++) {
        int64_t more = 0, common = 0;
        for (int64_t word = 0; word < words; word++) {
            more += __builtin_popcountll(seen[query * words + word] & ~s.either[word]);
            common += __builtin_popcountll(seen[query * words + word] & s.either[word]);
        }
        if (more + together - common > std::max(NEW_CELLS, together / NEW_SHARE)) {
            break;
        }
        for (int64_t word = 0; word < words; word++) {
            s.either[word] |= seen[query * words + word];
        }
        together += more;
    }
    return query;
}

class Attention : public ggml::cpu::tensor_traits {
    bool work_size(int, const ggml_tensor *, size_t &) override { return false; }  // as ggml plans it

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        if (!suits(op)) {
            return false;
        }
        const Problem p(op);
        static thread_local const std::unique_ptr<Scratch> scratch(new Scratch);
        Scratch & s = *scratch;
        const int64_t share = p.queries * p.streams * p.shared / (params->nth * JOBS_PER_THREAD);
        const int64_t at_once = std::max<int64_t>(1, std::min(share, ROWS / p.groups));
        const int64_t words = (p.cells + WORD - 1) / WORD;
        const int64_t parts = (p.queries + at_once - 1) / at_once, jobs = parts * p.streams * p.shared;
        s.seen.resize(at_once * words);
        int64_t looked = -1;
        for (int64_t job = jobs * params->ith / params->nth; job < jobs * (params->ith + 1) / params->nth; job++) {
            const int64_t group = job % p.shared, part = job / p.shared % parts, stream = job / p.shared / parts;
            const int64_t begin = part * at_once, end = std::min(begin + at_once, p.queries);
            if (looked != job / p.shared) {
                looked = job / p.shared;
                for (int64_t query = begin; query < end; query++) {
                    look(Problem::at<uint16_t>(p.mask, query, 0, stream % p.mask->ne[3]), p.cells,
                         s.seen.data() + (query - begin) * words);
                }
            }
            for (int64_t query = begin; query < end;) {
                const uint64_t * seen = s.seen.data() + (query - begin) * words;
                const int64_t count = alike(s, seen, end - query, words);
                list_cells(s, seen, count, words);
                attend(p, s, query, count, group, stream, seen, words);
                query += count;
            }
        }
        return true;
    }

    // Everything else (sinks, soft caps, biases by distance, other types) is left to ggml.
    static bool suits(const ggml_tensor * op) {
        const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3];
        float parameters[3];  // scale, largest bias, soft cap
        std::memcpy(parameters, op->op_params, sizeof parameters);
        return mask != nullptr && op->src[4] == nullptr && parameters[1] == 0 && parameters[2] == 0 &&
               q->type == GGML_TYPE_F32 && k->type == GGML_TYPE_F16 && v->type == GGML_TYPE_F16 &&
               mask->type == GGML_TYPE_F16 && op->type == GGML_TYPE_F32 && mask->ne[2] == 1 && k->ne[0] == v->ne[0] &&
               k->ne[0] % LANES == 0 && k->ne[0] <= MAX_HEAD && q->ne[2] % k->ne[2] == 0 && k->ne[2] == v->ne[2] &&
               q->ne[2] / k->ne[2] <= ROWS && k->ne[3] == q->ne[3];
    }
};

Attention instance;

}  // namespace

ggml::cpu::tensor_traits * appliance_attention() { return &instance; }
