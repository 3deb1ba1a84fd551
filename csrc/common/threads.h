// Threads of one call: started, joined and gone. No pool outlives a call, so nothing is lost in a forked process.
#pragma once

#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace alro {

// Runs work(0) .. work(count - 1), one thread each; the first exception is rethrown here.
template <class Work>
void parallel(int count, Work work) {
  std::vector<std::exception_ptr> errors(count);
  auto guarded = [&](int i) {
    try {
      work(i);
    } catch (...) {
      errors[i] = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  threads.reserve(count);
  int started = 1;
  for (; started < count; ++started) {
    try {
      threads.emplace_back(guarded, started);
    } catch (const std::system_error&) {  // no more threads to be had: the rest of the work is done here
      break;
    }
  }
  guarded(0);
  for (int i = started; i < count; ++i) guarded(i);
  for (auto& thread : threads) thread.join();
  for (auto& error : errors)
    if (error) std::rethrow_exception(error);
}

}  // namespace alro
