// Multiplies a matrix with llama.cpp's ggml, on one thread, some times.
//
//     llama_cpp TYPE plain|repacked CHANNELS COLUMNS ROWS TIMES      e.g. q4_0 repacked 2048 256 128 1
//
// Prints the relative error of the first row against float, or "none" if there is no such form of the type.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml-cpu/repack.h"
#include "ggml.h"

static void fail(const char *what) {
  fprintf(stderr, "llama_cpp: %s\n", what);
  exit(2);
}

static ggml_type type_of(const char *name) {
  for (int type = 0; type < GGML_TYPE_COUNT; type++)
    if (const char *other = ggml_type_name((ggml_type)type); other && !strcasecmp(name, other)) return (ggml_type)type;
  fail("unknown type");
  return GGML_TYPE_COUNT;
}

static ggml_context *context() { return ggml_init({16 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true}); }

// Numbers from -1 to 1 that repeat late.
static std::vector<float> numbers(size_t count, unsigned seed) {
  std::vector<float> values(count);
  for (float &value : values) value = (float)((seed = seed * 1664525u + 1013904223u) >> 8) / (1 << 23) - 1;
  return values;
}

static double error_of_first_row(const std::vector<float> &w, const std::vector<float> &x, ggml_tensor *out) {
  size_t channels = w.size() / out->ne[0];
  std::vector<float> got(out->ne[0]);
  ggml_backend_tensor_get(out, got.data(), 0, got.size() * sizeof(float));
  double difference = 0, size = 0;
  for (size_t n = 0; n < got.size(); n++) {
    double sum = 0;
    for (size_t k = 0; k < channels; k++) sum += (double)w[n * channels + k] * x[k];
    difference += (got[n] - sum) * (got[n] - sum), size += sum * sum;
  }
  return sqrt(difference / size);
}

int main(int count, char **words) {
  if (count != 7) fail("give TYPE plain|repacked CHANNELS COLUMNS ROWS TIMES");
  ggml_type type = type_of(words[1]);
  bool repacked = !strcmp(words[2], "repacked");
  long K = atol(words[3]), N = atol(words[4]), M = atol(words[5]), times = atol(words[6]);
  ggml_backend_t cpu = ggml_backend_cpu_init();
  ggml_backend_cpu_set_n_threads(cpu, 1);
  ggml_backend_buffer_type_t place =
      repacked ? ggml_backend_cpu_repack_buffer_type() : ggml_backend_get_default_buffer_type(cpu);

  ggml_context *stored = context(), *computed = context();
  ggml_tensor *w = ggml_new_tensor_2d(stored, type, K, N);
  if (!ggml_backend_alloc_ctx_tensors_from_buft(stored, place)) fail("no memory");
  if (repacked && !w->extra) return puts("none"), 0;
  std::vector<float> weights = numbers(K * N, 1), activations = numbers(K * M, 2);
  std::vector<char> codes(ggml_nbytes(w));
  ggml_quantize_chunk(type, weights.data(), codes.data(), 0, N, K, nullptr);
  ggml_backend_tensor_set(w, codes.data(), 0, codes.size());

  ggml_tensor *x = ggml_new_tensor_2d(computed, GGML_TYPE_F32, K, M), *out = ggml_mul_mat(computed, w, x);
  ggml_cgraph *graph = ggml_new_graph(computed);
  ggml_build_forward_expand(graph, out);
  if (!ggml_backend_alloc_ctx_tensors(computed, cpu)) fail("no memory");
  ggml_backend_tensor_set(x, activations.data(), 0, activations.size() * sizeof(float));
  for (long left = times; left > 0; left--)
    if (ggml_backend_graph_compute(cpu, graph) != GGML_STATUS_SUCCESS) fail("the product failed");
  printf("%.6f\n", error_of_first_row(weights, activations, out));
  return 0;
}
