// A team of threads working through phases: items are taken from an atomic counter, a barrier ends each phase.
//
// All threads of one `#pragma omp parallel` region form a team, or each thread is a team of one with no barriers. Every
// phase has its own counters, so nobody has to reset one that another thread may still read. The barrier spins for some
// 20 us and then yields: OpenMP's own spins for milliseconds, which on a busy machine keeps the awaited thread off the CPU.
#pragma once
#include <sched.h>

#include "kernels.h"
#include "vec.h"

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace vf::VF_ISA {

struct Phase {  // zeroed before use; the two counters in different cache lines
  alignas(64) int64_t taken;
  alignas(64) int64_t arrived;
};

struct Team {
  int size, rank;
  Phase* phase;  // a team of one uses the same phase again and again

  int64_t take() { return size > 1 ? __atomic_fetch_add(&phase->taken, 1, __ATOMIC_RELAXED) : phase->taken++; }
  void barrier() {
    if (size == 1) {
      phase->taken = 0;
      return;
    }
    __atomic_fetch_add(&phase->arrived, 1, __ATOMIC_ACQ_REL);
    for (int i = 0; __atomic_load_n(&phase->arrived, __ATOMIC_ACQUIRE) < size; ++i) {
      if (i >= 1000) sched_yield();
#if VF_LEVEL > 0
      else _mm_pause();
#endif
    }
    ++phase;
  }
};

VF_INLINE int team_rank() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}
VF_INLINE int team_size() {
#if defined(_OPENMP)
  return omp_get_num_threads();
#else
  return 1;
#endif
}

// Threads worth waking for so many multiply-adds: a parallel region costs about 5 us.
VF_INLINE int worthwhile(int threads, int64_t work) {
  const int64_t useful = 1 + work / (1 << 18);
  return useful < threads ? (int)useful : threads;
}

// Hands out 64-byte-aligned pieces of one buffer. With base == nullptr it only measures: lay out twice, allocate between.
struct Arena {
  char* base;
  size_t used;
  template <class X>
  X* take(int64_t n) {
    const size_t bytes = (size_t)n * sizeof(X), start = used;
    used += (bytes + 63) / 64 * 64;
#if defined(__SANITIZE_ADDRESS__)  // a fence behind every piece
    used += 64;
    if (base) {
      ASAN_UNPOISON_MEMORY_REGION(base + start, bytes);
      ASAN_POISON_MEMORY_REGION(base + start + bytes, used - start - bytes);
    }
#endif
    return base ? (X*)(base + start) : nullptr;
  }
};

// Calls work(team, space) on every thread of a team with one phase. lay_out(arena) takes the space of a thread from the
// arena and returns it; it is called once more, to measure.
template <class LayOut, class Work>
static void share_out(int threads, LayOut lay_out, Work work) {
  Arena measure{nullptr, 0};
  lay_out(measure);
  char* buffer = (char*)scratch_acquire(measure.used * (size_t)threads);
  Phase shared{};
#pragma omp parallel num_threads(threads)
  {
    Phase own{};
    Team team{team_size(), team_rank(), nullptr};
    team.phase = team.size > 1 ? &shared : &own;
    Arena arena{buffer + (size_t)team.rank * measure.used, 0};
    const auto space = lay_out(arena);
    work(team, space);
  }
  scratch_release(buffer);
}

}  // namespace vf::VF_ISA
