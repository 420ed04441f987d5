// Threads for as long as one call lasts: no pool, nothing that a fork could break.
#pragma once

#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace paley {

// Runs worker() on `threads` threads, the caller's among them; the first exception of any is thrown again here.
// Workers divide the work among themselves, so that fewer threads than asked for are only slower.
template <class Worker>
void run_workers(int threads, const Worker& worker) {
  std::exception_ptr error;
  std::mutex lock;
  auto guarded = [&] {
    try {
      worker();
    } catch (...) {
      const std::lock_guard<std::mutex> held(lock);
      if (!error) error = std::current_exception();
    }
  };
  std::vector<std::thread> helpers;
  try {
    helpers.reserve(threads > 1 ? threads - 1 : 0);
    while (static_cast<int>(helpers.size()) + 1 < threads) helpers.emplace_back(guarded);
  } catch (...) {  // no more threads, or no memory for them; whatever it is, those that run must be joined
  }
  guarded();
  for (auto& helper : helpers) helper.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace paley
