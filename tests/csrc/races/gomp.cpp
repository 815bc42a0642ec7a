// All of OpenMP that csrc/cpu uses, on std::thread: ThreadSanitizer knows when such a thread begins and ends, and does not
// know it of libgomp's, so that with that one every result would look like a race.
#include <thread>
#include <vector>

static thread_local int rank = 0, size = 1;

extern "C" {

int omp_get_thread_num() { return rank; }
int omp_get_num_threads() { return size; }

void GOMP_parallel(void (*region)(void*), void* data, unsigned threads, unsigned) {
  auto run = [=](int own) {
    rank = own, size = static_cast<int>(threads);
    region(data);
    rank = 0, size = 1;
  };
  std::vector<std::thread> team;
  for (unsigned i = 1; i < threads; ++i) team.emplace_back(run, i);
  run(0);
  for (std::thread& t : team) t.join();
}

}  // extern "C"
