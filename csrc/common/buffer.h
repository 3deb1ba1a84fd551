// Memory aligned for the widest vectors.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

namespace alro {

class Floats {
 public:
  Floats() = default;
  explicit Floats(int64_t count, bool zero = false) {
    const size_t bytes = (size_t(count > 0 ? count : 1) * sizeof(float) + 63) / 64 * 64;
    data_ = static_cast<float*>(::operator new(bytes, std::align_val_t(64)));
    if (zero) std::memset(data_, 0, bytes);
  }
  Floats(Floats&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Floats& operator=(Floats&& other) noexcept {
    if (this != &other) {
      release();
      data_ = other.data_;
      other.data_ = nullptr;
    }
    return *this;
  }
  ~Floats() { release(); }
  float* get() const { return data_; }

 private:
  void release() {
    if (data_) ::operator delete(data_, std::align_val_t(64));
  }
  float* data_ = nullptr;
};

}  // namespace alro
