#include <Python.h>

const char *torch_config(void);
long torch_cudnn_version(void);
int torch_nccl_version(void);
int torch_fill(int n, float value, float *x);
int torch_copy(int n, const float *value, float *x);

static PyObject *config(PyObject *self, PyObject *none) { return PyUnicode_FromString(torch_config()); }
static PyObject *archs(PyObject *self, PyObject *none) { return PyUnicode_FromString(ARCH); }
static PyObject *cudnn(PyObject *self, PyObject *none) { return PyLong_FromLong(torch_cudnn_version()); }
static PyObject *nccl(PyObject *self, PyObject *none) { return PyLong_FromLong(torch_nccl_version()); }
static PyObject *launch(PyObject *self, PyObject *none) {
    return PyLong_FromLong(torch_fill(0, 0, 0) + torch_copy(0, 0, 0));
}

static PyMethodDef methods[] = {
    {"_show_config", config, METH_NOARGS, "How it was configured."},
    {"_cuda_getArchFlags", archs, METH_NOARGS, "What its device code is for."},
    {"_cudnn_version", cudnn, METH_NOARGS, "0 without cuDNN."},
    {"_nccl_version", nccl, METH_NOARGS, "NCCL's."},
    {"_launch", launch, METH_NOARGS, "Launch on nothing; gives CUDA's status."},
    {0, 0, 0, 0},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", 0, -1, methods};

PyObject *torch_module(void) { return PyModule_Create(&module); }
