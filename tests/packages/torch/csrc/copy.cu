#include <cuda_runtime.h>

__global__ void copy(int n, const float *value, float *x) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] = value[i];
}

extern "C" int torch_copy(int n, const float *value, float *x) {
    copy<<<(n + 255) / 256, 256>>>(n, value, x);
    return cudaGetLastError();
}
