#include <pybind11/stl.h>

#include <iterator>

#include "../binding.h"
#include "encoder_args.h"

namespace vf {

// In the order of `params`, each a weight and a bias.
constexpr Affine Layer::* kParts[] = {&Layer::norm1, &Layer::query, &Layer::key, &Layer::value,
                                      &Layer::out,   &Layer::norm2, &Layer::fc1, &Layer::fc2};
static_assert(sizeof(Layer) == std::size(kParts) * sizeof(Affine), "every part of a layer is listed");

static void encoder(Address x, Address out, Address hidden, int64_t N, int64_t D, int layers,
                    const std::vector<Address>& params, const std::vector<std::string>& param_dtypes, int64_t n_inner,
                    int H, const std::vector<float>& eps, Address cu_seqlens, Address seqused_k, int B, Address wanted,
                    Address cu_wanted, const std::string& compute, int num_threads) {
  EncoderArgs a{};
  a.x = pointer<float>(x), a.out = pointer<float>(out), a.hidden = pointer<float>(hidden);
  a.N = N, a.D = D, a.inner = n_inner, a.layers = layers, a.H = H, a.B = B;
  a.cu_seqlens = pointer<int32_t>(cu_seqlens), a.seqused_k = pointer<int32_t>(seqused_k);
  a.wanted = pointer<int64_t>(wanted), a.cu_wanted = pointer<int32_t>(cu_wanted);
  a.compute = compute_of(compute), a.threads = threads_of(num_threads);
  require(N >= 0 && D >= 1 && n_inner >= 1 && layers >= 0 && H >= 1 && B >= 0, "encoder: a size is out of range");
  require(D % H == 0 && D / H <= 256, "encoder needs D divisible by H and a head dimension of at most 256");
  const size_t count = 2 * std::size(kParts) * static_cast<size_t>(layers);
  require(params.size() == count && param_dtypes.size() == count, "encoder needs 16 params and param_dtypes per layer");
  require(eps.size() == 2 * static_cast<size_t>(layers), "encoder needs 2 eps per layer");
  check_offsets(a.cu_seqlens, B, "cu_seqlens must start at 0 and not decrease");
  require(a.cu_seqlens[B] == N, "cu_seqlens must end at N");
  for (int b = 0; a.seqused_k && b < B; ++b)
    require(a.seqused_k[b] >= 0 && a.seqused_k[b] <= a.cu_seqlens[b + 1] - a.cu_seqlens[b],
            "seqused_k must lie between 0 and the sample's rows");
  if (a.wanted || a.cu_wanted) {
    require(a.wanted && a.cu_wanted && !a.hidden && layers >= 1,
            "encoder takes wanted and cu_wanted together, with a layer and without hidden");
    check_offsets(a.cu_wanted, B, "cu_wanted must start at 0 and not decrease");
    for (int b = 0; b < B; ++b)
      for (int i = a.cu_wanted[b]; i < a.cu_wanted[b + 1]; ++i)
        require(a.wanted[i] >= a.cu_seqlens[b] && a.wanted[i] < a.cu_seqlens[b + 1],
                "a wanted row must be one of its sample");
  }
  std::vector<Layer> list(static_cast<size_t>(layers));
  size_t at = 0;
  for (Layer& layer : list)
    for (Affine Layer::* const part : kParts) {
      const bool matrix = part != &Layer::norm1 && part != &Layer::norm2;
      Affine& p = layer.*part;
      p.weight = param(params[at], param_dtypes[at], "param_dtypes", matrix);
      p.bias = param(params[at + 1], param_dtypes[at + 1], "param_dtypes");
      at += 2;
      if (!matrix) continue;
      require(p.weight.data != nullptr, "encoder: a weight matrix is missing");
      check_weight(a.compute, p.weight.dtype, part == &Layer::fc2 ? n_inner : D);
    }
  a.layer = list.data(), a.eps = eps.data();
  call(kernels().encoder, a);
}

void bind_encoder(py::module_& m) {
  using py::arg;
  m.def(
      "encoder", &encoder, arg("x"), arg("out"), arg("hidden"), arg("N"), arg("D"), arg("layers"), arg("params"),
      arg("param_dtypes"), arg("n_inner"), arg("H"), arg("eps"), arg("cu_seqlens"), arg("seqused_k"), arg("B"),
      arg("wanted"), arg("cu_wanted"), arg("compute"), arg("num_threads"),
      "The stack of pre-norm blocks on packed rows: x f32 [N, D] (read only) -> out f32 [N, D], the residual stream after the last layer (no final\n"
      "norm); hidden 0 or f32 [layers, N, D], the stream after each layer. params and param_dtypes: 16 per layer, ln1.w ln1.b q.w q.b k.w k.b v.w\n"
      "v.b o.w o.b ln2.w ln2.b fc1.w fc1.b fc2.w fc2.b (a missing bias is 0); eps: 2 per layer. cu_seqlens int32 [B+1]; seqused_k int32 [B] or 0.\n"
      "wanted int64 [W] and cu_wanted int32 [B+1], or 0: the rows of each sample that are wanted of the last layer; out is [W, D] then, hidden 0.\n"
      "compute 'int8': the six matrices are q8 blobs. Residual and norms are f32 throughout.");
}

}  // namespace vf
