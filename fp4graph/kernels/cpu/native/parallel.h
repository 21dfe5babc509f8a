// Threads, as the host of the library has them: torch's own pool, or a test's.
#pragma once
#include <cstdint>

extern "C" {
// Calls `task(index, context)` for each index below `count`, in any order and in parallel.
void fp4_parallel(int64_t count, void (*task)(int64_t, void*), void* context);
// How many tasks run at once.
int64_t fp4_threads();
}

namespace {

template <class Task>
void parallel(int64_t count, const Task& task) {
  if (count == 1) return task(0);
  fp4_parallel(
      count, [](int64_t index, void* context) { (*static_cast<const Task*>(context))(index); },
      const_cast<Task*>(&task));
}

// Splits [0, n) among at most `tasks` tasks.
template <class Task>
void parallel_ranges(int64_t n, int64_t tasks, const Task& task) {
  tasks = tasks < n ? tasks : n;
  if (tasks < 1) return;
  parallel(tasks, [&](int64_t i) { task(n * i / tasks, n * (i + 1) / tasks); });
}

}  // namespace
