// Python bindings: pointers arrive as integers, so the module needs no torch headers and one build serves every torch.
// Arguments are checked here, once; the kernels trust them. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#ifdef VF_CUDA
#include "cuda/kernels.h"
#endif

namespace py = pybind11;
using Address = uintptr_t;

namespace {

[[noreturn]] void fail(const std::string& message) { throw py::value_error(message); }

int dtype_of(const std::string& name, const char* argument, bool allow_q8 = false) {
  if (name == "f32") return vf::F32;
  if (name == "bf16") return vf::BF16;
  if (allow_q8 && name == "q8") return vf::Q8;
  fail(std::string(argument) + " is \"" + name + "\"; expected \"f32\"" + (allow_q8 ? ", \"bf16\" or \"q8\"" : " or \"bf16\""));
}

int compute_of(const std::string& name) {
  if (name == "f32") return vf::F32;
  if (name == "bf16") return vf::BF16;
  if (name == "int8") return vf::Q8;
  fail("compute is \"" + name + "\"; expected \"f32\", \"bf16\" or \"int8\"");
}

vf::Param param(Address data, const std::string& dtype, const char* argument, bool allow_q8 = false) {
  return {reinterpret_cast<const void*>(data), dtype_of(dtype, argument, allow_q8)};
}

template <class T>
T* pointer(Address a) { return reinterpret_cast<T*>(a); }

void require(bool ok, const char* message) {
  if (!ok) fail(message);
}

void check_weight(int compute, int dtype, int64_t K) {
  require((compute == vf::Q8) == (dtype == vf::Q8), "int8 compute needs q8 weights (quantize_linear), and q8 weights need int8 compute");
  require(compute != vf::Q8 || K <= 65536, "int8 compute supports K <= 65536 (int32 accumulation)");
}

int threads_of(int n) {
  require(n >= 1 && n <= 1024, "num_threads must be between 1 and 1024");
  return n;
}

void check_offsets(const int32_t* cu, int B, const char* message) {
  bool ok = cu != nullptr && cu[0] == 0;
  for (int b = 0; ok && b < B; ++b) ok = cu[b + 1] >= cu[b];
  require(ok, message);
}

const vf::Kernels& kernels() {
  const vf::Kernels* k = vf::active_kernels();
  if (!k) {
    std::string names;
    for (int i = 0; i < vf::isa_count(); ++i) names += std::string(i ? ", " : "") + vf::isa_table(i)->isa;
    fail("VILT_FAST_CPU_ISA names an instruction set this machine or build does not have; available: " + names);
  }
  return *k;
}

py::dict cpu_features() {
  py::dict result;
  int count;
  const vf::Feature* features = vf::cpu_features(&count);
  for (int i = 0; i < count; ++i) result[features[i].name] = features[i].present;
  py::list isas;
  for (int i = 0; i < vf::isa_count(); ++i) isas.append(vf::isa_table(i)->isa);
  result["isa"] = kernels().isa;
  result["isas"] = isas;
  return result;
}

void set_isa(const std::optional<std::string>& name) {
  if (!vf::select_isa(name ? name->c_str() : nullptr))
    fail("instruction set \"" + *name + "\" is not available; see cpu_features()[\"isas\"]");
}

void linear(Address x, const std::string& x_dtype, Address w, const std::string& w_dtype, Address bias, const std::string& bias_dtype,
            Address out, const std::string& out_dtype, int64_t M, int64_t N, int64_t K, int64_t ldx, int64_t ldo, bool gelu,
            const std::string& compute, int num_threads) {
  vf::LinearArgs a{param(x, x_dtype, "x_dtype"), param(w, w_dtype, "w_dtype", true), param(bias, bias_dtype, "bias_dtype"),
                   pointer<void>(out), dtype_of(out_dtype, "out_dtype"), M, N, K, ldx, ldo, gelu, compute_of(compute),
                   threads_of(num_threads)};
  require(M >= 0 && N >= 0 && K >= 1 && ldx >= K && ldo >= N, "linear needs M, N >= 0, K >= 1, ldx >= K and ldo >= N");
  check_weight(a.compute, a.w.dtype, K);
  const vf::Kernels& k = kernels();
  py::gil_scoped_release release;
  if (M && N) k.linear(a);
}

void quantize_linear(Address w, const std::string& w_dtype, int64_t N, int64_t K, Address blob, int num_threads) {
  vf::QuantizeArgs a{param(w, w_dtype, "w_dtype"), N, K, pointer<void>(blob), threads_of(num_threads)};
  require(N >= 1 && K >= 1 && K <= 65536, "quantize_linear needs N >= 1 and 1 <= K <= 65536");
  require(blob % 64 == 0, "blob must be 64-byte aligned");
  const vf::Kernels& k = kernels();
  py::gil_scoped_release release;
  k.quantize_linear(a);
}

void attention(Address q, Address k, Address v, Address out, const std::string& dtype, int H, int d, int B, int64_t ldq, int64_t ldk,
               int64_t ldv, int64_t ldo, Address cu_q, Address cu_k, Address seqused_k, float scale, Address lse, int num_threads) {
  vf::AttentionArgs a{};
  a.q = pointer<void>(q), a.k = pointer<void>(k), a.v = pointer<void>(v), a.out = pointer<void>(out);
  a.dtype = dtype_of(dtype, "dtype"), a.H = H, a.d = d, a.B = B;
  a.ldq = ldq, a.ldk = ldk, a.ldv = ldv, a.ldo = ldo;
  a.cu_q = pointer<int32_t>(cu_q), a.cu_k = pointer<int32_t>(cu_k), a.seqused_k = pointer<int32_t>(seqused_k);
  a.scale = scale, a.lse = pointer<float>(lse), a.threads = threads_of(num_threads);
  require(H >= 1 && d >= 1 && d <= 256 && B >= 0, "attention needs H >= 1, 1 <= d <= 256 and B >= 0");
  check_offsets(a.cu_q, B, "cu_q must start at 0 and not decrease");
  check_offsets(a.cu_k, B, "cu_k must start at 0 and not decrease");
  for (int b = 0; a.seqused_k && b < B; ++b)
    require(a.seqused_k[b] >= 0 && a.seqused_k[b] <= a.cu_k[b + 1] - a.cu_k[b], "seqused_k must lie between 0 and the sample's rows");
  const vf::Kernels& table = kernels();
  py::gil_scoped_release release;
  table.attention(a);
}

void encoder(Address x, Address out, Address hidden, int64_t N, int64_t D, int layers, const std::vector<Address>& params,
             const std::vector<std::string>& param_dtypes, int64_t n_inner, int H, const std::vector<float>& eps, Address cu_seqlens,
             Address seqused_k, int B, const std::string& compute, int num_threads) {
  vf::EncoderArgs a{};
  a.x = pointer<float>(x), a.out = pointer<float>(out), a.hidden = pointer<float>(hidden);
  a.N = N, a.D = D, a.inner = n_inner, a.layers = layers, a.H = H, a.B = B;
  a.cu_seqlens = pointer<int32_t>(cu_seqlens), a.seqused_k = pointer<int32_t>(seqused_k);
  a.compute = compute_of(compute), a.threads = threads_of(num_threads);
  require(N >= 0 && D >= 1 && n_inner >= 1 && layers >= 0 && H >= 1 && B >= 0, "encoder: a size is out of range");
  require(D % H == 0 && D / H <= 256, "encoder needs D divisible by H and a head dimension of at most 256");
  const size_t count = static_cast<size_t>(layers) * vf::kLayerParams;
  require(params.size() == count && param_dtypes.size() == count, "encoder needs 16 params and param_dtypes per layer");
  require(eps.size() == 2 * static_cast<size_t>(layers), "encoder needs 2 eps per layer");
  check_offsets(a.cu_seqlens, B, "cu_seqlens must start at 0 and not decrease");
  require(a.cu_seqlens[B] == N, "cu_seqlens must end at N");
  for (int b = 0; a.seqused_k && b < B; ++b)
    require(a.seqused_k[b] >= 0 && a.seqused_k[b] <= a.cu_seqlens[b + 1] - a.cu_seqlens[b],
            "seqused_k must lie between 0 and the sample's rows");
  std::vector<vf::Param> list(count);
  for (size_t i = 0; i < count; ++i) {
    const size_t slot = i % vf::kLayerParams;
    const bool matrix = slot % 2 == 0 && slot != 0 && slot != 10;
    list[i] = param(params[i], param_dtypes[i], "param_dtypes", matrix);
    if (!matrix) continue;
    require(list[i].data != nullptr, "encoder: a weight matrix is missing");
    check_weight(a.compute, list[i].dtype, slot == 14 ? n_inner : D);
  }
  a.params = list.data(), a.eps = eps.data();
  const vf::Kernels& k = kernels();
  py::gil_scoped_release release;
  k.encoder(a);
}

void patch_embed(Address pixels, const std::string& dtype, const std::array<int64_t, 4>& strides, int64_t P, int64_t C, Address weight,
                 const std::string& w_dtype, Address bias, const std::string& bias_dtype, int64_t D, Address patch_source, int64_t gh,
                 int64_t gw, Address patch_rows, Address pos_index, Address pos_weight, Address position, const std::string& pos_dtype,
                 Address cls_token, const std::string& cls_dtype, Address cls_rows, Address modality, const std::string& modality_dtype,
                 Address modality_rows, Address sample_of_patch, Address out, int64_t n, int64_t B, const std::string& compute,
                 int num_threads) {
  vf::PatchEmbedArgs a{};
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
  for (int64_t i = 0; i < n; ++i)
    require(a.patch_source[i] >= 0 && a.patch_source[i] < B * gh * gw, "patch_source must lie in [0, B*gh*gw)");
  check_weight(a.compute, a.weight.dtype, C * P * P);
  const vf::Kernels& k = kernels();
  py::gil_scoped_release release;
  k.patch_embed(a);
}

vf::Masks masks_of(Address text_pad, Address image_pad, int64_t B, int64_t M, int64_t N) {
  require(B >= 1 && M >= 0 && N >= 0, "needs B >= 1 and M, N >= 0");
  return {pointer<uint8_t>(text_pad), pointer<uint8_t>(image_pad), B, M, N};
}

void check_steps(double step, int64_t iterations, int64_t inner) {
  require(step > 1e-30 && step < 1e30 && iterations >= 1 && inner >= 1,
          "needs 1e-30 < beta or epsilon < 1e30, iterations >= 1 and inner >= 1");
}

void check_costs(const char* op, const std::vector<uint8_t>& broken) {
  std::string samples;
  for (size_t b = 0; b < broken.size(); ++b)
    if (broken[b]) samples += (samples.empty() ? "" : ", ") + std::to_string(b);
  if (!samples.empty())
    fail(std::string(op) + ": cost is NaN or infinite on real entries of samples [" + samples + "]; expected finite.");
}

void ipot(Address cost, Address text_pad, Address image_pad, Address plan, int64_t B, int64_t M, int64_t N, double beta, int64_t iterations,
          int64_t inner, int num_threads) {
  vf::IpotArgs a{pointer<float>(cost), pointer<float>(plan), nullptr, masks_of(text_pad, image_pad, B, M, N), beta, iterations, inner,
                 threads_of(num_threads)};
  check_steps(beta, iterations, inner);
  std::vector<uint8_t> broken(static_cast<size_t>(B));
  a.broken = broken.data();
  const vf::Kernels& k = kernels();
  {
    py::gil_scoped_release release;
    k.ipot(a);
  }
  check_costs("ipot", broken);
}

void sinkhorn(Address cost, Address text_pad, Address image_pad, Address text_marginal, Address image_marginal, Address plan, Address value,
              Address error, Address used, int64_t B, int64_t M, int64_t N, double epsilon, double tolerance, int64_t iterations,
              int num_threads) {
  vf::SinkhornArgs a{};
  a.cost = pointer<float>(cost), a.text_marginal = pointer<float>(text_marginal), a.image_marginal = pointer<float>(image_marginal);
  a.plan = pointer<float>(plan), a.value = pointer<float>(value), a.error = pointer<float>(error), a.used = pointer<int64_t>(used);
  a.masks = masks_of(text_pad, image_pad, B, M, N);
  a.epsilon = epsilon, a.tolerance = tolerance, a.iterations = iterations, a.threads = threads_of(num_threads);
  check_steps(epsilon, iterations, 1);
  std::vector<uint8_t> broken(static_cast<size_t>(B));
  a.broken = broken.data();
  const vf::Kernels& k = kernels();
  {
    py::gil_scoped_release release;
    k.sinkhorn(a);
  }
  check_costs("sinkhorn", broken);
}

// text and image are (address, stride of samples, stride of rows), both of dtype.
using Strided = std::array<int64_t, 3>;

vf::WordPatch word_patch(const Strided& text, const Strided& image, const std::string& dtype, Address text_pad, Address image_pad, int64_t B,
                         int64_t M, int64_t N, int64_t D, int num_threads) {
  require(D >= 1, "needs D >= 1");
  const vf::Rows3 rows[2] = {{param(static_cast<Address>(text[0]), dtype, "dtype"), text[1], text[2]},
                             {param(static_cast<Address>(image[0]), dtype, "dtype"), image[1], image[2]}};
  return {rows[0], rows[1], masks_of(text_pad, image_pad, B, M, N), D, threads_of(num_threads)};
}

void word_patch_distance(const Strided& text, const Strided& image, const std::string& dtype, Address text_pad, Address image_pad,
                         Address distance, Address plan, int64_t B, int64_t M, int64_t N, int64_t D, double beta, int64_t iterations,
                         int64_t inner, int num_threads) {
  const vf::WordPatchArgs a{word_patch(text, image, dtype, text_pad, image_pad, B, M, N, D, num_threads), pointer<float>(distance),
                            pointer<float>(plan), beta, iterations, inner};
  check_steps(beta, iterations, inner);
  const vf::Kernels& k = kernels();
  py::gil_scoped_release release;
  k.word_patch_distance(a);
}

void word_patch_gradient(const Strided& text, const Strided& image, const std::string& dtype, Address text_pad, Address image_pad,
                         Address grad, Address plan, Address text_grad, Address image_grad, int64_t B, int64_t M, int64_t N, int64_t D,
                         int num_threads) {
  const vf::WordPatchGradientArgs a{word_patch(text, image, dtype, text_pad, image_pad, B, M, N, D, num_threads), pointer<float>(grad),
                                    pointer<float>(plan), param(text_grad, dtype, "dtype"), param(image_grad, dtype, "dtype")};
  const vf::Kernels& k = kernels();
  py::gil_scoped_release release;
  k.word_patch_gradient(a);
}

#ifdef VF_CUDA
// Device addresses and a stream come as integers; what they hold is never looked at here.
void cuda_check(int error) {
  if (error) throw std::runtime_error(vf::cuda_message(error));
}

int cuda_devices() {
  int count = 0;
  cuda_check(vf::cuda_devices(&count));
  return count;
}

vf::CudaPairs cuda_pairs(Address text_pad, Address image_pad, int64_t B, int M, int N) {
  require(B >= 0 && B < (int64_t(1) << 31) && M >= 1 && N >= 1 && int64_t(M) * N < (int64_t(1) << 31), "B, M or N is out of range");
  return {pointer<const uint8_t>(text_pad), pointer<const uint8_t>(image_pad), B, M, N};
}

void check_iterations(double unit, int iterations, int inner) {
  require(unit > 0 && iterations >= 1 && inner >= 1, "beta or epsilon must be > 0, iterations and inner >= 1");
}

void cuda_ipot(Address text_pad, Address image_pad, int64_t B, int M, int N, Address cost, Address plan, double beta, int iterations, int inner,
               Address stream) {
  check_iterations(beta, iterations, inner);
  cuda_check(vf::cuda_ipot(cuda_pairs(text_pad, image_pad, B, M, N), pointer<const float>(cost), pointer<float>(plan), beta, iterations, inner,
                           pointer<void>(stream)));
}

void cuda_sinkhorn(Address text_pad, Address image_pad, int64_t B, int M, int N, Address cost, Address text_weight, Address image_weight, Address plan,
                   Address value, Address used, Address error, double epsilon, int iterations, double tolerance, Address stream) {
  check_iterations(epsilon, iterations, 1);
  cuda_check(vf::cuda_sinkhorn(cuda_pairs(text_pad, image_pad, B, M, N), pointer<const float>(cost), pointer<const float>(text_weight),
                               pointer<const float>(image_weight), pointer<float>(plan), pointer<float>(value), pointer<int64_t>(used),
                               pointer<float>(error), epsilon, iterations, tolerance, pointer<void>(stream)));
}

void cuda_word_patch_distance(Address text_pad, Address image_pad, int64_t B, int M, int N, Address text, Address image, const std::string& dtype, int D,
                              Address distance, Address plan, Address scratch, double beta, int iterations, int inner, Address stream) {
  check_iterations(beta, iterations, inner);
  require(dtype == "f32" || dtype == "f16" || dtype == "bf16", "dtype must be \"f32\", \"f16\" or \"bf16\"");
  require(D >= 1 && D % (dtype == "f32" ? 4 : 8) == 0, "rows of D entries must be multiples of 16 bytes");
  const int code = dtype == "f32" ? vf::CUDA_F32 : dtype == "f16" ? vf::CUDA_F16 : vf::CUDA_BF16;
  cuda_check(vf::cuda_word_patch_distance(cuda_pairs(text_pad, image_pad, B, M, N), pointer<const void>(text), pointer<const void>(image), code, D,
                                          pointer<float>(distance), pointer<float>(plan), pointer<float>(scratch), beta, iterations, inner,
                                          pointer<void>(stream)));
}

bool cuda_word_patch_scratch(int M, int N) {
  int needed = 0;
  cuda_check(vf::cuda_word_patch_scratch(M, N, &needed));
  return needed != 0;
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  using py::arg;
  m.doc() =
      "CPU kernels of vilt_fast. Pointers are integers (tensor.data_ptr(), 0 = absent), sizes and strides count elements, stored types\n"
      "are \"f32\", \"bf16\" or \"q8\" (a blob from quantize_linear), compute types \"f32\", \"bf16\" or \"int8\". Matrices are row-major with\n"
      "contiguous rows. bf16 compute accepts f32 weights (rounded while packing) and f32 compute accepts bf16 weights. All arrays of\n"
      "int32/int64 indices are host memory. Every call blocks until done and releases the GIL.";

  m.def("cpu_features", &cpu_features,
        "-> {avx2, fma, f16c, avx512f, ...: bool, 'isa': the level in use, 'isas': levels available, slowest first}.");
  m.def("set_isa", &set_isa, arg("name"),
        "Use one of cpu_features()['isas'] from now on; None: VILT_FAST_CPU_ISA (read at every call), else the fastest. ValueError if unavailable.");

  m.def("linear", &linear, arg("x"), arg("x_dtype"), arg("w"), arg("w_dtype"), arg("bias"), arg("bias_dtype"), arg("out"), arg("out_dtype"),
        arg("M"), arg("N"), arg("K"), arg("ldx"), arg("ldo"), arg("gelu"), arg("compute"), arg("num_threads"),
        "out[M, N] = act(x[M, K] w[N, K]^T + bias[N]); act is exact (erf) GELU if gelu. Row strides ldx, ldo; w is contiguous; bias may be 0.\n"
        "compute 'int8' takes w_dtype 'q8' and quantises x per row; x and out may be f32 or bf16 with any compute.");

  m.def("quantized_bytes", &vf::quantized_bytes, arg("N"), arg("K"), "Size of the blob that quantize_linear writes for w[N, K].");
  m.def("quantize_linear", &quantize_linear, arg("w"), arg("w_dtype"), arg("N"), arg("K"), arg("blob"), arg("num_threads"),
        "Quantise w[N, K] per output row (symmetric int8) into blob: quantized_bytes(N, K) bytes, 64-byte aligned. The blob is the same at every\n"
        "instruction-set level.");

  m.def("attention", &attention, arg("q"), arg("k"), arg("v"), arg("out"), arg("dtype"), arg("H"), arg("d"), arg("B"), arg("ldq"), arg("ldk"),
        arg("ldv"), arg("ldo"), arg("cu_q"), arg("cu_k"), arg("seqused_k"), arg("scale"), arg("lse"), arg("num_threads"),
        "out = softmax(scale q k^T) v per sample and head. q, out [rows_q, H, d], k, v [rows_k, H, d]: d contiguous, heads d apart, row strides ld*.\n"
        "cu_q, cu_k int32 [B+1] row offsets; seqused_k int32 [B] or 0: how many leading rows of each sample are keys. lse f32 [H, rows_q] or 0:\n"
        "log sum exp of the scaled scores. A sample without keys gives zeros and lse -inf. d <= 256. bf16: f32 softmax, bf16 products.");

  m.def("encoder", &encoder, arg("x"), arg("out"), arg("hidden"), arg("N"), arg("D"), arg("layers"), arg("params"), arg("param_dtypes"),
        arg("n_inner"), arg("H"), arg("eps"), arg("cu_seqlens"), arg("seqused_k"), arg("B"), arg("compute"), arg("num_threads"),
        "The stack of pre-norm blocks on packed rows: x f32 [N, D] (read only) -> out f32 [N, D], the residual stream after the last layer (no final\n"
        "norm); hidden 0 or f32 [layers, N, D], the stream after each layer. params and param_dtypes: 16 per layer, ln1.w ln1.b q.w q.b k.w k.b v.w\n"
        "v.b o.w o.b ln2.w ln2.b fc1.w fc1.b fc2.w fc2.b (a missing bias is 0); eps: 2 per layer. cu_seqlens int32 [B+1]; seqused_k int32 [B] or 0.\n"
        "compute 'int8': the six matrices are q8 blobs. Residual and norms are f32 throughout.");

  m.def("patch_embed", &patch_embed, arg("pixels"), arg("dtype"), arg("strides"), arg("P"), arg("C"), arg("weight"), arg("w_dtype"), arg("bias"),
        arg("bias_dtype"), arg("D"), arg("patch_source"), arg("gh"), arg("gw"), arg("patch_rows"), arg("pos_index"), arg("pos_weight"),
        arg("position"), arg("pos_dtype"), arg("cls_token"), arg("cls_dtype"), arg("cls_rows"), arg("modality"), arg("modality_dtype"),
        arg("modality_rows"), arg("sample_of_patch"), arg("out"), arg("n"), arg("B"), arg("compute"), arg("num_threads"),
        "Writes n patch rows and B image [CLS] rows into out f32 [N, D]; other rows are not touched.\n"
        "pixels [B, C, H, W] with any 4 element strides; weight [D, C*P*P]; patch_source int64 [n] = b*(gh*gw) + y*gw + x; patch_rows int64 [n] and\n"
        "cls_rows int64 [B]: rows of out; pos_index int64 [n, 4] and pos_weight f32 [n, 4]: rows of position [G*G+1, D] (row 0 is [CLS]) and their\n"
        "weights; modality: table [*, D] with modality_rows int64 [B], or 0; sample_of_patch int64 [n]: index into modality_rows.");

  // Transport: masks are uint8 [B, M] and [B, N], 1 where padded; everything is dense unless strides are given.
  m.def("ipot", &ipot, arg("cost"), arg("text_pad"), arg("image_pad"), arg("plan"), arg("B"), arg("M"), arg("N"), arg("beta"),
        arg("iterations"), arg("inner"), arg("num_threads"), "cost f32 [B, M, N] -> plan f32 [B, M, N], 0 on padding.");
  m.def("sinkhorn", &sinkhorn, arg("cost"), arg("text_pad"), arg("image_pad"), arg("text_marginal"), arg("image_marginal"), arg("plan"),
        arg("value"), arg("error"), arg("used"), arg("B"), arg("M"), arg("N"), arg("epsilon"), arg("tolerance"), arg("iterations"),
        arg("num_threads"),
        "cost f32 [B, M, N] -> plan f32 [B, M, N], value and error f32 [B], used int64 [B]. Marginals f32 [B, M] and [B, N], any scale, or 0:\n"
        "uniform. tolerance < 0: none.");
  m.def("word_patch_distance", &word_patch_distance, arg("text"), arg("image"), arg("dtype"), arg("text_pad"), arg("image_pad"),
        arg("distance"), arg("plan"), arg("B"), arg("M"), arg("N"), arg("D"), arg("beta"), arg("iterations"), arg("inner"), arg("num_threads"),
        "text [B, M, D] and image [B, N, D] as (address, stride of samples, stride of rows) -> distance f32 [B], plan f32 [B, M, N] or 0.");
  m.def("word_patch_gradient", &word_patch_gradient, arg("text"), arg("image"), arg("dtype"), arg("text_pad"), arg("image_pad"), arg("grad"),
        arg("plan"), arg("text_grad"), arg("image_grad"), arg("B"), arg("M"), arg("N"), arg("D"), arg("num_threads"),
        "grad f32 [B] and the plan of word_patch_distance -> gradients [B, M, D] and [B, N, D] of dtype, either address 0: not wanted.");

#ifdef VF_CUDA
  // On the current device and the given stream, without waiting. RuntimeError with what to do when CUDA refuses. Pairs: pads are uint8, device.
  m.attr("cuda_archs") = VF_CUDA_ARCHS;
  m.def("cuda_devices", &cuda_devices, "-> number of visible GPUs; RuntimeError without a driver.");
  m.def("cuda_ipot", &cuda_ipot, arg("text_pad"), arg("image_pad"), arg("B"), arg("M"), arg("N"), arg("cost"), arg("plan"), arg("beta"),
        arg("iterations"), arg("inner"), arg("stream"), "plan f32 [B, M, N] from cost f32 [B, M, N], both dense.");
  m.def("cuda_sinkhorn", &cuda_sinkhorn, arg("text_pad"), arg("image_pad"), arg("B"), arg("M"), arg("N"), arg("cost"), arg("text_weight"),
        arg("image_weight"), arg("plan"), arg("value"), arg("used"), arg("error"), arg("epsilon"), arg("iterations"), arg("tolerance"), arg("stream"),
        "weights f32 [B, M], [B, N] or 0; tolerance < 0: none; plan f32 [B, M, N], value and error f32 [B], used int64 [B].");
  m.def("cuda_word_patch_distance", &cuda_word_patch_distance, arg("text_pad"), arg("image_pad"), arg("B"), arg("M"), arg("N"), arg("text"),
        arg("image"), arg("dtype"), arg("D"), arg("distance"), arg("plan"), arg("scratch"), arg("beta"), arg("iterations"), arg("inner"),
        arg("stream"), "distance f32 [B] from text [B, M, D], image [B, N, D], dense; plan f32 [B, M, N] or 0; scratch f32 [B, M, N] if needed, else 0.");
  m.def("cuda_word_patch_scratch", &cuda_word_patch_scratch, arg("M"), arg("N"), "Do M x N costs not fit into shared memory of the current device?");
#else
  m.attr("cuda_archs") = py::none();
#endif
}
