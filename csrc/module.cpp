// The Python module `_C`: the build's facts, the instruction-set level, the ops' direct entries.
// The operators reach torch through csrc/bind/, which registers them when this module is loaded.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "bind/entries.h"
#include "cpu/isa.h"

namespace cpu = tilewright::cpu;

static pybind11::list levels() {
  pybind11::list names;
  for (int i = 0; i <= cpu::level_detected(); ++i) names.append(cpu::level_name(i));
  return names;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "tilewright's CPU kernels: build facts and instruction-set level";
  m.attr("compiler") = __VERSION__;
  m.def("isa", [] { return std::string(cpu::level_name(cpu::level())); },
        "The instruction-set level in use.");
  m.def("isas", &levels, "The levels this machine can run, lowest first.");
  m.def(
      "set_isa",
      [](const std::string& name) {
        if (!cpu::set_level(name.c_str()))
          throw std::invalid_argument("TILEWRIGHT_CPU_ISA: '" + name +
                                      "' is not a level this machine has: " +
                                      std::string(pybind11::str(levels())));
      },
      "Run the CPU kernels at this level from now on; ValueError where the CPU lacks it.");
  for (const tilewright::BindEntry bind : tilewright::entries()) bind(m);
}
