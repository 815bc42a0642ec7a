// The Python module: every op's binding, and what the machine can run.
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>

#include "binding.h"
#ifdef VF_CUDA
#include "cuda/device.h"
#endif

namespace vf {

int bind_unchanged(PyObject*);
#define VF_OP(name, Args) void bind_##name(py::module_&);
#include "cpu/ops.def"
#ifdef VF_CUDA
#define VF_OP(name) void bind_cuda_##name(py::module_&);
#include "cuda/ops.def"
#endif

static py::dict features_of_cpu() {
  py::dict result;
  int count;
  const Feature* features = cpu_features(&count);
  for (int i = 0; i < count; ++i) result[features[i].name] = features[i].present;
  py::list isas;
  for (int i = 0; i < isa_count(); ++i) isas.append(isa_table(i)->isa);
  result["isa"] = kernels().isa;
  result["isas"] = isas;
  return result;
}

static void set_isa(const std::optional<std::string>& name) {
  if (!select_isa(name ? name->c_str() : nullptr))
    fail("instruction set \"" + *name + "\" is not available; see cpu_features()[\"isas\"]");
}

static void bind_machine(py::module_& m) {
  using py::arg;
  m.def("cpu_features", &features_of_cpu,
        "-> {avx2, fma, f16c, avx512f, ...: bool, 'isa': the level in use, 'isas': levels available, slowest first}.");
  m.def(
      "set_isa", &set_isa, arg("name"),
      "Use one of cpu_features()['isas'] from now on; None: VILT_FAST_CPU_ISA (read at every call), else the fastest. ValueError if unavailable.");

#ifdef VF_CUDA
  m.attr("cuda_archs") = VF_CUDA_ARCHS;
  m.def(
      "cuda_devices",
      [] {
        int count = 0;
        if (const int error = cuda_devices(&count)) throw std::runtime_error(cuda_message(error));
        return count;
      },
      "-> number of visible GPUs; RuntimeError without a driver.");
#else
  m.attr("cuda_archs") = py::none();
#endif
}

}  // namespace vf

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "CPU kernels of vilt_fast. Pointers are integers (tensor.data_ptr(), 0 = absent), sizes and strides count elements, stored types\n"
      "are \"f32\", \"bf16\" or \"q8\" (a blob from quantize_linear), compute types \"f32\", \"bf16\" or \"int8\". Matrices are row-major with\n"
      "contiguous rows. bf16 compute accepts f32 weights (rounded while packing) and f32 compute accepts bf16 weights. All arrays of\n"
      "int32/int64 indices are host memory. Every call blocks until done and releases the GIL.";
  m.attr("interface") = 3;  // raised, with _native.INTERFACE, where a binding takes other arguments
  vf::bind_machine(m);
  if (vf::bind_unchanged(m.ptr())) throw pybind11::error_already_set();
#define VF_OP(name, Args) vf::bind_##name(m);
#include "cpu/ops.def"
#ifdef VF_CUDA
#define VF_OP(name) vf::bind_cuda_##name(m);
#include "cuda/ops.def"
#endif
}
