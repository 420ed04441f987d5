// Threads for one call: those that PyTorch computes with, if it lends them; else own ones, for as long as the call
// lasts. Two sets of threads would take the cores from one another, as those of libgomp spin while they wait.
#pragma once

#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace paley {

// GOMP_parallel: runs f(data) on so many threads, the caller's among them.
using Parallel = void (*)(void (*f)(void*), void* data, unsigned threads, unsigned flags);
inline Parallel borrowed = nullptr;

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
  if (borrowed && threads > 1) {
    borrowed([](void* f) { (*static_cast<decltype(guarded)*>(f))(); }, &guarded, static_cast<unsigned>(threads), 0);
    if (error) std::rethrow_exception(error);
    return;
  }
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
