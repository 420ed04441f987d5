// Threads that live as long as their engine. Between two jobs they wait for some microseconds and then sleep, so that
// an idle engine takes no processor time, and another process finds the cores free.
#pragma once

#include <stdint.h>

#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace paley {

class Pool {
 public:
  // threads: the caller's among them.
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls f(item, thread) for each item in 0 .. count - 1; a thread takes the next item when it is free. Returns when
  // all are done, and throws the first exception of any. One thread at a time may call it.
  template <class F>
  void run(int64_t count, const F& f) {
    run(count, [](const void* data, int64_t item, int thread) { (*static_cast<const F*>(data))(item, thread); }, &f);
  }

 private:
  using Call = void (*)(const void* data, int64_t item, int thread);

  using Clock = std::chrono::steady_clock;

  void run(int64_t count, Call call, const void* data);
  bool alone();
  void wait(Clock::time_point start);
  void take(int thread);
  bool enter();
  void leave();
  void work(int thread);

  std::vector<std::thread> workers_;
  Call call_ = nullptr;
  const void* data_ = nullptr;
  int64_t count_ = 0;
  std::mutex lock_;
  std::exception_ptr error_;
  std::atomic<bool> stop_{false};
  // While another process has a core, who shares it with that one is waited for longer than its help is worth.
  bool is_alone_ = false;  // the caller works alone until then, next time for longer
  Clock::time_point alone_until_{};
  Clock::duration alone_for_{};
  alignas(64) std::atomic<uint32_t> job_{0};  // its number
  std::atomic<int32_t> asleep_{0};            // workers that must be woken for a job
  alignas(64) std::atomic<int64_t> next_{0};
  // Workers that are at the job, and CLOSED if no more may begin: who comes late is not waited for.
  alignas(64) std::atomic<uint32_t> state_;
  std::atomic<bool> waiting_{false};  // whether the caller sleeps until the last of them has left
};

}  // namespace paley
