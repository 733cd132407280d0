#include <nccl.h>
#ifdef USE_CUDNN
#include <cudnn.h>
extern "C" long torch_cudnn_version() { return cudnnGetVersion(); }
#else
extern "C" long torch_cudnn_version() { return 0; }
#endif
extern "C" int torch_nccl_version() {
    int version = 0;
    return ncclGetVersion(&version) == ncclSuccess ? version : -1;
}
