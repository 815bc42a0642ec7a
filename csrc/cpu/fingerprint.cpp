// A 64-bit hash of the bits of each span of memory, all of them or a sample.
//
// Work item: a part of a span, of fixed size, so that a hash does not depend on how many threads there were. A part runs
// through eight lanes, a line of 64 bytes at a time: lane = (rotate(lane) ^ word) * odd. That is a bijection of the lane for
// a given word and of the word for a given lane, so no change of a single word goes unseen. What the parts give is folded
// in their order. Whole spans come at the speed of memory; of a sample, each place costs one miss of the cache, and its
// whole line is looked at, which is there anyway.
#include "fingerprint_args.h"
#include "team.h"

namespace vf::VF_ISA {

constexpr int64_t kLine = 64, kLinesOfPart = 4096;  // 256 KB, or as many samples
constexpr int kWords = 8;
constexpr uint64_t kOdd = 0x9e3779b97f4a7c15ull, kSeed = 0xd1b54a32d192ed03ull;

VF_INLINE uint64_t stirred(uint64_t x) {  // the finalizer of MurmurHash3
  x = (x ^ x >> 33) * 0xff51afd7ed558ccdull;
  x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53ull;
  return x ^ x >> 33;
}

struct Lanes {
  uint64_t of[kWords];
  explicit Lanes(uint64_t seed) {
    for (int i = 0; i < kWords; ++i) of[i] = stirred(seed + kSeed * (uint64_t)(i + 1));
  }
  void take(const char* line) {
    for (int i = 0; i < kWords; ++i) {
      uint64_t word;
      memcpy(&word, line + 8 * i, 8);
      of[i] = ((of[i] << 29 | of[i] >> 35) ^ word) * kOdd;
    }
  }
  void take(const char* line, int64_t bytes) {  // fewer than a line
    char padded[kLine] = {};
    memcpy(padded, line, (size_t)bytes);
    take(padded);
  }
  uint64_t folded() const {
    uint64_t hash = 0;
    for (int i = 0; i < kWords; ++i) hash = stirred(hash ^ of[i]) + kOdd;
    return hash;
  }
};

// Lines of a row, or of the sample of a span.
VF_INLINE int64_t lines_of_row(const Span& s) { return (s.bytes + kLine - 1) / kLine; }
VF_INLINE int64_t lines_of(const Span& s) {
  return s.step ? (s.rows * s.bytes + s.step - 1) / s.step : s.rows * lines_of_row(s);
}
VF_INLINE int64_t parts_of(const Span& s) { return (lines_of(s) + kLinesOfPart - 1) / kLinesOfPart; }

// Lines [from, to) of all rows.
static uint64_t hash_whole(const Span& s, int64_t from, int64_t to) {
  Lanes lanes((uint64_t)from);
  const int64_t each = lines_of_row(s);
  for (int64_t row = from / each, at = from % each; from < to; ++row, at = 0) {
    const char* data = s.data + row * s.stride;
    const int64_t end = at + (to - from) < each ? at + (to - from) : each;
    from += end - at;
    const int64_t full = end * kLine <= s.bytes ? end : end - 1;
    for (; at < full; ++at) lanes.take(data + at * kLine);
    if (at < end) lanes.take(data + at * kLine, s.bytes - at * kLine);
  }
  return lanes.folded();
}

// The lines that hold the bytes at from * step, ..., (to - 1) * step of the rows end to end.
static uint64_t hash_sample(const Span& s, int64_t from, int64_t to) {
  Lanes lanes((uint64_t)from);
  for (; from < to; ++from) {
    __builtin_prefetch(s.data + (from + 32) * s.step, 0, 0);  // a hint: places are a page apart, and are not read again
    const int64_t place = from * s.step, row = place / s.bytes;
    const char *first = s.data + row * s.stride, *last = first + s.bytes, *at = first + place % s.bytes;
    const char* line = at - ((uintptr_t)at & (uintptr_t)(kLine - 1));
    if (line < first) line = first;
    if (last - line >= kLine) lanes.take(line);
    else lanes.take(line, last - line);
  }
  return lanes.folded();
}

void fingerprint(const FingerprintArgs& a) {
  int64_t lines = 0, parts = 0, sampled = 0;
  for (int64_t i = 0; i < a.count; ++i) {
    lines += lines_of(a.spans[i]), parts += parts_of(a.spans[i]);
    if (a.spans[i].step) sampled += lines_of(a.spans[i]);
  }
  int64_t* first;  // part of each span
  uint64_t* hash;  // of each part
  auto layout = [&](Arena arena) {
    first = arena.take<int64_t>(a.count + 1);
    hash = arena.take<uint64_t>(parts);
    return arena.used;
  };
  void* buffer = scratch_acquire(layout({nullptr, 0}));
  layout({(char*)buffer, 0});
  first[0] = 0;
  for (int64_t i = 0; i < a.count; ++i) first[i + 1] = first[i] + parts_of(a.spans[i]);
  Phase phase{};
#pragma omp parallel num_threads(worthwhile(a.threads, 256 * lines + 256 * sampled))
  {
    Team team{team_size(), 0, &phase};
    int64_t span = 0;
    for (int64_t part; (part = team.take()) < parts;) {  // taken in rising order
      while (part >= first[span + 1]) ++span;
      const Span& s = a.spans[span];
      const int64_t from = (part - first[span]) * kLinesOfPart, all = lines_of(s);
      const int64_t to = from + kLinesOfPart < all ? from + kLinesOfPart : all;
      hash[part] = s.step ? hash_sample(s, from, to) : hash_whole(s, from, to);
    }
  }
  for (int64_t i = 0; i < a.count; ++i) {
    uint64_t whole = stirred((uint64_t)a.spans[i].rows * kSeed ^ (uint64_t)a.spans[i].bytes);
    for (int64_t part = first[i]; part < first[i + 1]; ++part) whole = stirred(whole ^ hash[part]) * kOdd;
    a.hashes[i] = whole;
  }
  scratch_release(buffer);
}

}  // namespace vf::VF_ISA
