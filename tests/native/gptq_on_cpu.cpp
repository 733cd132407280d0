// vLLM's gptq_gemm and gptq_shuffle, from their own source, behind plain C functions.
#include "cuda_on_cpu.h"
// The sources of the tree, its launches written as function calls by tests/gptq.py.
#include "q_gemm.cu"

struct Told {
  int32_t rows_by_cublas;  // what did not go through the fused kernels
  int32_t overruns;        // bytes written behind the result
};

extern "C" Told gemm(const half* a, const uint32_t* weights, const uint32_t* zeros, const half* scales,
                     const int* permutation, half* result, int m, int n, int k, int groups, int exllama, int v2,
                     int bits, int order) {
  order_of_blocks = order;
  rows_by_cublas = torch::overruns = 0;
  {
    torch::Tensor c = gptq_gemm(torch::view(a, m, k), torch::view(weights, int64_t(k) * bits / 32, n),
                                torch::view(zeros, groups, int64_t(n) * bits / 32), torch::view(scales, groups, n),
                                torch::view(permutation, 1, permutation ? k : 0), exllama, v2, bits);
    std::memcpy(result, c.data_ptr(), sizeof(half) * m * n);
  }
  return {rows_by_cublas, torch::overruns};
}

extern "C" void shuffle(uint32_t* weights, int* permutation, int n, int k, int bits) {
  gptq_shuffle(torch::view(weights, int64_t(k) * bits / 32, n), torch::view(permutation, 1, permutation ? k : 0), bits);
}

extern "C" void add(const half* a, const half* b, half* result, int count) {
  for (int i = 0; i < count; i++) result[i] = __hadd(a[i], b[i]);
}

extern "C" void fused(const half* a, const half* b, const half* c, half* result, int count) {
  for (int i = 0; i < count; i++) result[i] = __hfma(a[i], b[i], c[i]);
}

extern "C" void narrowed(const float* values, half* result, int count) {
  for (int i = 0; i < count; i++) result[i] = __float2half_rn(values[i]);
}
