// What the CPU (and the operating system: XCR0) can run, which table of kernels that selects, and the scratch buffer.
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <mutex>
#include <new>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace vf {

extern const Kernels kernels_generic;
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512_bf16;

namespace {

enum { AVX2, FMA, F16C, AVX512F, AVX512BW, AVX512DQ, AVX512VL, AVX512_VNNI, AVX512_BF16, AMX_BF16, AMX_INT8, FEATURES };

struct Machine {
  Feature features[FEATURES] = {{"avx2", false},     {"fma", false},         {"f16c", false},
                                {"avx512f", false},  {"avx512bw", false},    {"avx512dq", false},
                                {"avx512vl", false}, {"avx512_vnni", false}, {"avx512_bf16", false},
                                {"amx_bf16", false}, {"amx_int8", false}};
  const Kernels* tables[4];
  int count = 0;

  Machine() {
#if defined(__x86_64__)
    unsigned a, b, c, d, xcr0 = 0, high;
    if (__get_cpuid_count(1, 0, &a, &b, &c, &d)) {
      if (c & bit_OSXSAVE) __asm__("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
      const bool ymm = (xcr0 & 0x6) == 0x6, zmm = ymm && (xcr0 & 0xe0) == 0xe0, tiles = (xcr0 & 0x60000) == 0x60000;
      features[FMA].present = ymm && (c >> 12 & 1);
      features[F16C].present = ymm && (c >> 29 & 1);
      unsigned leaves = 0;
      if (__get_cpuid_count(7, 0, &leaves, &b, &c, &d)) {
        features[AVX2].present = ymm && (b >> 5 & 1);
        features[AVX512F].present = zmm && (b >> 16 & 1);
        features[AVX512DQ].present = zmm && (b >> 17 & 1);
        features[AVX512BW].present = zmm && (b >> 30 & 1);
        features[AVX512VL].present = zmm && (b >> 31 & 1);
        features[AVX512_VNNI].present = zmm && (c >> 11 & 1);
        features[AMX_BF16].present = tiles && (d >> 22 & 1);
        features[AMX_INT8].present = tiles && (d >> 25 & 1);
      }
      if (leaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) features[AVX512_BF16].present = zmm && (a >> 5 & 1);
    }
#endif
    tables[count++] = &kernels_generic;
#if VF_LEVELS > 1
    auto all = [&](int from, int to) {
      bool yes = true;
      for (int i = from; i <= to; ++i) yes = yes && features[i].present;
      return yes;
    };
    if (all(AVX2, F16C)) tables[count++] = &kernels_avx2;
    if (all(AVX2, AVX512VL)) tables[count++] = &kernels_avx512;
#if VF_LEVELS > 3
    if (all(AVX2, AVX512_BF16)) tables[count++] = &kernels_avx512_bf16;
#endif
#endif
  }

  const Kernels* find(const char* name) const {
    for (int i = 0; i < count; ++i)
      if (strcmp(tables[i]->isa, name) == 0) return tables[i];
    return nullptr;
  }
};

const Machine& machine() {
  static const Machine m;
  return m;
}

const Kernels* chosen = nullptr;  // by select_isa

#if defined(__SANITIZE_ADDRESS__)  // as much as is asked for and given back at once, so that its ends are watched
constexpr size_t kAlignment = 64, kRetained = 0;
#else
constexpr size_t kAlignment = 2u << 20, kRetained = 64u << 20;
#endif
std::mutex scratch_mutex;
void* idle_buffer = nullptr;
size_t idle_size = 0;

struct Header {  // in front of every buffer, one cache line
  void* allocation;
  size_t size;
};

}  // namespace

const Feature* cpu_features(int* count) {
  *count = FEATURES;
  return machine().features;
}

int isa_count() { return machine().count; }
const Kernels* isa_table(int i) { return machine().tables[i]; }

const Kernels* active_kernels() {
  if (chosen) return chosen;
  const char* name = getenv("VILT_FAST_CPU_ISA");
  return name && *name ? machine().find(name) : machine().tables[machine().count - 1];
}

bool select_isa(const char* name) {
  const Kernels* found = name ? machine().find(name) : nullptr;
  if (name && !found) return false;
  chosen = found;
  return true;
}

void* scratch_acquire(size_t bytes) {
  {
    const std::lock_guard<std::mutex> lock(scratch_mutex);
    if (idle_buffer && idle_size >= bytes) {
      void* buffer = idle_buffer;
      idle_buffer = nullptr;
      return buffer;
    }
  }
  const size_t size = (bytes + 64 + kAlignment - 1) / kAlignment * kAlignment;
  void* allocation = nullptr;
  if (posix_memalign(&allocation, kAlignment, size) != 0) throw std::bad_alloc();
#if defined(__linux__)
  madvise(allocation, size, MADV_HUGEPAGE);  // a hint: fewer faults and TLB misses
#endif
  Header* header = static_cast<Header*>(allocation);
  header->allocation = allocation;
  header->size = size - 64;
  return static_cast<char*>(allocation) + 64;
}

void scratch_release(void* buffer) {
  Header* header = reinterpret_cast<Header*>(static_cast<char*>(buffer) - 64);
  void* unwanted = header->allocation;
  if (header->size <= kRetained) {
    const std::lock_guard<std::mutex> lock(scratch_mutex);
    if (!idle_buffer || idle_size < header->size) {
      unwanted = idle_buffer ? static_cast<char*>(idle_buffer) - 64 : nullptr;
      idle_buffer = buffer;
      idle_size = header->size;
    }
  }
  free(unwanted);
}

size_t quantized_bytes(int64_t N, int64_t K) {
  const size_t columns = static_cast<size_t>((N + 63) / 64 * 64);
  return columns * static_cast<size_t>((K + 3) / 4 * 4) + columns * 8;
}

}  // namespace vf
