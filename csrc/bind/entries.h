// What the ops' files add to the Python module, so that an op is told in no other op's file.
#pragma once
#include <pybind11/pybind11.h>

#include <vector>

namespace tilewright {

using BindEntry = void (*)(pybind11::module_&);

inline std::vector<BindEntry>& entries() {
  static std::vector<BindEntry> all;
  return all;
}

// `static const Entry entry(bind);` in an op's file has csrc/module.cpp call bind(module).
struct Entry {
  explicit Entry(BindEntry bind) { entries().push_back(bind); }
};

}  // namespace tilewright
