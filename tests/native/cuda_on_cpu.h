// CUDA for a processor without a GPU: enough of the language and of PyTorch's C++ for csrc/quantization/gptq/q_gemm.cu.
//
// Blocks run one after the other, in an order of the caller's choice, for CUDA promises none. The threads of a block take
// turns: each runs until __syncthreads() or its end. half is IEEE 754 binary16, every operation rounded once, to nearest.
// Memory that CUDA does not initialise, shared memory and torch::empty, is filled with NaN.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <random>
#include <vector>

#define __CUDA_ARCH__ 700
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline

// half

struct __half_raw {
  uint16_t x;
};

struct half {
  uint16_t bits;
  half() = default;
  half(__half_raw raw) : bits(raw.x) {}
  operator __half_raw() const { return {bits}; }
};

struct alignas(4) half2 {
  half x, y;
};

inline half from_bits(uint16_t bits) { return half(__half_raw{bits}); }

inline const float* half_values() {
  static const std::vector<float> values = [] {
    std::vector<float> all(1 << 16);
    for (int bits = 0; bits < 1 << 16; bits++) {
      int exponent = bits >> 10 & 31, mantissa = bits & 1023;
      float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                   : exponent     ? std::ldexp(1024.0f + mantissa, exponent - 25)
                                  : std::ldexp(float(mantissa), -24);
      all[bits] = bits >> 15 ? -size : size;
    }
    return all;
  }();
  return values.data();
}

static const float* const VALUES = half_values();

inline float __half2float(half value) { return VALUES[value.bits]; }

// The nearest half; even on a tie. A sum or a fused product of halves that is near enough to a tie to matter is exact in
// double: the result is finite, so its digits lie between 2^16 and 2^-24, or one operand is too small to matter.
inline half nearest(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, 8);
  uint16_t sign = bits >> 48 & 0x8000;
  double size = std::fabs(value);
  if (size != size) return from_bits(0x7fff);
  if (size >= 65520) return from_bits(sign | 0x7c00);
  int exponent = std::max(int(bits >> 52 & 2047) - 1023, -14);
  uint64_t units_bits = uint64_t(1023 + 10 - exponent) << 52;
  double units;  // in the last place
  std::memcpy(&units, &units_bits, 8);
  double up = 4503599627370496.0;  // 2^52: what is added to it is rounded to a whole number
  return from_bits(sign | uint16_t(((exponent + 14) << 10) + int((size * units + up) - up)));
}

inline half __float2half(float value) { return nearest(value); }
inline half __float2half_rn(float value) { return nearest(value); }
inline half __int2half_rn(int value) { return nearest(value); }
inline half __hadd(half a, half b) { return nearest(double(__half2float(a)) + __half2float(b)); }
inline half __hsub(half a, half b) { return nearest(double(__half2float(a)) - __half2float(b)); }
inline half __hmul(half a, half b) { return nearest(double(__half2float(a)) * __half2float(b)); }
inline half __hfma(half a, half b, half c) {
  return nearest(double(__half2float(a)) * __half2float(b) + __half2float(c));
}
inline half2 __halves2half2(half low, half high) { return {low, high}; }
inline half2 __half2half2(half both) { return {both, both}; }
inline half __low2half(half2 pair) { return pair.x; }
inline half __high2half(half2 pair) { return pair.y; }
inline float __low2float(half2 pair) { return __half2float(pair.x); }
inline float __high2float(half2 pair) { return __half2float(pair.y); }
inline half2 __hadd2(half2 a, half2 b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }
inline half2 __hmul2(half2 a, half2 b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }
inline half2 __hfma2(half2 a, half2 b, half2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }

// Threads and blocks

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) int4 {
  int x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim_, gridDim_;
inline int order_of_blocks = 0;  // 0 as CUDA counts them, 1 the last first, others seed a shuffle

using std::fma;
inline int min(int a, int b) { return a < b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned min(unsigned a, int b) { return min(a, unsigned(b)); }
inline unsigned min(int a, unsigned b) { return min(unsigned(a), b); }
inline unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned shift) {
  return unsigned((uint64_t(high) << 32 | low) >> std::min(shift, 32u));
}

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[1 << 16]};
  bool running;
};

inline ucontext_t the_block;
inline Thread* the_thread;
inline std::function<void()> the_kernel;
inline std::vector<const void*> poisoned;

inline void __syncthreads() { swapcontext(&the_thread->context, &the_block); }

inline void run_thread() {
  the_kernel();
  the_thread->running = false;
}

// The first thread of a block that comes to a shared variable fills it.
inline void shared_memory(void* variable, size_t size) {
  if (std::find(poisoned.begin(), poisoned.end(), variable) != poisoned.end()) return;
  std::memset(variable, 0xff, size);
  poisoned.push_back(variable);
}

inline void run_block(unsigned threads) {
  static std::vector<Thread> pool;
  if (pool.size() < threads) pool.resize(threads);
  poisoned.clear();
  for (unsigned t = 0; t < threads; t++) {
    Thread& thread = pool[t];
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = 1 << 16;
    thread.context.uc_link = &the_block;
    makecontext(&thread.context, run_thread, 0);
    thread.running = true;
  }
  for (bool any = true; any;) {
    any = false;
    for (unsigned t = 0; t < threads; t++) {
      if (!pool[t].running) continue;
      the_thread = &pool[t];
      threadIdx = dim3(t, 0, 0);
      swapcontext(&the_block, &the_thread->context);
      any |= the_thread->running;
    }
  }
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, Arguments... arguments) {
  if (block.y != 1 || block.z != 1) std::abort();
  std::vector<dim3> blocks;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) blocks.push_back(dim3(x, y, z));
  if (order_of_blocks == 1) std::reverse(blocks.begin(), blocks.end());
  if (order_of_blocks > 1) std::shuffle(blocks.begin(), blocks.end(), std::mt19937(order_of_blocks));
  the_kernel = [=] { kernel(arguments...); };
  for (dim3 one : blocks) {
    blockIdx = one;
    run_block(block.x);
  }
}

inline half atomicAdd(half* address, half value) {
  half old = *address;
  *address = __hadd(old, value);
  return old;
}

inline half2 atomicAdd(half2* address, half2 value) {
  half2 old = *address;
  *address = __hadd2(old, value);
  return old;
}

inline unsigned atomicCAS(unsigned* address, unsigned compare, unsigned value) {
  unsigned old = *address;
  if (old == compare) *address = value;
  return old;
}

// The CUDA runtime and cuBLAS

using cudaStream_t = int;
using cudaError_t = int;
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice };

template <typename T>
cudaError_t cudaMalloc(T** address, size_t size) {
  *address = static_cast<T*>(std::aligned_alloc(64, (size + 63) / 64 * 64));
  return 0;
}
inline cudaError_t cudaFree(void* address) {
  std::free(address);
  return 0;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind) {
  std::memcpy(to, from, size);
  return 0;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t) {
  std::memset(to, value, size);
  return 0;
}
inline cudaError_t cudaDeviceSynchronize() { return 0; }

using cublasHandle_t = int;
enum cublasOperation_t { CUBLAS_OP_N };
inline int rows_by_cublas = 0;

// Stands in for cuBLAS, whose sums are rounded in an order that only it knows: these are exact but for the end.
inline void cublasHgemm(cublasHandle_t, cublasOperation_t, cublasOperation_t, int m, int n, int k, const half*,
                        const half* a, int lda, const half* b, int ldb, const half*, half* c, int ldc) {
  rows_by_cublas += n;
  std::vector<double> sums(m);
  for (int j = 0; j < n; j++) {
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int l = 0; l < k; l++) {
      double factor = __half2float(b[l + size_t(j) * ldb]);
      for (int i = 0; i < m; i++) sums[i] += factor * __half2float(a[i + size_t(l) * lda]);
    }
    for (int i = 0; i < m; i++) c[i + size_t(j) * ldc] = nearest(sums[i]);
  }
}

// PyTorch

#define C10_CUDA_CHECK(call) (void)(call)

namespace torch {

constexpr size_t MARGIN = 4096;  // bytes behind a tensor that nobody may write

struct Device {
  bool is_meta() const { return false; }
};

struct TensorOptions {
  TensorOptions dtype(int) const { return *this; }
  TensorOptions device(Device) const { return *this; }
};

inline int overruns = 0;

struct Tensor {
  std::shared_ptr<void> memory;
  int64_t rows, columns;
  void* data_ptr() const { return memory.get(); }
  int64_t size(int dimension) const { return dimension ? columns : rows; }
  int64_t numel() const { return rows * columns; }
  int dtype() const { return 0; }
  Device device() const { return {}; }
};

inline Tensor view(const void* data, int64_t rows, int64_t columns) {
  return {std::shared_ptr<void>(const_cast<void*>(data), [](void*) {}), rows, columns};
}

inline Tensor filled(std::initializer_list<int64_t> sizes, int byte) {
  int64_t rows = *sizes.begin(), columns = *(sizes.begin() + 1);
  size_t size = rows * columns * sizeof(half), whole = (size + MARGIN + 63) / 64 * 64;
  char* data = static_cast<char*>(std::aligned_alloc(64, whole));
  std::memset(data, 0xff, whole);
  std::memset(data, byte, size);
  auto give_back = [=](void* memory) {
    for (size_t i = size; i < whole; i++) overruns += data[i] != char(0xff);
    std::free(memory);
  };
  return {std::shared_ptr<void>(data, give_back), rows, columns};
}

inline Tensor empty(std::initializer_list<int64_t> sizes, TensorOptions) { return filled(sizes, 0xff); }
inline Tensor zeros(std::initializer_list<int64_t> sizes, TensorOptions) { return filled(sizes, 0); }

}  // namespace torch

namespace at {
using torch::Tensor;
namespace cuda {
struct OptionalCUDAGuard {
  OptionalCUDAGuard(torch::Device) {}
};
inline cublasHandle_t getCurrentCUDABlasHandle() { return 0; }
inline cudaStream_t getCurrentCUDAStream() { return 0; }
}  // namespace cuda
}  // namespace at

inline torch::Device device_of(const torch::Tensor&) { return {}; }
