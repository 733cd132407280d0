#include <Python.h>

PyObject *torch_module(void);
PyMODINIT_FUNC PyInit__C(void) { return torch_module(); }
