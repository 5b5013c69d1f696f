// The stages of a decoder layer and who does what in each. Arithmetic is in algorithms.h, in each instruction set.
#include "decoder.h"

namespace lownibble {
namespace {

constexpr std::int64_t kFewTokens = 8;  // up to here the matrix-vector product is faster (AVX-512, 2 threads)
constexpr std::int64_t kRowStep = 4;    // shares of rows begin at multiples of it: what that product takes at once

Range share(std::int64_t n, std::int64_t step, const Worker& worker) {
    const std::int64_t steps = (n + step - 1) / step;
    return {smaller(n, steps * worker.index / worker.count * step), smaller(n, steps * (worker.index + 1) / worker.count * step)};
}

// out (T, N) = x W^T for this thread's share of the rows of W, which is returned.
Range product(const Linear4bit& linear, const float* x, std::int64_t T, float* out, const Worker& worker) {
    const Weight4bit w{linear.codes,         linear.values,        linear.absmax,        linear.nested_values,
                       linear.nested_absmax, linear.nested_offset, linear.N * linear.K,  linear.block_shift,
                       linear.nested_shift};
    if (T <= kFewTokens || !worker.matmul || linear.K % 64 || linear.block_shift < 5) {
        const Range rows = share(linear.N, kRowStep, worker);
        if (rows.begin < rows.end) worker.kernels->gemv_4bit(x, T, linear.K, w, DType::float32, out, linear.N, rows);
        for (std::int64_t t = 0; linear.bias && t < T; ++t) {
            for (std::int64_t n = rows.begin; n < rows.end; ++n) out[t * linear.N + n] += linear.bias[n];
        }
        return rows;
    }
    const Range rows = share(linear.N, kMatmulPanel, worker);
    const Addition addition{linear.bias, nullptr, nullptr, 0, 0, 0, 0.0f};
    const std::int64_t end = (rows.end + kMatmulPanel - 1) / kMatmulPanel;
    for (std::int64_t panel = rows.begin / kMatmulPanel; panel < end; panel += kMatmulGroup) {
        worker.matmul->matmul_4bit(x, w, linear.N, linear.K, false, addition, out, worker.scratch,
                                   Range{panel, smaller(end, panel + kMatmulGroup)}, Range{0, T});
    }
    return rows;
}

// `index`: which of the layers it is.
void decoder_layer(const DecoderLayer& layer, std::int64_t index, const Tokens& tokens, std::int64_t largest_r, float* workspace,
                   const Worker& worker) {
    const Kernels& kernels = *worker.kernels;
    const std::int64_t T = tokens.T, H = layer.hidden, D = layer.head_dim, r = largest_r;
    const std::int64_t q_size = layer.heads * D, kv_size = layer.key_heads * D, inner = layer.projections[kGate].N;
    float* const normed = workspace;
    float* const attended = normed + T * H;
    float* const low = attended + T * q_size;  // (projection, T, r)
    float* const q = low + kProjections * T * r;
    float* const k = q + T * q_size;
    float* const v = k + T * kv_size;
    float* const gate = v + T * kv_size;
    float* const up = gate + T * inner;
    const Context& context = tokens.contexts[layer.context];
    const std::int64_t* const places = tokens.places + layer.context * T;
    const std::int64_t cache_size = tokens.n_slots * layer.key_heads * context.capacity * D;
    float *const keys = context.keys + layer.row * cache_size, *const values = context.values + layer.row * cache_size;
    float* const scores = up + T * inner + worker.index * tokens.longest;

    const auto norm = [&](const float* weight) {
        const Range rows = share(T, 1, worker);
        for (std::int64_t t = rows.begin; t < rows.end; ++t) kernels.rms_norm(tokens.x + t * H, weight, H, layer.eps, normed + t * H);
        worker.meet();
    };
    // The r values of each branch of projections [first, last], whose input is x; rows of A in turns.
    const auto reduce = [&](const float* x, int first, int last) {
        if (!r) return;
        std::int64_t turn = 0;
        for (std::int64_t s = 0; s < tokens.n_segments; ++s) {
            const Segment& segment = tokens.segments[s];
            for (int p = first; p <= last; ++p) {
                const LowRank& branch = segment.branches[index * kProjections + p];
                const std::int64_t K = layer.projections[p].K;
                for (std::int64_t j = 0; branch.A && j < branch.r; j += kRowStep) {
                    if (turn++ % worker.count != worker.index) continue;
                    const Range rows{j, smaller(branch.r, j + kRowStep)};
                    float* const reduced = low + (p * T + segment.begin) * r;
                    const std::int64_t tokens_of = segment.end - segment.begin;
                    kernels.gemv_dense(x + segment.begin * K, tokens_of, K, branch.dtype, branch.A, reduced, r, rows);
                    for (std::int64_t t = 0; t < tokens_of; ++t) {
                        for (std::int64_t i = rows.begin; i < rows.end; ++i) reduced[t * r + i] *= branch.scale;
                    }
                }
            }
        }
        worker.meet();
    };
    // Projection p of x with its branches, for this thread's share of the columns, which is returned.
    const auto project = [&](int p, const float* x, float* out) {
        const Linear4bit& linear = layer.projections[p];
        const Range rows = product(linear, x, T, out, worker);
        for (std::int64_t s = 0; r && s < tokens.n_segments; ++s) {
            const Segment& segment = tokens.segments[s];
            const LowRank& branch = segment.branches[index * kProjections + p];
            if (!branch.A) continue;
            for (std::int64_t t = segment.begin; branch.gain && t < segment.end; ++t) {
                for (std::int64_t n = rows.begin; n < rows.end; ++n) {
                    const float bias = linear.bias ? linear.bias[n] : 0.0f;
                    out[t * linear.N + n] = (out[t * linear.N + n] - bias) * branch.gain[n] + bias;
                }
            }
            kernels.add_low_rank(low + (p * T + segment.begin) * r, r, segment.end - segment.begin, branch.r, branch.dtype,
                                 branch.B_transposed, out + segment.begin * linear.N, linear.N, rows);
        }
        return rows;
    };
    // x += residual_scale times the projection of `input`, whose output lies in `out`, or its norm.
    const auto add_projection = [&](int p, const float* input, float* out, const float* out_norm) {
        Range columns = project(p, input, out), rows{0, T};
        if (out_norm) {
            worker.meet();
            columns = {0, H}, rows = share(T, 1, worker);
        }
        for (std::int64_t t = rows.begin; t < rows.end; ++t) {
            if (out_norm) kernels.rms_norm(out + t * H, out_norm, H, layer.eps, out + t * H);
            for (std::int64_t n = columns.begin; n < columns.end; ++n) tokens.x[t * H + n] += layer.residual_scale * out[t * H + n];
        }
        worker.meet();
    };

    norm(layer.input_norm);
    reduce(normed, kQ, kV);
    project(kQ, normed, q);
    project(kK, normed, k);
    project(kV, normed, v);
    worker.meet();

    const std::int64_t heads = layer.heads + 2 * layer.key_heads;
    const Range turned = share(T * heads, 1, worker);
    for (std::int64_t item = turned.begin; item < turned.end; ++item) {
        const std::int64_t t = item / heads, head = item % heads;
        const std::int64_t angle = (layer.rope * T + t) * D;
        const float *cosine = tokens.cosine + angle, *sine = tokens.sine + angle;
        if (head < layer.heads) {
            float* const at = q + t * q_size + head * D;
            if (layer.q_norm) kernels.rms_norm(at, layer.q_norm, D, layer.eps, at);
            kernels.rotate(at, cosine, sine, D, at);
            continue;
        }
        const std::int64_t key_head = (head - layer.heads) % layer.key_heads;
        const std::int64_t place = ((tokens.slots[t] * layer.key_heads + key_head) * context.capacity + places[t]) * D;
        if (head < layer.heads + layer.key_heads) {
            float* const at = k + t * kv_size + key_head * D;
            if (layer.k_norm) kernels.rms_norm(at, layer.k_norm, D, layer.eps, at);
            kernels.rotate(at, cosine, sine, D, keys + place);
        } else {
            std::memcpy(values + place, v + t * kv_size + key_head * D, static_cast<std::size_t>(D) * sizeof(float));
        }
    }
    worker.meet();

    std::int64_t turn = 0;  // in turns, since later tokens of a prompt attend to more
    for (std::int64_t t = 0; t < T; ++t) {
        const std::int64_t length = places[t] + 1, count = layer.window ? smaller(length, layer.window) : length;
        for (std::int64_t head = 0; head < layer.heads; ++head) {
            if (turn++ % worker.count != worker.index) continue;
            const std::int64_t key_head = head / (layer.heads / layer.key_heads);
            const std::int64_t slot = tokens.slots[t] * layer.key_heads + key_head;
            const std::int64_t place = (slot * context.capacity + length - count) * D;
            kernels.attend(q + t * q_size + head * D, keys + place, values + place, count, D, layer.scaling, layer.softcap,
                           scores, attended + t * q_size + head * D);
        }
    }
    worker.meet();

    reduce(attended, kO, kO);
    add_projection(kO, attended, normed, layer.attention_output_norm);
    if (!inner) return;  // attention only

    norm(layer.feed_forward_norm);
    reduce(normed, kGate, kUp);
    project(kGate, normed, gate);
    const Range columns = project(kUp, normed, up);
    for (std::int64_t t = 0; t < T; ++t) {
        const std::int64_t begin = t * inner + columns.begin;
        kernels.activate_multiply(layer.activation, gate + begin, up + begin, columns.end - columns.begin, gate + begin);
    }
    worker.meet();
    reduce(gate, kDown, kDown);
    add_projection(kDown, gate, normed, layer.feed_forward_output_norm);
}

}  // namespace

void decoder_layers(const DecoderLayer* layers, std::int64_t n_layers, const Tokens& tokens, std::int64_t largest_r,
                    float* workspace, const Worker& worker) {
    for (std::int64_t i = 0; i < n_layers; ++i) decoder_layer(layers[i], i, tokens, largest_r, workspace, worker);
}

}  // namespace lownibble
