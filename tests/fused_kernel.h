// Parsed once for all kernels that the tests compile. The second half is what FlexAttention's
// kernels for the CPU include besides: parsing it anew takes a third of a kernel's time.
#include <torch/csrc/inductor/cpp_prefix.h>

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/native/cpu/utils.h>
#include <Python.h>
#include <c10/util/Unroll.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
