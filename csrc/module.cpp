// Python bindings: every argument is checked here, so that whatever is passed ends in a result or an exception.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cmath>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>

#include "gather.h"
#include "kernels.h"
#include "listwise.h"
#include "vocab.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using alro::DType;
using alro::Matrix;
using Array = nb::ndarray<nb::ro>;
using Out = nb::ndarray<>;
using MaybeArray = std::optional<Array>;
using MaybeOut = std::optional<Out>;

[[noreturn]] void fail(const std::string& message) { throw nb::value_error(message.c_str()); }

template <class A>
std::string shape_of(const A& array) {
  std::string text = "[";
  for (size_t i = 0; i < array.ndim(); ++i) text += (i ? ", " : "") + std::to_string(array.shape(i));
  return text + "]";
}

template <class A>
void check_cpu(const A& array, const char* name) {
  if (!array.is_valid()) fail(std::string(name) + ": expected a tensor");
  if (array.device_type() != nb::device::cpu::value) fail(std::string(name) + ": expected a tensor on the CPU");
}

Matrix matrix(const Array& array, const char* name) {
  check_cpu(array, name);
  if (array.ndim() != 2) fail(std::string(name) + ": expected 2 dimensions, got shape " + shape_of(array));
  const auto dtype = array.dtype();
  const bool f32 = dtype == nb::dtype<float>();
  const bool bf16 = dtype.code == uint8_t(nb::dlpack::dtype_code::Bfloat) && dtype.bits == 16 && dtype.lanes == 1;
  if (!f32 && !bf16) fail(std::string(name) + ": expected float32 or bfloat16");
  return {array.data(),    int64_t(array.shape(0)), int64_t(array.shape(1)), array.stride(0),
          array.stride(1), f32 ? DType::f32 : DType::bf16};
}

// Data of a contiguous array of T with the given shape.
template <class T, class A>
auto* dense(const A& array, const char* name, std::initializer_list<int64_t> shape) {
  check_cpu(array, name);
  if (array.dtype() != nb::dtype<T>())
    fail(std::string(name) + ": expected " + (std::is_same_v<T, float> ? "float32" : "int64"));
  bool same = array.ndim() == shape.size();
  std::string wanted = "[";
  int64_t dense_stride = 1;
  for (const int64_t size : shape) wanted += (wanted.size() > 1 ? ", " : "") + std::to_string(size);
  for (size_t i = shape.size(); same && i-- > 0;) {
    const int64_t size = shape.begin()[i];
    same = int64_t(array.shape(i)) == size;
    if (same && size > 1 && array.stride(i) != dense_stride) fail(std::string(name) + ": expected a contiguous tensor");
    dense_stride *= size;
  }
  if (!same) fail(std::string(name) + ": expected shape " + wanted + "], got " + shape_of(array));
  if constexpr (std::is_same_v<A, Out>)
    return static_cast<T*>(array.data());
  else
    return static_cast<const T*>(array.data());
}

template <class T, class A>
auto* dense_or_null(const std::optional<A>& array, const char* name, std::initializer_list<int64_t> shape) {
  using Pointer = decltype(dense<T>(*array, name, shape));
  return array ? dense<T>(*array, name, shape) : Pointer(nullptr);
}

void check_finite(double x, const char* name) {
  if (!std::isfinite(x)) fail(std::string(name) + ": expected a finite number");
}

int64_t length(const MaybeArray& array) { return array && array->ndim() > 0 ? int64_t(array->shape(0)) : 0; }

alro::HeadArgs head_args(const Array& hidden, const Array& weight, const MaybeArray& bias, double softcap, double scale,
                         const MaybeArray& first, const MaybeArray& second, bool entropy, int threads) {
  alro::HeadArgs args{};
  args.hidden = matrix(hidden, "hidden");
  args.weight = matrix(weight, "weight");
  if (args.hidden.columns != args.weight.columns)
    fail("hidden, weight: expected the same number of columns, got " + shape_of(hidden) + " and " + shape_of(weight));
  if (args.hidden.columns < 1 || args.weight.rows < 1) fail("weight: expected at least one row and one column");
  args.bias = dense_or_null<float>(bias, "bias", {args.weight.rows});
  check_finite(scale, "scale");
  check_finite(softcap, "softcap");
  if (softcap < 0) fail("softcap: expected a positive number, or 0 for none");
  args.softcap = float(softcap);
  args.scale = float(scale);
  if (bool(first) != bool(second)) fail("first, second: expected both or neither");
  args.pairs = length(first);
  args.first = dense_or_null<int64_t>(first, "first", {args.pairs});
  args.second = dense_or_null<int64_t>(second, "second", {args.pairs});
  for (int64_t p = 0; p < args.pairs; ++p) {
    const int64_t a = args.first[p], b = args.second[p], n = args.hidden.rows;
    const bool none = a == -1 && b == -1;
    if (!none && (a < 0 || b < 0 || a >= n || b >= n)) fail("first, second: expected rows of hidden, or both -1");
  }
  args.entropy = entropy;
  if (threads < 1 || threads > 4096) fail("threads: expected 1 to 4096");
  args.threads = threads;
  return args;
}

double vocab_pass(const Array& hidden, const Array& weight, const MaybeArray& bias, double softcap, double scale,
                  const MaybeArray& first, const MaybeArray& second, bool entropy, double mass_bound, const Out& lse,
                  const MaybeOut& expected, const MaybeOut& cross, const MaybeOut& mixed, const MaybeOut& spread,
                  int threads) {
  const auto args = head_args(hidden, weight, bias, softcap, scale, first, second, entropy, threads);
  if (!(mass_bound >= 0 && mass_bound < 1)) fail("mass_bound: expected a number in [0, 1)");
  const int64_t n = args.hidden.rows, h = args.hidden.columns, p = args.pairs;
  alro::VocabOut out{};
  out.lse = dense<float>(lse, "lse", {n});
  out.expected = dense_or_null<float>(expected, "expected", {n, h});
  out.cross = dense_or_null<float>(cross, "cross", {p});
  out.mixed = dense_or_null<float>(mixed, "mixed", {p, h});
  out.spread = dense_or_null<float>(spread, "spread", {p, h});
  if (p > 0 && !out.cross) fail("cross: expected an output, since pairs are given");
  nb::gil_scoped_release release;
  return alro::vocab_pass(args, float(mass_bound), out);
}

void weight_grad(const Array& hidden, const Array& weight, const MaybeArray& bias, double softcap, double scale,
                 const MaybeArray& first, const MaybeArray& second, bool entropy, const Array& lse,
                 const Array& grad_lse, const MaybeArray& cross, const MaybeArray& grad_first,
                 const MaybeArray& grad_second, const MaybeOut& d_weight, const MaybeOut& d_bias, int threads) {
  const auto args = head_args(hidden, weight, bias, softcap, scale, first, second, entropy, threads);
  const int64_t n = args.hidden.rows, h = args.hidden.columns, v = args.weight.rows, p = args.pairs;
  alro::WeightGradArgs grad{};
  grad.lse = dense<float>(lse, "lse", {n});
  grad.grad_lse = dense<float>(grad_lse, "grad_lse", {n});
  grad.cross = dense_or_null<float>(cross, "cross", {p});
  grad.grad_first = dense_or_null<float>(grad_first, "grad_first", {p});
  grad.grad_second = dense_or_null<float>(grad_second, "grad_second", {p});
  if (p > 0 && !(grad.cross && grad.grad_first && grad.grad_second))
    fail("cross, grad_first, grad_second: expected all three, since pairs are given");
  grad.d_weight = dense_or_null<float>(d_weight, "d_weight", {v, h});
  grad.d_bias = dense_or_null<float>(d_bias, "d_bias", {v});
  nb::gil_scoped_release release;
  alro::weight_grad(args, grad);
}

alro::GatherArgs gather_args(const Array& hidden, const Array& weight, const MaybeArray& bias, double softcap,
                             double scale, const Array& rows, const Array& ids, int threads) {
  const auto head = head_args(hidden, weight, bias, softcap, scale, {}, {}, true, threads);
  alro::GatherArgs args{head.hidden, head.weight, head.bias, head.softcap, head.scale, 0, 0, 0, nullptr, nullptr,
                        threads};
  if (rows.ndim() != 2 || ids.ndim() != 2) fail("rows, ids: expected 2 dimensions");
  args.groups = int64_t(rows.shape(0));
  args.slots = int64_t(rows.shape(1));
  args.columns = int64_t(ids.shape(1));
  args.rows = dense<int64_t>(rows, "rows", {args.groups, args.slots});
  args.ids = dense<int64_t>(ids, "ids", {args.groups, args.columns});
  for (int64_t i = 0; i < args.groups * args.slots; ++i)
    if (args.rows[i] >= args.hidden.rows) fail("rows: expected rows of hidden, or negative numbers for pads");
  for (int64_t i = 0; i < args.groups * args.columns; ++i)
    if (args.ids[i] >= args.weight.rows) fail("ids: expected rows of weight, or negative numbers for pads");
  return args;
}

void gather_logits(const Array& hidden, const Array& weight, const MaybeArray& bias, double softcap, double scale,
                   const Array& rows, const Array& ids, const Out& logits, int threads) {
  const auto args = gather_args(hidden, weight, bias, softcap, scale, rows, ids, threads);
  float* out = dense<float>(logits, "logits", {args.groups, args.slots, args.columns});
  nb::gil_scoped_release release;
  alro::gather_logits(args, out);
}

void gather_backward(const Array& hidden, const Array& weight, double softcap, double scale, const Array& rows,
                     const Array& ids, const Array& logits, const Array& grad, const MaybeOut& d_hidden,
                     const MaybeOut& d_weight, const MaybeOut& d_bias, int threads) {
  const auto args = gather_args(hidden, weight, {}, softcap, scale, rows, ids, threads);
  const float* z = dense<float>(logits, "logits", {args.groups, args.slots, args.columns});
  const float* g = dense<float>(grad, "grad", {args.groups, args.slots, args.columns});
  float* dh = dense_or_null<float>(d_hidden, "d_hidden", {args.hidden.rows, args.hidden.columns});
  float* dw = dense_or_null<float>(d_weight, "d_weight", {args.weight.rows, args.weight.columns});
  float* db = dense_or_null<float>(d_bias, "d_bias", {args.weight.rows});
  nb::gil_scoped_release release;
  alro::gather_backward(args, z, g, dh, dw, db);
}

void listwise(const Array& logits, const Array& ratings, const Array& ranks, const Array& sizes, const Array& twin,
              const MaybeArray& values, double gamma, double sigma, bool normalise, const std::string& divergence,
              bool mask_emitted, const Out& soft_lambda, const Out& permutation, const Out& expected,
              const Out& d_soft_lambda, const Out& d_student, const MaybeOut& d_teacher, int threads) {
  if (logits.ndim() != 3) fail("logits: expected 3 dimensions, got shape " + shape_of(logits));
  alro::ListwiseArgs args{};
  args.lists = int64_t(logits.shape(0));
  args.rows = int64_t(logits.shape(1));
  args.columns = int64_t(logits.shape(2));
  args.width = values ? args.rows : args.columns;
  if (!values && args.rows != args.columns) fail("logits: expected as many slots as candidates, got " + shape_of(logits));
  args.logits = dense<float>(logits, "logits", {args.lists, args.rows, args.columns});
  args.ratings = dense<float>(ratings, "ratings", {args.lists, args.width});
  args.ranks = dense<int64_t>(ranks, "ranks", {args.lists, args.width});
  args.sizes = dense<int64_t>(sizes, "sizes", {args.lists});
  args.twin = dense<int64_t>(twin, "twin", {args.lists});
  args.values = dense_or_null<float>(values, "values", {args.columns});
  if (values && args.columns == 0) fail("values: expected at least one grade");
  for (int64_t l = 0; l < args.lists; ++l) {
    if (args.sizes[l] < 0 || args.sizes[l] > args.width) fail("sizes: expected 0 to the number of candidates");
    if (args.twin[l] < -1 || args.twin[l] >= args.lists) fail("twin: expected indices of lists, or -1");
    for (int64_t i = 0; i < args.sizes[l]; ++i) {
      const int64_t rank = args.ranks[l * args.width + i];
      if (rank < 1 || rank > args.width) fail("ranks: expected 1 to the number of candidates");
    }
  }
  check_finite(gamma, "gamma");
  check_finite(sigma, "sigma");
  args.gamma = float(gamma);
  args.sigma = float(sigma);
  args.normalise = normalise;
  args.mask_emitted = mask_emitted;
  if (divergence == "none") args.divergence = alro::Divergence::none;
  else if (divergence == "kl") args.divergence = alro::Divergence::kl;
  else if (divergence == "ce") args.divergence = alro::Divergence::ce;
  else if (divergence == "symmetric") args.divergence = alro::Divergence::symmetric;
  else fail("divergence: expected none, kl, ce or symmetric");
  args.soft_lambda = dense<float>(soft_lambda, "soft_lambda", {args.lists});
  args.permutation = dense<float>(permutation, "permutation", {args.lists});
  args.expected = dense<float>(expected, "expected", {args.lists, args.width});
  args.d_soft_lambda = dense<float>(d_soft_lambda, "d_soft_lambda", {args.lists, args.rows, args.columns});
  args.d_student = dense<float>(d_student, "d_student", {args.lists, args.rows, args.columns});
  args.d_teacher = dense_or_null<float>(d_teacher, "d_teacher", {args.lists, args.rows, args.columns});
  if (threads < 1 || threads > 4096) fail("threads: expected 1 to 4096");
  nb::gil_scoped_release release;
  alro::listwise(args, threads);
}

}  // namespace

NB_MODULE(_cpp, m) {
  m.doc() = "Vectorised CPU kernels of alro_fast.backends.cpp; outputs are written into the arrays passed for them.";
  m.def("instruction_set", [] { return std::string(alro::active_kernels().name); });
  m.def("select_instruction_set", [](const std::string& name) { return alro::select_kernels(name.c_str()); }, "name"_a,
        "False where this machine or this build has no such set; for tests and benchmarks.");
  m.def("vocab_pass", &vocab_pass, "hidden"_a, "weight"_a, "bias"_a.none(), "softcap"_a, "scale"_a, "first"_a.none(),
        "second"_a.none(), "entropy"_a, "mass_bound"_a, "lse"_a, "expected"_a.none(), "cross"_a.none(),
        "mixed"_a.none(), "spread"_a.none(), "threads"_a,
        "Returns the products of a row with a column done for weighted sums, as a share of N * V.");
  m.def("weight_grad", &weight_grad, "hidden"_a, "weight"_a, "bias"_a.none(), "softcap"_a, "scale"_a, "first"_a.none(),
        "second"_a.none(), "entropy"_a, "lse"_a, "grad_lse"_a, "cross"_a.none(), "grad_first"_a.none(),
        "grad_second"_a.none(), "d_weight"_a.none(), "d_bias"_a.none(), "threads"_a);
  m.def("gather_logits", &gather_logits, "hidden"_a, "weight"_a, "bias"_a.none(), "softcap"_a, "scale"_a, "rows"_a,
        "ids"_a, "logits"_a, "threads"_a);
  m.def("gather_backward", &gather_backward, "hidden"_a, "weight"_a, "softcap"_a, "scale"_a, "rows"_a, "ids"_a,
        "logits"_a, "grad"_a, "d_hidden"_a.none(), "d_weight"_a.none(), "d_bias"_a.none(), "threads"_a);
  m.def("listwise", &listwise, "logits"_a, "ratings"_a, "ranks"_a, "sizes"_a, "twin"_a, "values"_a.none(), "gamma"_a,
        "sigma"_a, "normalise"_a, "divergence"_a, "mask_emitted"_a, "soft_lambda"_a, "permutation"_a, "expected"_a,
        "d_soft_lambda"_a, "d_student"_a, "d_teacher"_a.none(), "threads"_a);
}
