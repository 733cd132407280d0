#include <cuda.h>
#include <cuda_runtime.h>

__global__ void saxpy(int n, float a, const float *x, float *y) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = a * x[i] + y[i];
}

extern "C" const char *where_saxpy() { return __FILE__; }

extern "C" int saxpy_on_device(int n, float a, const float *x, float *y) {
    if (CUresult status = cuInit(0)) return status;
    saxpy<<<(n + 255) / 256, 256>>>(n, a, x, y);
    return cudaGetLastError();
}
