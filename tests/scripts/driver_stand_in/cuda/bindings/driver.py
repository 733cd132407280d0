"""Replace the CUDA driver on a machine without one, for tests/volta/test_run.py.

It implements the kernels of tests/support/faults.py.

Environment variables set its properties: STAND_IN_CAPABILITY (7.0), STAND_IN_CUDA (12.4), STAND_IN_FREE (bytes) and
STAND_IN_CARDS.
The same rows were also run on a real card, with the same results.
"""

import ctypes
import enum
import os
import re
import time

KINDS = ("CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR", "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR")
CUdevice_attribute = enum.Enum("CUdevice_attribute", KINDS)
CUjit_option = enum.Enum("CUjit_option", ("CU_JIT_ERROR_LOG_BUFFER", "CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES"))
CUfunction_attribute = enum.Enum("CUfunction_attribute", ("CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES",))
CUstreamCaptureMode = enum.Enum("CUstreamCaptureMode", ("CU_STREAM_CAPTURE_MODE_RELAXED",))

FINE, NO_DEVICE, BAD_PTX, NOT_FOUND, ASTRAY = 0, 100, 218, 500, 700
WORDS = {NO_DEVICE: "no CUDA-capable device is detected", BAD_PTX: "a PTX JIT compilation failed",
         NOT_FOUND: "named symbol not found", ASTRAY: "an illegal memory access was encountered"}  # fmt: skip

memory = {}
state = {"pending": []}


def told(name, usual):
    return os.environ.get(f"STAND_IN_{name}", usual)


def numbers(version):
    return [int(one) for one in version.split(".")]


def cuGetErrorString(status):
    return FINE, WORDS[status].encode()


def cuInit(flags):
    return (NO_DEVICE if told("CARDS", "1") == "0" else FINE,)


def cuDeviceGetCount():
    return FINE, int(told("CARDS", "1"))


def cuDeviceGet(number):
    return FINE, number


def cuDeviceGetName(length, device):
    return FINE, b"Stand-in".ljust(length, b"\0")


def cuDeviceGetAttribute(kind, device):
    return FINE, numbers(told("CAPABILITY", "7.0"))[KINDS.index(kind.name)]


def cuDriverGetVersion():
    major, minor = numbers(told("CUDA", "12.4"))
    return FINE, 1000 * major + 10 * minor


def cuDevicePrimaryCtxRetain(device):
    return FINE, object()


def cuMemGetInfo():
    return FINE, int(told("FREE", str(1 << 30))), 1 << 34


def cuMemAlloc(size):
    made = ctypes.create_string_buffer(size)
    memory[ctypes.addressof(made)] = made
    return FINE, ctypes.addressof(made)


def cuMemFree(address):
    del memory[address]
    return (FINE,)


def cuMemsetD8(address, value, size):
    ctypes.memset(address, value, size)
    return (FINE,)


def cuMemcpyHtoD(address, source, size):
    ctypes.memmove(address, source, size)
    return (FINE,)


def cuMemcpyDtoH(target, address, size):
    ctypes.memmove(target, address, size)
    return (FINE,)


def cuModuleLoadDataEx(ptx, count, options, values):
    assert isinstance(values[0], bytes)  # as the real binding requires
    if b"no.such" in ptx:
        text = b"ptxas: Unknown modifier '.such'\0"
        ctypes.memmove(values[0], text, len(text))
        return BAD_PTX, None
    return FINE, ("ptx", re.findall(rb"\.entry (\w+)\(", ptx))


def cuModuleLoadData(address):
    return FINE, ("cubin", [b"fill"])


def cuModuleGetFunction(module, symbol):
    return (FINE, symbol) if symbol in module[1] else (NOT_FOUND, None)


def cuFuncSetAttribute(kernel, attribute, value):
    return (FINE,)


def cuLaunchKernel(kernel, gx, gy, gz, bx, by, bz, shared, stream, arguments, extra):
    places = ctypes.cast(arguments, ctypes.POINTER(ctypes.c_void_p))
    address = ctypes.cast(places[0], ctypes.POINTER(ctypes.c_uint64))[0]
    count = ctypes.cast(places[1], ctypes.POINTER(ctypes.c_uint32))[0]
    if kernel == b"fill":
        numbers_there = ctypes.cast(address, ctypes.POINTER(ctypes.c_uint32))
        for index in range(min(count, bx)):
            numbers_there[index] = index
    else:
        state["pending"].append(kernel)
    return (FINE,)


def cuCtxSynchronize():
    while b"spin" in state["pending"]:
        time.sleep(1)
    return (ASTRAY if b"astray" in state["pending"] else FINE,)


def cuEventElapsedTime(begin, end):
    return FINE, 0.02


def fine(*_):
    return (FINE,)


def something(*_):
    return FINE, object()


cuCtxSetCurrent = cuStreamBeginCapture = cuEventRecord = cuEventSynchronize = cuGraphLaunch = fine
cuGraphExecDestroy = cuGraphDestroy = cuEventDestroy = cuStreamDestroy = fine
cuStreamCreate = cuStreamEndCapture = cuGraphInstantiate = cuEventCreate = something
