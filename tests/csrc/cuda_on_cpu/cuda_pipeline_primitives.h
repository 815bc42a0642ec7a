// Copies wait until they must have happened, so that a missing wait shows.
#pragma once
#include <cstring>
#include <vector>

struct Copy {
  char* to;
  const char* from;
  size_t size;
  int group;
};
inline std::vector<Copy> copies[1024];
inline int groups[1024];

inline void __pipeline_memcpy_async(void* to, const void* from, size_t size, size_t zeros) {
  copies[threadIdx.x].push_back(
      {static_cast<char*>(to), static_cast<const char*>(from), size - zeros, groups[threadIdx.x]});
  if (zeros) copies[threadIdx.x].back().from = nullptr, copies[threadIdx.x].back().size = size;
}

inline void __pipeline_commit() { ++groups[threadIdx.x]; }

inline void __pipeline_wait_prior(int newest) {
  auto& mine = copies[threadIdx.x];
  std::vector<Copy> later;
  for (const Copy& copy : mine) {
    if (copy.group >= groups[threadIdx.x] - newest) {
      later.push_back(copy);
    } else if (copy.from) {
      std::memcpy(copy.to, copy.from, copy.size);
    } else {
      std::memset(copy.to, 0, copy.size);
    }
  }
  mine = later;
}
