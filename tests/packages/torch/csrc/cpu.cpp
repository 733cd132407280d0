#include <mkl_cblas.h>
#include <omp.h>

extern "C" const char *torch_config() { return CONFIG; }
extern "C" int torch_threads() { return omp_get_max_threads(); }
extern "C" double torch_dot(int n, const double *a, const double *b) { return cblas_ddot(n, a, 1, b, 1); }
