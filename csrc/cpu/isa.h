// SPDX-License-Identifier: Apache-2.0
// Which instruction set the kernels use: the best the CPU and the operating system offer, or the
// one that ATTNEXT_ISA or set_isa() names.
#pragma once

#include <string>
#include <vector>

#include "linear.h"
#include "routed.h"
#include "search.h"
#include "select.h"
#include "window.h"

namespace attnext {
namespace cpu {

std::vector<std::string> available_isas();  // ascending
std::string active_isa();
void set_isa(const std::string& name);  // throws std::invalid_argument

const WindowKernels& window_kernels(DType dtype);
const LinearKernels& linear_kernels(DType dtype);
const RoutedKernels& routed_kernels(DType dtype);
const SearchKernels& search_kernels(DType dtype);
const SelectKernels& select_kernels(DType dtype);

// Multiply-adds per second over all threads, times two: the machine's measured peak.
double fma_peak(const std::string& isa, DType dtype, double seconds);

}  // namespace cpu
}  // namespace attnext
