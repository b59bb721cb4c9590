// Run a model under llama.cpp and keep its logits: a program of its own, built for one kind of core.
//
//     emulated_main EXACT SINGLE THREADS TOKENS LOGITS MODEL [ADAPTER]
//
// EXACT is 1 for keys and values in float32, else 0. TOKENS is a file of int32, of which the last SINGLE come one at a
// time, with the keys and values of those before. LOGITS becomes a .npy file, float32 [tokens, vocabulary].

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "llama.h"

namespace {

// As the exporter's own runtime has it (`LLAMA_CPP_BATCH`).
constexpr int32_t BATCH = 512;

[[noreturn]] void fail(const std::string & what) {
    std::fprintf(stderr, "%s\n", what.c_str());
    std::exit(1);
}

std::vector<llama_token> read_tokens(const char * path) {
    std::ifstream file(path, std::ios::binary);
    const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
    const auto * first = reinterpret_cast<const llama_token *>(bytes.data());
    return {first, first + bytes.size() / sizeof(llama_token)};
}

// The header of version 1.0: numpy/lib/format.py.
void write_header(std::ofstream & file, size_t rows, size_t columns) {
    std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (" + std::to_string(rows) + ", "
        + std::to_string(columns) + "), }";
    header.resize((10 + header.size() + 1 + 63) / 64 * 64 - 10 - 1, ' ');
    header += '\n';
    const char start[] = {'\x93', 'N', 'U', 'M', 'P', 'Y', 1, 0,
                          static_cast<char>(header.size() & 0xff), static_cast<char>(header.size() >> 8)};
    file.write(start, sizeof start);
    file << header;
}

}  // namespace

int main(int count, char ** given) {
    if (count != 7 && count != 8) {
        fail("usage: emulated_main EXACT SINGLE THREADS TOKENS LOGITS MODEL [ADAPTER]");
    }
    const bool exact = std::atoi(given[1]) != 0;
    const auto single = static_cast<size_t>(std::atoi(given[2]));
    const int32_t threads = std::atoi(given[3]);
    auto tokens = read_tokens(given[4]);
    if (tokens.empty() || single > tokens.size()) {
        fail("no tokens");
    }

    llama_model * model = llama_model_load_from_file(given[6], llama_model_default_params());
    if (model == nullptr) {
        fail("llama.cpp cannot load the file");
    }
    // Before the context: its graphs are given room for the adapters that the model then has.
    llama_adapter_lora * adapter = count == 8 ? llama_adapter_lora_init(model, given[7]) : nullptr;
    if (count == 8 && adapter == nullptr) {
        fail("llama.cpp cannot load the adapter");
    }
    llama_context_params parameters = llama_context_default_params();
    parameters.n_ctx = static_cast<uint32_t>(tokens.size());
    parameters.n_batch = parameters.n_ubatch = BATCH;
    parameters.n_threads = parameters.n_threads_batch = threads;
    if (exact) {
        parameters.type_k = parameters.type_v = GGML_TYPE_F32;
        parameters.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    }
    llama_context * context = llama_init_from_model(model, parameters);
    if (context == nullptr) {
        fail("llama.cpp cannot make a context");
    }
    if (adapter != nullptr) {
        float strength = 1.0F;
        llama_set_adapters_lora(context, &adapter, 1, &strength);
    }

    const auto vocabulary = static_cast<size_t>(llama_vocab_n_tokens(llama_model_get_vocab(model)));
    std::ofstream file(given[5], std::ios::binary);
    write_header(file, tokens.size(), vocabulary);
    llama_batch batch = llama_batch_init(BATCH, 0, 1);
    const size_t start = tokens.size() - single;
    for (size_t done = 0; done < tokens.size();) {
        const size_t left = done < start ? start - done : 1;
        batch.n_tokens = static_cast<int32_t>(left < BATCH ? left : BATCH);
        for (int32_t i = 0; i < batch.n_tokens; ++i) {
            batch.token[i] = tokens[done + i];
            batch.pos[i] = static_cast<llama_pos>(done + i);
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i] = 1;
        }
        if (llama_decode(context, batch) != 0) {
            fail("llama.cpp failed to decode");
        }
        file.write(reinterpret_cast<const char *>(llama_get_logits(context)),
                   static_cast<std::streamsize>(sizeof(float) * vocabulary * batch.n_tokens));
        done += batch.n_tokens;
    }
    file.close();
    if (!file) {
        fail("the logits cannot be written");
    }
    return 0;
}
