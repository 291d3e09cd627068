// Matrix products with Q8_0, Q4_0 and Q4_1 weights for processors with AVX-512 VNNI.
//
// llama.cpp computes Q8_0 and Q4_1 row by row with 256-bit dot products on x86. Here the weights are packed when they are
// loaded, 32 rows side by side, so that one instruction multiplies 64 bytes for 16 outputs, sums never cross lanes, and a
// tile of 6 tokens by 32 outputs stays in registers. The arithmetic is ggml's own: activations become 8-bit integers in
// blocks of 32, integer dot products over a block, and a scale for the weights and one for the activations.
//
// The buffer type is offered to ggml the way its own repacked types are; a tensor that does not suit stays where it was.

#include <immintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "attention.h"
#include "ggml_inside.h"

namespace {

constexpr int64_t BLOCK = 32;  // weights that share a scale, QK8_0
constexpr int64_t PANEL = 32;  // outputs packed side by side
constexpr int64_t TILE = 6;    // tokens computed at once: 24 accumulators, 2 weights and 1 activation of 32 registers
constexpr int64_t LANES = 16;
constexpr int64_t LINE = 64;   // bytes that are fetched from memory together
constexpr int64_t JOBS_PER_THREAD = 4;  // so that a thread that is held up does not keep the others waiting for long

// Blocks as they lie in the file. Scales are float16.
struct Q8Block {
    uint16_t scale;
    int8_t weights[BLOCK];
};
struct Q4Block {  // Q4_0: scale * (weight - 8)
    uint16_t scale;
    uint8_t weights[BLOCK / 2];  // the first half of the block in the lower bits, the second in the upper ones
};
struct Q4BlockWithLeast {  // Q4_1: scale * weight + least
    uint16_t scale, least;
    uint8_t weights[BLOCK / 2];
};
static_assert(sizeof(Q8Block) == 34 && sizeof(Q4Block) == 18 && sizeof(Q4BlockWithLeast) == 20);

// A block of 32 outputs, in two halves of 16: four neighbouring weights of each output fill a register.
struct Panel8 {
    uint8_t weights[2][BLOCK / 4][LANES][4];  // plus 128: the instruction wants one operand unsigned
    uint16_t scales[2][LANES];

    static constexpr bool HAS_LEAST = false;
};
static_assert(sizeof(Panel8) == PANEL * sizeof(Q8Block));

struct Panel4 {
    uint8_t weights[2][BLOCK / 8][LANES][4];  // of eight neighbouring weights four in the lower bits, four in the upper
    uint16_t scales[2][LANES];
    uint16_t least[2][LANES];

    static constexpr bool HAS_LEAST = true;
};
static_assert(sizeof(Panel4) == PANEL * sizeof(Q4BlockWithLeast));

// Activations of all tokens, token by token.
struct Activations {
    int8_t * values;
    float * scales;
    float * totals;     // sums of a block's activations: what the weights' least value is multiplied with
    int32_t * offsets;  // minus 128 times the sum of a block's values: takes the weights' 128 out again

    Activations(void * memory, int64_t tokens, int64_t blocks)
        : values(static_cast<int8_t *>(memory)),
          scales(reinterpret_cast<float *>(values + tokens * blocks * BLOCK)),
          totals(scales + tokens * blocks),
          offsets(reinterpret_cast<int32_t *>(totals + tokens * blocks)) {}

    static size_t bytes(int64_t tokens, int64_t blocks) {
        return tokens * blocks * (BLOCK + 2 * sizeof(float) + sizeof(int32_t));
    }

    void quantise(const float * from, int64_t token, int64_t blocks) {
        int8_t * to = values + token * blocks * BLOCK;
        for (int64_t block = token * blocks; block < (token + 1) * blocks; block++, from += BLOCK, to += BLOCK) {
            const __m512 low = _mm512_loadu_ps(from), high = _mm512_loadu_ps(from + LANES);
            const float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
            const __m512 inverse = _mm512_set1_ps(largest != 0.0f ? 127.0f / largest : 0.0f);
            const __m512i first = _mm512_cvtps_epi32(_mm512_mul_ps(low, inverse));
            const __m512i second = _mm512_cvtps_epi32(_mm512_mul_ps(high, inverse));
            _mm_storeu_si128(reinterpret_cast<__m128i *>(to), _mm512_cvtsepi32_epi8(first));
            _mm_storeu_si128(reinterpret_cast<__m128i *>(to + LANES), _mm512_cvtsepi32_epi8(second));
            const int32_t sum = _mm512_reduce_add_epi32(_mm512_add_epi32(first, second));
            scales[block] = largest / 127.0f;
            totals[block] = scales[block] * static_cast<float>(sum);
            offsets[block] = -128 * sum;
        }
    }
};

inline __m512 from_half(const uint16_t * from) {
    return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i *>(from)));
}

template <int TOKENS>
inline void add_products(__m512i (&dots)[TOKENS][2], __m512i left, __m512i right, const int8_t * values, int64_t stride) {
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++) {
        int32_t four;
        std::memcpy(&four, values + t * stride, sizeof four);
        const __m512i activation = _mm512_set1_epi32(four);
        dots[t][0] = _mm512_dpbusd_epi32(dots[t][0], left, activation);
        dots[t][1] = _mm512_dpbusd_epi32(dots[t][1], right, activation);
    }
}

template <int TOKENS>
inline void add_block(__m512i (&dots)[TOKENS][2], const Panel8 & panel, const int8_t * values, int64_t stride) {
#pragma GCC unroll 8
    for (int part = 0; part < BLOCK / 4; part++) {
        const __m512i left = _mm512_load_si512(panel.weights[0][part]);
        const __m512i right = _mm512_load_si512(panel.weights[1][part]);
        add_products<TOKENS>(dots, left, right, values + 4 * part, stride);
    }
}

template <int TOKENS>
inline void add_block(__m512i (&dots)[TOKENS][2], const Panel4 & panel, const int8_t * values, int64_t stride) {
    const __m512i lower = _mm512_set1_epi8(15);
#pragma GCC unroll 4
    for (int part = 0; part < BLOCK / 8; part++) {
        const __m512i left = _mm512_load_si512(panel.weights[0][part]);
        const __m512i right = _mm512_load_si512(panel.weights[1][part]);
        add_products<TOKENS>(dots, _mm512_and_si512(left, lower), _mm512_and_si512(right, lower), values + 8 * part,
                             stride);
        add_products<TOKENS>(dots, _mm512_and_si512(_mm512_srli_epi16(left, 4), lower),
                             _mm512_and_si512(_mm512_srli_epi16(right, 4), lower), values + 8 * part + 4, stride);
    }
}

// Computes a panel for some tokens and, where a second panel follows, asks for its weights meanwhile.
template <class Panel, int TOKENS>
void tile(const Panel * panel, const Panel * next, const Activations & from, int64_t token, int64_t blocks, float * to,
          int64_t stride) {
    __m512 sums[TOKENS][2];
    for (int t = 0; t < TOKENS; t++) {
        sums[t][0] = sums[t][1] = _mm512_setzero_ps();
    }
    const int8_t * values = from.values + token * blocks * BLOCK;
    const float * scales = from.scales + token * blocks;
    const float * totals = from.totals + token * blocks;
    const int32_t * offsets = from.offsets + token * blocks;
    for (int64_t block = 0; block < blocks; block++) {
        if (next != nullptr) {
            for (size_t line = 0; line < sizeof(Panel); line += LINE) {
                _mm_prefetch(reinterpret_cast<const char *>(next + block) + line, _MM_HINT_T1);
            }
        }
        __m512i dots[TOKENS][2];
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; t++) {
            dots[t][0] = dots[t][1] = _mm512_set1_epi32(Panel::HAS_LEAST ? 0 : offsets[t * blocks + block]);
        }
        add_block<TOKENS>(dots, panel[block], values + block * BLOCK, blocks * BLOCK);
        const __m512 left = from_half(panel[block].scales[0]), right = from_half(panel[block].scales[1]);
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; t++) {
            const __m512 scale = _mm512_set1_ps(scales[t * blocks + block]);
            sums[t][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[t][0]), _mm512_mul_ps(left, scale), sums[t][0]);
            sums[t][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[t][1]), _mm512_mul_ps(right, scale), sums[t][1]);
        }
        if constexpr (Panel::HAS_LEAST) {
            const __m512 first = from_half(panel[block].least[0]), second = from_half(panel[block].least[1]);
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; t++) {
                const __m512 total = _mm512_set1_ps(totals[t * blocks + block]);
                sums[t][0] = _mm512_fmadd_ps(first, total, sums[t][0]);
                sums[t][1] = _mm512_fmadd_ps(second, total, sums[t][1]);
            }
        }
    }
    for (int t = 0; t < TOKENS; t++) {
        _mm512_storeu_ps(to + t * stride, sums[t][0]);
        _mm512_storeu_ps(to + t * stride + LANES, sums[t][1]);
    }
}

// One panel of outputs for tokens [token, end), in tiles of nearly the same size. The first tile waits for the weights,
// the last one finds them in the cache and has time to ask for the next panel's.
template <class Panel>
void multiply(const Panel * panel, const Panel * next, const Activations & from, int64_t token, int64_t end,
              int64_t blocks, float * to, int64_t stride) {
    for (int64_t tiles = (end - token + TILE - 1) / TILE; tiles > 0; tiles--) {
        const int64_t tokens = (end - token + tiles - 1) / tiles;
        const Panel * fetched = tiles == 1 ? next : nullptr;
        switch (tokens) {
            case 6: tile<Panel, 6>(panel, fetched, from, token, blocks, to, stride); break;
            case 5: tile<Panel, 5>(panel, fetched, from, token, blocks, to, stride); break;
            case 4: tile<Panel, 4>(panel, fetched, from, token, blocks, to, stride); break;
            case 3: tile<Panel, 3>(panel, fetched, from, token, blocks, to, stride); break;
            case 2: tile<Panel, 2>(panel, fetched, from, token, blocks, to, stride); break;
            default: tile<Panel, 1>(panel, fetched, from, token, blocks, to, stride);
        }
        token += tokens;
        to += tokens * stride;
    }
}

void pack_block(const Q8Block & from, Panel8 & to, int64_t half, int64_t lane) {
    to.scales[half][lane] = from.scale;
    for (int64_t i = 0; i < BLOCK; i++) {
        to.weights[half][i / 4][lane][i % 4] = static_cast<uint8_t>(from.weights[i] + 128);
    }
}

void pack_nibbles(const uint8_t * from, Panel4 & to, int64_t half, int64_t lane) {
    const auto weight = [from](int64_t i) { return i < BLOCK / 2 ? from[i] & 15 : from[i - BLOCK / 2] >> 4; };
    for (int64_t part = 0; part < BLOCK / 8; part++) {
        for (int64_t i = 0; i < 4; i++) {
            to.weights[half][part][lane][i] = static_cast<uint8_t>(weight(8 * part + i) | weight(8 * part + 4 + i) << 4);
        }
    }
}

void pack_block(const Q4Block & from, Panel4 & to, int64_t half, int64_t lane) {
    to.scales[half][lane] = from.scale;
    to.least[half][lane] = ggml_fp32_to_fp16(-8 * ggml_fp16_to_fp32(from.scale));
    pack_nibbles(from.weights, to, half, lane);
}

void pack_block(const Q4BlockWithLeast & from, Panel4 & to, int64_t half, int64_t lane) {
    to.scales[half][lane] = from.scale;
    to.least[half][lane] = from.least;
    pack_nibbles(from.weights, to, half, lane);
}

void unpack_block(const Panel8 & from, int64_t half, int64_t lane, float * to) {
    const float scale = ggml_fp16_to_fp32(from.scales[half][lane]);
    for (int64_t i = 0; i < BLOCK; i++) {
        to[i] = scale * static_cast<float>(from.weights[half][i / 4][lane][i % 4] - 128);
    }
}

void unpack_block(const Panel4 & from, int64_t half, int64_t lane, float * to) {
    const float scale = ggml_fp16_to_fp32(from.scales[half][lane]), least = ggml_fp16_to_fp32(from.least[half][lane]);
    for (int64_t i = 0; i < BLOCK; i++) {
        const uint8_t two = from.weights[half][i / 8][lane][i % 4];
        to[i] = scale * static_cast<float>(i % 8 < 4 ? two & 15 : two >> 4) + least;
    }
}

template <class Block, class Panel>
void pack(const ggml_tensor * tensor, const void * data) {
    const int64_t blocks = tensor->ne[0] / BLOCK;
    const Block * from = static_cast<const Block *>(data);
    Panel * to = static_cast<Panel *>(tensor->data);
    for (int64_t row = 0; row < tensor->ne[1]; row++) {
        Panel * panel = to + row / PANEL * blocks;
        for (int64_t block = 0; block < blocks; block++, from++) {
            pack_block(*from, panel[block], row % PANEL / LANES, row % LANES);
        }
    }
}

class Product : public ggml::cpu::tensor_traits {
    bool work_size(int, const ggml_tensor * op, size_t & size) override {
        size = Activations::bytes(ggml_nrows(op->src[1]), op->src[1]->ne[0] / BLOCK);
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        if (op->src[0]->type == GGML_TYPE_Q8_0) {
            compute<Panel8>(*params, op);
        } else {
            compute<Panel4>(*params, op);
        }
        return true;
    }

    template <class Panel>
    static void compute(const ggml_compute_params & params, ggml_tensor * op) {
        const ggml_tensor *weights = op->src[0], *input = op->src[1];
        const int64_t blocks = weights->ne[0] / BLOCK, tokens = ggml_nrows(input);
        Activations activations(params.wdata, tokens, blocks);
        for (int64_t token = params.ith; token < tokens; token += params.nth) {
            activations.quantise(reinterpret_cast<const float *>(row(input, token)), token, blocks);
        }
        if (params.ith == 0) {
            ggml_threadpool_chunk_set(params.threadpool, params.nth);
        }
        ggml_barrier(params.threadpool);

        // Runs of neighbouring panels, since those lie one after the other in memory; where there are few, the tokens
        // are divided too.
        const int64_t panels = weights->ne[1] / PANEL, planes = input->ne[2] * input->ne[3], rows = input->ne[1];
        const int64_t wanted = params.nth * JOBS_PER_THREAD, runs = std::min(panels, wanted);
        const int64_t parts = std::max<int64_t>(1, std::min(wanted / (runs * planes), (rows + TILE - 1) / TILE));
        const int64_t stride = op->nb[1] / sizeof(float);
        const Panel * packed = static_cast<const Panel *>(weights->data);
        for (int64_t job = params.ith; job < runs * planes * parts;
             job = ggml_threadpool_chunk_add(params.threadpool, 1)) {
            const int64_t part = job % parts, plane = job / parts % planes, run = job / parts / planes;
            const int64_t begin = rows * part / parts, end = rows * (part + 1) / parts, last = panels * (run + 1) / runs;
            float * to = reinterpret_cast<float *>(row(op, plane * rows + begin));
            for (int64_t panel = panels * run / runs; panel < last; panel++) {
                const Panel * here = packed + panel * blocks;
                multiply(here, panel + 1 < last ? here + blocks : nullptr, activations, plane * rows + begin,
                         plane * rows + end, blocks, to + panel * PANEL, stride);
            }
        }
    }

    static char * row(const ggml_tensor * tensor, int64_t index) {
        const int64_t second = index / tensor->ne[1];
        return static_cast<char *>(tensor->data) + index % tensor->ne[1] * tensor->nb[1] +
               second % tensor->ne[2] * tensor->nb[2] + second / tensor->ne[2] * tensor->nb[3];
    }
};

// Single rows, as floats: token embeddings of models that use one matrix for input and output.
class Rows : public ggml::cpu::tensor_traits {
    bool work_size(int, const ggml_tensor *, size_t & size) override {
        size = 0;
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        const ggml_tensor *weights = op->src[0], *numbers = op->src[1];
        const int64_t blocks = weights->ne[0] / BLOCK;
        for (int64_t i = params->ith; i < numbers->ne[0]; i += params->nth) {
            const int32_t row = *reinterpret_cast<const int32_t *>(static_cast<char *>(numbers->data) + i * numbers->nb[0]);
            float * to = reinterpret_cast<float *>(static_cast<char *>(op->data) + i * op->nb[1]);
            if (weights->type == GGML_TYPE_Q8_0) {
                unpack(static_cast<const Panel8 *>(weights->data), row, blocks, to);
            } else {
                unpack(static_cast<const Panel4 *>(weights->data), row, blocks, to);
            }
        }
        return true;
    }

    template <class Panel>
    static void unpack(const Panel * panels, int64_t row, int64_t blocks, float * to) {
        const Panel * panel = panels + row / PANEL * blocks;
        for (int64_t block = 0; block < blocks; block++, to += BLOCK) {
            unpack_block(panel[block], row % PANEL / LANES, row % LANES, to);
        }
    }
};

Product product;
Rows rows;

bool suits(const ggml_tensor * weights) {
    const bool known =
        weights->type == GGML_TYPE_Q8_0 || weights->type == GGML_TYPE_Q4_0 || weights->type == GGML_TYPE_Q4_1;
    return known && ggml_n_dims(weights) == 2 && weights->ne[0] % BLOCK == 0 &&
           weights->ne[1] % PANEL == 0;
}

ggml_backend_buffer_type_t buffer_type();

class Packed : public ggml::cpu::extra_buffer_type {
    bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) override {
        if (op->op == GGML_OP_GET_ROWS) {
            return get_tensor_traits(op) != nullptr && suits(op->src[0]) && op->src[1]->type == GGML_TYPE_I32 &&
                   ggml_n_dims(op->src[1]) == 1;
        }
        return op->op == GGML_OP_MUL_MAT && get_tensor_traits(op) != nullptr && suits(op->src[0]) && op->src[1]->type == GGML_TYPE_F32 &&
               (op->src[1]->buffer == nullptr || ggml_backend_buffer_is_host(op->src[1]->buffer));
    }

    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        if (op->op == GGML_OP_FLASH_ATTN_EXT) {
            return appliance_attention();
        }
        if (op->src[0] == nullptr || op->src[0]->buffer == nullptr || op->src[0]->buffer->buft != buffer_type()) {
            return nullptr;
        }
        if (op->op == GGML_OP_GET_ROWS) {
            return &rows;
        }
        return op->op == GGML_OP_MUL_MAT ? &product : nullptr;
    }
};

Packed packed;

const char * name(ggml_backend_buffer_type_t) { return "CPU_PACKED"; }

size_t packed_bytes(ggml_backend_buffer_type_t, const ggml_tensor * tensor) {
    const size_t panels = suits(tensor) ? ggml_nelements(tensor) / (BLOCK * PANEL) : 0;
    return std::max(ggml_nbytes(tensor), panels * (tensor->type == GGML_TYPE_Q8_0 ? sizeof(Panel8) : sizeof(Panel4)));
}

size_t alignment(ggml_backend_buffer_type_t) { return 64; }

void set_tensor(ggml_backend_buffer_t, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    GGML_ASSERT(offset == 0 && size == ggml_nbytes(tensor) && suits(tensor));
    switch (tensor->type) {
        case GGML_TYPE_Q8_0: pack<Q8Block, Panel8>(tensor, data); break;
        case GGML_TYPE_Q4_0: pack<Q4Block, Panel4>(tensor, data); break;
        default: pack<Q4BlockWithLeast, Panel4>(tensor, data);
    }
}

// All weights are read in every step, in the order of their addresses; the processor reads ahead within a page only.
// Where the system has no huge pages to give, nothing happens.
void ask_for_huge_pages(void * memory, size_t size) {
    constexpr uintptr_t PAGE = 4096;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + PAGE - 1) / PAGE * PAGE;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + size) / PAGE * PAGE;
    if (begin < end) {
        madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
    }
}

ggml_backend_buffer_t allocate(ggml_backend_buffer_type_t type, size_t size) {
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    if (buffer != nullptr) {
        ask_for_huge_pages(ggml_backend_buffer_get_base(buffer), size);
        buffer->buft = type;
        buffer->iface.set_tensor = set_tensor;
        buffer->iface.get_tensor = nullptr;
        buffer->iface.cpy_tensor = nullptr;
    }
    return buffer;
}

ggml_backend_buffer_type_t buffer_type() {
    static ggml_backend_buffer_type type = {
        {name, allocate, alignment, nullptr, packed_bytes, nullptr},
        ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0),
        &packed,
    };
    return &type;
}

}  // namespace

// Offers the kernels to every model loaded from now on. 0: this processor has not got what they need.
extern "C" __attribute__((visibility("default"))) int appliance_kernels_install(void) {
    if (!__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("avx512bw")) {
        return 0;
    }
    auto & types = ggml_backend_cpu_get_extra_buffer_types();
    if (std::find(types.begin(), types.end(), buffer_type()) == types.end()) {
        types.insert(types.begin(), buffer_type());
    }
    return 1;
}
