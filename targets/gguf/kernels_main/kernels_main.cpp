// Time the products of ggml's types on this processor, in matrices that lie in memory as llama.cpp holds them.
//
//     kernels_main THREADS ROUNDS BYTES PROMPT REFERENCE TYPE...
//
// For one token, as many matrices of a shape as make BYTES are multiplied in a row, so that none is still in a cache when
// its turn comes again; for a prompt, a few matrices are multiplied with PROMPT tokens. Each type takes turns with the
// type REFERENCE, ROUNDS times after a warm-up, so that what else happens to the processor happens to both. Products are
// compared with those of the decoded weights first. Prints one JSON document: the nanoseconds of one product.

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cinttypes>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

namespace {

struct Shape {
    int64_t rows, columns, tokens;
};

// Columns are multiples of the longest block, 256 weights. Small matrices tell what a product takes beside its weights.
constexpr int64_t SMALL[] = {512, 512}, MEDIUM[] = {2048, 1024}, LARGE[] = {4096, 4096}, PROMPT_MATRIX[] = {2048, 2048};
constexpr int64_t PROMPT_MATRICES = 2;
// Rows that are encoded; the rows of all matrices repeat them.
constexpr int64_t ENCODED_ROWS = 16;
// Root mean square error over that of the products; inputs in 8 bits cost less than 0.02.
constexpr double MOST_ERROR = 0.05;

[[noreturn]] void fail(const std::string & what) {
    std::fprintf(stderr, "%s\n", what.c_str());
    std::exit(1);
}

template <typename T> using Owned = std::unique_ptr<T, std::function<void(T *)>>;

Owned<ggml_context> context_of(size_t tensors, size_t nodes) {
    const ggml_init_params parameters = {
        ggml_tensor_overhead() * tensors + (nodes != 0 ? ggml_graph_overhead_custom(nodes, false) : 0), nullptr, true};
    return {ggml_init(parameters), ggml_free};
}

// Numbers between -1 and 1, the same in every run.
std::vector<float> numbers(int64_t count, uint32_t seed) {
    std::vector<float> made(static_cast<size_t>(count));
    for (float & one : made) {
        seed = seed * 1664525U + 1013904223U;
        one = static_cast<float>(seed >> 8) / (1U << 23) - 1.0F;
    }
    return made;
}

ggml_type type_named(const std::string & name) {
    for (int type = 0; type < GGML_TYPE_COUNT; ++type) {
        const char * known = ggml_type_name(static_cast<ggml_type>(type));
        std::string upper = known == nullptr ? "" : known;
        for (char & letter : upper) {
            letter = static_cast<char>(std::toupper(static_cast<unsigned char>(letter)));
        }
        if (upper == name) {
            return static_cast<ggml_type>(type);
        }
    }
    fail("ggml has no type " + name);
}

// The kind of buffer in which llama.cpp keeps a weight: one that rearranges it, if the processor has kernels for that.
ggml_backend_buffer_type_t buffer_type(ggml_backend_dev_t device, ggml_type type, Shape shape) {
    auto * more = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(ggml_backend_reg_get_proc_address(
        ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
    for (auto * kind = more != nullptr ? more(device) : nullptr; kind != nullptr && *kind != nullptr; ++kind) {
        const auto context = context_of(4, 0);
        ggml_tensor * weight = ggml_new_tensor_2d(context.get(), type, shape.columns, shape.rows);
        ggml_tensor * input = ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, shape.columns, shape.tokens);
        ggml_tensor * product = ggml_mul_mat(context.get(), weight, input);
        const Owned<ggml_backend_buffer> empty(ggml_backend_buft_alloc_buffer(*kind, 0), ggml_backend_buffer_free);
        weight->buffer = empty.get();
        if (ggml_backend_dev_supports_op(device, product)) {
            return *kind;
        }
    }
    return ggml_backend_dev_buffer_type(device);
}

// Matrices of one type and shape, multiplied one after the other.
class Products {
  public:
    Products(ggml_backend_t backend, ggml_type type, Shape shape, int64_t count)
        : backend_(backend), type_(type), shape_(shape), count_(count),
          weights_(context_of(static_cast<size_t>(count), 0)),
          graph_memory_(context_of(static_cast<size_t>(count) + 1, static_cast<size_t>(count) + 8)) {
        graph_ = ggml_new_graph_custom(graph_memory_.get(), static_cast<size_t>(count) + 8, false);
        input_ = ggml_new_tensor_2d(graph_memory_.get(), GGML_TYPE_F32, shape.columns, shape.tokens);
        for (int64_t i = 0; i < count; ++i) {
            ggml_tensor * weight = ggml_new_tensor_2d(weights_.get(), type, shape.columns, shape.rows);
            ggml_build_forward_expand(graph_, ggml_mul_mat(graph_memory_.get(), weight, input_));
        }
        ggml_backend_dev_t device = ggml_backend_get_device(backend);
        matrices_ = {ggml_backend_alloc_ctx_tensors_from_buft(weights_.get(), buffer_type(device, type, shape)),
                     ggml_backend_buffer_free};
        vectors_ = {ggml_backend_alloc_ctx_tensors(graph_memory_.get(), backend), ggml_backend_buffer_free};
        if (!matrices_ || !vectors_) {
            fail("the memory is too small for the matrices");
        }
        fill();
    }

    int64_t ns() {
        const auto begun = std::chrono::steady_clock::now();
        if (ggml_backend_graph_compute(backend_, graph_) != GGML_STATUS_SUCCESS) {
            fail("ggml cannot multiply");
        }
        const auto taken = std::chrono::steady_clock::now() - begun;
        return std::chrono::duration_cast<std::chrono::nanoseconds>(taken).count() / count_;
    }

    // Compare the product of the last matrix and token with that of the decoded weights.
    void check() {
        ns();
        std::vector<float> found(static_cast<size_t>(ENCODED_ROWS));
        const ggml_tensor * product = ggml_graph_node(graph_, -1);
        ggml_backend_tensor_get(product, found.data(), ggml_nbytes(product) - static_cast<size_t>(shape_.rows) * 4,
                                found.size() * 4);
        double error = 0, size = 0;
        std::vector<float> row(static_cast<size_t>(shape_.columns));
        const float * token = inputs_.data() + (shape_.tokens - 1) * shape_.columns;
        for (int64_t r = 0; r < ENCODED_ROWS; ++r) {
            const char * stored = encoded_.data() + static_cast<size_t>(r) * ggml_row_size(type_, shape_.columns);
            if (type_ == GGML_TYPE_F32) {
                row.assign(reinterpret_cast<const float *>(stored), reinterpret_cast<const float *>(stored) + row.size());
            } else {
                ggml_get_type_traits(type_)->to_float(stored, row.data(), shape_.columns);
            }
            double expected = 0;
            for (size_t c = 0; c < row.size(); ++c) {
                expected += static_cast<double>(row[c]) * token[c];
            }
            error += std::pow(found[static_cast<size_t>(r)] - expected, 2);
            size += expected * expected;
        }
        if (!(std::sqrt(error / size) < MOST_ERROR)) {
            fail(std::string("wrong products of ") + ggml_type_name(type_) + " on this processor: an error of "
                 + std::to_string(std::sqrt(error / size)));
        }
    }

  private:
    void fill() {
        const size_t bytes = ggml_row_size(type_, shape_.columns);
        encoded_.resize(bytes * ENCODED_ROWS);
        const std::vector<float> weights = numbers(ENCODED_ROWS * shape_.columns, 1);
        const std::vector<float> importance(static_cast<size_t>(shape_.columns), 1.0F);
        ggml_quantize_chunk(type_, weights.data(), encoded_.data(), 0, ENCODED_ROWS, shape_.columns, importance.data());
        std::vector<char> matrix(bytes * static_cast<size_t>(shape_.rows));
        for (size_t place = 0; place < matrix.size(); place += encoded_.size()) {
            std::copy(encoded_.begin(), encoded_.end(), matrix.begin() + static_cast<std::ptrdiff_t>(place));
        }
        for (ggml_tensor * one = ggml_get_first_tensor(weights_.get()); one != nullptr;
             one = ggml_get_next_tensor(weights_.get(), one)) {
            ggml_backend_tensor_set(one, matrix.data(), 0, matrix.size());
        }
        inputs_ = numbers(shape_.columns * shape_.tokens, 2);
        ggml_backend_tensor_set(input_, inputs_.data(), 0, inputs_.size() * sizeof(float));
    }

    ggml_backend_t backend_;
    ggml_type type_;
    Shape shape_;
    int64_t count_;
    Owned<ggml_context> weights_, graph_memory_;
    Owned<ggml_backend_buffer> matrices_, vectors_;
    ggml_cgraph * graph_ = nullptr;
    ggml_tensor * input_ = nullptr;
    std::vector<char> encoded_;
    std::vector<float> inputs_;
};

void print(const char * name, const std::vector<int64_t> & values) {
    std::printf(", \"%s\": [", name);
    for (size_t i = 0; i < values.size(); ++i) {
        std::printf("%s%" PRId64, i == 0 ? "" : ", ", values[i]);
    }
    std::printf("]");
}

int64_t number(const char * text, int64_t least, int64_t most) {
    const int64_t value = std::strtoll(text, nullptr, 10);
    if (value < least || value > most) {
        fail(std::string("not a possible number: ") + text);
    }
    return value;
}

}  // namespace

int main(int count, char ** given) {
    if (count < 7) {
        fail("usage: kernels_main THREADS ROUNDS BYTES PROMPT REFERENCE TYPE...");
    }
    const auto threads = static_cast<int>(number(given[1], 1, 256));
    const int64_t rounds = number(given[2], 1, 1000), bytes = number(given[3], 1, int64_t{1} << 32);
    const int64_t prompt = number(given[4], 2, 4096);
    const ggml_type reference = type_named(given[5]);
    // It would name every matrix that it rearranges.
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    const Owned<ggml_backend> backend(ggml_backend_cpu_init(), ggml_backend_free);
    ggml_backend_cpu_set_n_threads(backend.get(), threads);

    const auto products = [&](ggml_type type, Shape shape) {
        const auto one = static_cast<int64_t>(ggml_row_size(type, shape.columns)) * shape.rows;
        const int64_t matrices = shape.tokens > 1 ? PROMPT_MATRICES : (bytes + one - 1) / one;
        return std::make_unique<Products>(backend.get(), type, shape, matrices);
    };
    const std::time_t now = std::time(nullptr);
    char begun[32] = "";
    std::strftime(begun, sizeof begun, "%Y-%m-%dT%H:%M:%SZ", std::gmtime(&now));
    std::printf("{\"threads\": %d, \"time\": \"%s\", \"products\": [", threads, begun);
    const char * separator = "";
    const Shape shapes[] = {{SMALL[0], SMALL[1], 1}, {MEDIUM[0], MEDIUM[1], 1}, {LARGE[0], LARGE[1], 1},
                            {PROMPT_MATRIX[0], PROMPT_MATRIX[1], prompt}};
    for (const Shape shape : shapes) {
        const auto base = products(reference, shape);
        base->check();
        for (int i = 6; i < count; ++i) {
            const ggml_type type = type_named(given[i]);
            const auto timed = products(type, shape);
            timed->check();
            std::vector<int64_t> base_ns, type_ns;
            for (int64_t round = 0; round < rounds; ++round) {
                base_ns.push_back(base->ns());
                type_ns.push_back(timed->ns());
            }
            std::printf("%s\n{\"type\": \"%s\", \"rows\": %" PRId64 ", \"columns\": %" PRId64 ", \"tokens\": %" PRId64
                        ", \"row_bytes\": %zu",
                        separator, given[i], shape.rows, shape.columns, shape.tokens, ggml_row_size(type, shape.columns));
            print("reference_ns", base_ns);
            print("ns", type_ns);
            std::printf("}");
            std::fflush(stdout);
            separator = ",";
        }
    }
    std::printf("\n]}\n");
    return 0;
}
