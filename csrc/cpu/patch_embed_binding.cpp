#include <pybind11/stl.h>

#include <tuple>

#include "../binding.h"
#include "patch_embed_args.h"

namespace vf {

// Of int64 lists: what one is called, where it lies, how long it is, and what all of it has to be less than.
using Indices = std::vector<std::tuple<std::string, Address, int64_t, int64_t>>;

static void check_indices(const Indices& lists) {
  for (const auto& [name, address, count, limit] : lists) {
    const int64_t* list = pointer<int64_t>(address);
    for (int64_t i = 0; i < count; ++i)
      if (list[i] < 0 || list[i] >= limit)
        throw py::index_error("patch_embed: " + name + " holds " + std::to_string(list[i]) +
                              ", expected 0 <= index < " + std::to_string(limit) + ".");
  }
}

static void patch_embed(Address pixels, const std::string& dtype, const std::array<int64_t, 4>& strides, int64_t P,
                        int64_t C, Address weight, const std::string& w_dtype, Address bias,
                        const std::string& bias_dtype, int64_t D, Address patch_source, int64_t gh, int64_t gw,
                        Address patch_rows, Address pos_index, Address pos_weight, Address position,
                        const std::string& pos_dtype, Address cls_token, const std::string& cls_dtype, Address cls_rows,
                        Address modality, const std::string& modality_dtype, Address modality_rows,
                        Address sample_of_patch, Address out, int64_t n, int64_t B, const std::string& compute,
                        int num_threads, const Indices& indices) {
  PatchEmbedArgs a{};
  a.pixels = param(pixels, dtype, "dtype");
  for (int i = 0; i < 4; ++i) a.stride[i] = strides[i];
  a.P = P, a.C = C, a.D = D, a.gh = gh, a.gw = gw, a.n = n, a.B = B;
  a.weight = param(weight, w_dtype, "w_dtype", true), a.bias = param(bias, bias_dtype, "bias_dtype");
  a.patch_source = pointer<int64_t>(patch_source), a.patch_rows = pointer<int64_t>(patch_rows);
  a.pos_index = pointer<int64_t>(pos_index), a.pos_weight = pointer<float>(pos_weight);
  a.position = param(position, pos_dtype, "pos_dtype"), a.cls_token = param(cls_token, cls_dtype, "cls_dtype");
  a.cls_rows = pointer<int64_t>(cls_rows);
  a.modality = param(modality, modality_dtype, "modality_dtype"), a.modality_rows = pointer<int64_t>(modality_rows);
  a.sample_of_patch = pointer<int64_t>(sample_of_patch), a.out = pointer<float>(out);
  a.compute = compute_of(compute), a.threads = threads_of(num_threads);
  require(P >= 1 && C >= 1 && D >= 1 && n >= 0 && B >= 0, "patch_embed: a size is out of range");
  require(n == 0 || (gh >= 1 && gw >= 1), "patch_embed needs a patch grid");
  check_indices(indices);
  check_weight(a.compute, a.weight.dtype, C * P * P);
  call(kernels().patch_embed, a);
}

void bind_patch_embed(py::module_& m) {
  using py::arg;
  m.def(
      "patch_embed", &patch_embed, arg("pixels"), arg("dtype"), arg("strides"), arg("P"), arg("C"), arg("weight"),
      arg("w_dtype"), arg("bias"), arg("bias_dtype"), arg("D"), arg("patch_source"), arg("gh"), arg("gw"),
      arg("patch_rows"), arg("pos_index"), arg("pos_weight"), arg("position"), arg("pos_dtype"), arg("cls_token"),
      arg("cls_dtype"), arg("cls_rows"), arg("modality"), arg("modality_dtype"), arg("modality_rows"),
      arg("sample_of_patch"), arg("out"), arg("n"), arg("B"), arg("compute"), arg("num_threads"), arg("indices"),
      "Writes n patch rows and B image [CLS] rows into out f32 [N, D]; other rows are not touched.\n"
      "pixels [B, C, H, W] with any 4 element strides; weight [D, C*P*P]; patch_source int64 [n] = b*(gh*gw) + y*gw + x; patch_rows int64 [n] and\n"
      "cls_rows int64 [B]: rows of out; pos_index int64 [n, 4] and pos_weight f32 [n, 4]: rows of position [G*G+1, D] (row 0 is [CLS]) and their\n"
      "weights; modality: table [*, D] with modality_rows int64 [B], or 0; sample_of_patch int64 [n]: index into modality_rows.\n"
      "indices: (name, address, length, limit) of int64 lists that are to lie in [0, limit), which is an IndexError else.");
}

}  // namespace vf
