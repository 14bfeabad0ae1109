// SPDX-License-Identifier: Apache-2.0
// All tables of one ISA unit.
#pragma once

#include "linear_unit.inl"
#include "peak.inl"
#include "routed.inl"
#include "search.inl"
#include "select.inl"
#include "unit.h"
#include "window_unit.inl"

namespace attnext {
namespace cpu {
namespace ATTNEXT_ISA {

inline const IsaUnit* unit() {
  static constexpr IsaUnit table = {
      {WindowEntry<float>::table(), WindowEntry<double>::table(), WindowEntry<bf16>::table(),
       WindowEntry<fp16>::table()},
      {LinearEntry<float>::table(), LinearEntry<double>::table(), LinearEntry<bf16>::table(),
       LinearEntry<fp16>::table()},
      {RoutedEntry<float>::table(), RoutedEntry<double>::table(), RoutedEntry<bf16>::table(),
       RoutedEntry<fp16>::table()},
      {SearchEntry<float>::table(), SearchEntry<double>::table(), SearchEntry<bf16>::table(),
       SearchEntry<fp16>::table()},
      {SelectEntry<float>::table(), SelectEntry<double>::table(), SelectEntry<bf16>::table(),
       SelectEntry<fp16>::table()},
      {peak_loop<float>, peak_loop<double>, peak_loop<ElemOf<bf16>::type>, peak_loop<float>}};
  return &table;
}

}  // namespace ATTNEXT_ISA
}  // namespace cpu
}  // namespace attnext
