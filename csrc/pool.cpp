#include "pool.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <utility>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace paley {

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;
constexpr uint32_t CLOSED = 1u << 31;
constexpr auto PATIENCE = std::chrono::microseconds(100);  // a sleeping thread needs some 50 to come back
constexpr auto SHORT = 10 * PATIENCE;  // a job that a thread does faster alone than beside one that is held up

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

#if defined(__linux__)
void sleep_while(const std::atomic<uint32_t>& word, uint32_t value) {
  syscall(SYS_futex, reinterpret_cast<const uint32_t*>(&word), FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}
void wake(const std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<const uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}
#else
// All pools of a process share this one: a thread that wakes for another word sleeps again.
std::mutex sleepers;
std::condition_variable changed;
void sleep_while(const std::atomic<uint32_t>& word, uint32_t value) {
  std::unique_lock<std::mutex> held(sleepers);
  changed.wait(held, [&] { return word.load() != value; });
}
void wake(const std::atomic<uint32_t>&) {
  const std::lock_guard<std::mutex> held(sleepers);
  changed.notify_all();
}
#endif

// Waits for some microseconds. -> whether done().
template <class Done>
bool spin(const Done& done) {
  const auto end = Clock::now() + PATIENCE;
  do {
    for (int i = 0; i < 32; ++i) {
      if (done()) return true;
      relax();
    }
  } while (Clock::now() < end);
  return false;
}

}  // namespace

Pool::Pool(int threads) : state_(CLOSED) {
  try {
    workers_.reserve(threads > 1 ? threads - 1 : 0);
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  } catch (...) {  // no more threads, or no memory for them: fewer do
  }
}

Pool::~Pool() {
  stop_.store(true);
  job_.fetch_add(1);
  wake(job_);
  for (auto& worker : workers_) worker.join();
}

void Pool::run(int64_t count, Call call, const void* data) {
  int64_t done = 0;
  if (workers_.empty() || count <= 1) {
    for (; done < count; ++done) call(data, done, 0);
    return;
  }
  const Clock::time_point start = Clock::now();
  if (alone()) {  // unless the job turns out to be a long one
    while (done < count && Clock::now() - start < SHORT) call(data, done++, 0);
    if (done == count) return;
  }
  call_ = call;
  data_ = data;
  count_ = count;
  next_.store(done, std::memory_order_relaxed);
  state_.store(0, std::memory_order_release);
  job_.fetch_add(1);
  if (asleep_.load()) wake(job_);
  take(0);
  state_.fetch_or(CLOSED);
  if (!spin([this] { return state_.load(std::memory_order_acquire) == CLOSED; })) wait(start);
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

bool Pool::alone() {
  if (!is_alone_) return false;
  is_alone_ = Clock::now() < alone_until_;
  return is_alone_;
}

// Sleeps until the last worker has left. If the job was a short one and that took long, another process has the core:
// the next jobs are done without workers, as each would be held up like this one, for longer than all of it takes. What
// has a core for less than that, as who answers a client between two tokens, is waited for.
void Pool::wait(Clock::time_point start) {
  const Clock::time_point asleep = Clock::now();
  waiting_.store(true);
  for (uint32_t state; (state = state_.load()) != CLOSED;) sleep_while(state_, state);
  waiting_.store(false);
  const Clock::time_point end = Clock::now();
  if (asleep - start > SHORT || end - asleep < SHORT) return;
  const bool again = end - alone_until_ < alone_for_;  // soon after the last time
  alone_for_ = again ? std::min<Clock::duration>(2 * alone_for_, milliseconds(200)) : milliseconds(20);
  alone_until_ = end + alone_for_;
  is_alone_ = true;
}

void Pool::take(int thread) {
  try {
    for (int64_t item; (item = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) call_(data_, item, thread);
  } catch (...) {
    next_.store(count_, std::memory_order_relaxed);
    const std::lock_guard<std::mutex> held(lock_);
    if (!error_) error_ = std::current_exception();
  }
}

bool Pool::enter() {
  uint32_t state = state_.load();
  while (!(state & CLOSED)) {
    if (state_.compare_exchange_weak(state, state + 1)) return true;
  }
  return false;
}

void Pool::leave() {
  if (state_.fetch_sub(1) == (CLOSED | 1) && waiting_.load()) wake(state_);
}

void Pool::work(int thread) {
  for (uint32_t seen = 0;;) {
    if (!spin([&] { return job_.load(std::memory_order_acquire) != seen; })) {
      asleep_.fetch_add(1);
      while (job_.load() == seen) sleep_while(job_, seen);
      asleep_.fetch_sub(1);
    }
    seen = job_.load();
    if (stop_.load()) return;
    if (!enter()) continue;
    take(thread);
    leave();
  }
}

}  // namespace paley
