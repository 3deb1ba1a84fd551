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

#include "attention/attention.h"
#include "gather/gather.h"
#include "instruction_sets/kernels.h"
#include "layers/layers.h"
#include "listwise/listwise.h"
#include "vocab/vocab.h"

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

template <class A>
DType storage(const A& array, const char* name) {
  check_cpu(array, name);
  const auto dtype = array.dtype();
  const bool bf16 = dtype.code == uint8_t(nb::dlpack::dtype_code::Bfloat) && dtype.bits == 16 && dtype.lanes == 1;
  if (dtype != nb::dtype<float>() && !bf16) fail(std::string(name) + ": expected float32 or bfloat16");
  return bf16 ? DType::bf16 : DType::f32;
}

template <class A>
Matrix matrix(const A& array, const char* name) {
  const DType dtype = storage(array, name);
  if (array.ndim() != 2) fail(std::string(name) + ": expected 2 dimensions, got shape " + shape_of(array));
  return {array.data(), int64_t(array.shape(0)), int64_t(array.shape(1)), array.stride(0), array.stride(1), dtype};
}

// Data of a contiguous array of T with the given shape.
template <class T, class A>
auto* dense(const A& array, const char* name, std::initializer_list<int64_t> shape) {
  check_cpu(array, name);
  if (array.dtype() != nb::dtype<T>())
    fail(std::string(name) + ": expected " +
         (std::is_same_v<T, float>     ? "float32"
          : std::is_same_v<T, int32_t> ? "int32"
                                       : "int64"));
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
  if constexpr (std::is_same_v<A, Out>) return static_cast<T*>(array.data());
  else return static_cast<const T*>(array.data());
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
  alro::GatherArgs args{head.hidden, head.weight, head.bias, head.softcap, head.scale, 0,
                        0,           0,           nullptr,   nullptr,      threads};
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
  if (!values && args.rows != args.columns)
    fail("logits: expected as many slots as candidates, got " + shape_of(logits));
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

// Data of [rows, columns] of the given type, columns next to each other.
template <class A>
alro::Rows rows_of(const A& array, const char* name, const Matrix& like) {
  const Matrix m = matrix(array, name);
  if (m.rows != like.rows || m.columns != like.columns || m.dtype != like.dtype)
    fail(std::string(name) + ": expected the shape and type of the other tensors");
  if (m.columns > 1 && m.column_stride != 1) fail(std::string(name) + ": expected columns next to each other");
  return {const_cast<void*>(m.data), m.row_stride};
}

void check_threads(int threads) {
  if (threads < 1 || threads > 4096) fail("threads: expected 1 to 4096");
}

alro::NormArgs norm_args(const Array& x, const Array& weight, double eps, double offset, const Out& y, const Out& scale,
                         int threads) {
  const Matrix like = matrix(x, "x");
  const Matrix factors = matrix(weight, "weight");
  if (factors.rows != 1 || factors.columns != like.columns || factors.dtype != like.dtype ||
      (factors.columns > 1 && factors.column_stride != 1))
    fail("weight: expected a dense [1, columns of x] of the type of x, got " + shape_of(weight));
  if (like.columns < 1) fail("x: expected at least one column");
  check_finite(eps, "eps");
  check_finite(offset, "offset");
  check_threads(threads);
  alro::NormArgs args{};
  args.rows = like.rows;
  args.columns = like.columns;
  args.dtype = like.dtype;
  args.x = rows_of(x, "x", like);
  args.y = rows_of(y, "y", like);
  args.weight = factors.data;
  args.eps = float(eps);
  args.offset = float(offset);
  args.scale = dense<float>(scale, "scale", {like.rows});
  return args;
}

void rms_norm(const Array& x, const Array& weight, double eps, double offset, const Out& y, const Out& scale,
              int threads) {
  const auto args = norm_args(x, weight, eps, offset, y, scale, threads);
  nb::gil_scoped_release release;
  alro::norm(args, threads);
}

void rms_norm_backward(const Array& x, const Array& weight, double offset, const Out& scale, const Out& d_y,
                       const Out& d_x, const MaybeOut& d_weight, int threads) {
  auto args = norm_args(x, weight, 0, offset, d_y, scale, threads);
  args.d_x = rows_of(d_x, "d_x", matrix(x, "x"));
  args.d_weight = dense_or_null<float>(d_weight, "d_weight", {args.columns});
  nb::gil_scoped_release release;
  alro::norm_backward(args, threads);
}

alro::GatedArgs gated_args(const Array& gate, const Array& up, const std::string& activation, const Out& y,
                           int threads) {
  const Matrix like = matrix(gate, "gate");
  alro::GatedArgs args{};
  if (activation == "silu") args.activation = alro::Activation::silu;
  else if (activation == "gelu_tanh") args.activation = alro::Activation::gelu_tanh;
  else fail("activation: expected silu or gelu_tanh");
  check_threads(threads);
  args.rows = like.rows;
  args.columns = like.columns;
  args.dtype = like.dtype;
  args.gate = rows_of(gate, "gate", like);
  args.up = rows_of(up, "up", like);
  args.y = rows_of(y, "y", like);
  return args;
}

void gated(const Array& gate, const Array& up, const std::string& activation, const Out& y, int threads) {
  const auto args = gated_args(gate, up, activation, y, threads);
  nb::gil_scoped_release release;
  alro::gated(args, threads);
}

void rotary(const Array& x, const Array& cos, const Array& sin, bool transpose, const Out& y, int threads) {
  alro::RotaryArgs args{};
  args.dtype = storage(x, "x");
  if (x.ndim() != 4 || x.shape(3) % 2 || x.shape(3) == 0)
    fail("x: expected [batches, heads, rows, even width], got " + shape_of(x));
  args.batches = int64_t(x.shape(0));
  args.heads = int64_t(x.shape(1));
  args.rows = int64_t(x.shape(2));
  args.width = int64_t(x.shape(3));
  args.transpose = transpose;
  check_threads(threads);
  const auto check = [&](const auto& array, const char* name, size_t dims) {
    bool same = storage(array, name) == args.dtype && array.ndim() == dims && int64_t(array.shape(0)) == args.batches &&
                int64_t(array.shape(dims - 2)) == args.rows && int64_t(array.shape(dims - 1)) == args.width;
    if (!same || (dims == 4 && int64_t(array.shape(1)) != args.heads))
      fail(std::string(name) + ": expected the type of x and its batches, rows and width, got " + shape_of(array));
    if (array.stride(dims - 1) != 1) fail(std::string(name) + ": expected columns next to each other");
  };
  check(x, "x", 4);
  check(y, "y", 4);
  check(cos, "cos", 3);
  check(sin, "sin", 3);
  args.x = {const_cast<void*>(x.data()), x.stride(0), x.stride(1), x.stride(2)};
  args.y = {y.data(), y.stride(0), y.stride(1), y.stride(2)};
  args.cos = cos.data();
  args.sin = sin.data();
  args.cos_batch_stride = cos.stride(0);
  args.cos_row_stride = cos.stride(1);
  args.sin_batch_stride = sin.stride(0);
  args.sin_row_stride = sin.stride(1);
  nb::gil_scoped_release release;
  alro::rotary(args, threads);
}

void gated_backward(const Array& gate, const Array& up, const std::string& activation, const Out& d_y,
                    const Out& d_gate, const Out& d_up, int threads) {
  auto args = gated_args(gate, up, activation, d_y, threads);
  const Matrix like = matrix(gate, "gate");
  args.d_gate = rows_of(d_gate, "d_gate", like);
  args.d_up = rows_of(d_up, "d_up", like);
  nb::gil_scoped_release release;
  alro::gated_backward(args, threads);
}

// [rows, heads, width] of float32, the last axis dense.
template <class A>
alro::HeadRows head_rows(const A& array, const char* name, int64_t rows, int64_t heads, int64_t width) {
  check_cpu(array, name);
  if (array.dtype() != nb::dtype<float>()) fail(std::string(name) + ": expected float32");
  if (array.ndim() != 3 || int64_t(array.shape(0)) != rows || int64_t(array.shape(1)) != heads ||
      int64_t(array.shape(2)) != width)
    fail(std::string(name) + ": expected shape [" + std::to_string(rows) + ", " + std::to_string(heads) + ", " +
         std::to_string(width) + "], got " + shape_of(array));
  if (width > 1 && array.stride(2) != 1) fail(std::string(name) + ": expected a dense last axis");
  return {const_cast<float*>(static_cast<const float*>(array.data())), array.stride(0), array.stride(1)};
}

void tree_attention(const Array& query, const Array& key, const Array& value, const Array& node_start,
                    const Array& node_parent, const Array& query_row, double scale, int window, double softcap,
                    const Out& out, const Out& lse, const MaybeArray& grad, const MaybeOut& d_query,
                    const MaybeOut& d_key, const MaybeOut& d_value, int threads) {
  if (query.ndim() != 3 || key.ndim() != 3) fail("query, key: expected 3 dimensions");
  alro::AttentionArgs args{};
  args.queries = int64_t(query.shape(0));
  args.rows = int64_t(key.shape(0));
  const int64_t queries = args.queries, rows = args.rows;
  args.heads = int64_t(query.shape(1));
  args.width = int64_t(query.shape(2));
  args.kv_heads = int64_t(key.shape(1));
  if (args.kv_heads < 1 || args.heads % args.kv_heads || args.width < 1)
    fail("query, key: expected a multiple of the key heads, and at least one column");
  if (rows >= std::numeric_limits<int32_t>::max() || queries >= std::numeric_limits<int32_t>::max())
    fail("query, key: expected fewer than 2^31 rows");
  args.query = head_rows(query, "query", queries, args.heads, args.width);
  args.key = head_rows(key, "key", rows, args.kv_heads, args.width);
  args.value = head_rows(value, "value", rows, args.kv_heads, args.width);
  args.out = head_rows(out, "out", queries, args.heads, args.width);
  args.lse = dense<float>(lse, "lse", {queries, args.heads});
  args.nodes = node_parent.ndim() == 1 ? int64_t(node_parent.shape(0)) : 0;
  args.node_parent = dense<int32_t>(node_parent, "node_parent", {args.nodes});
  args.node_start = dense<int64_t>(node_start, "node_start", {args.nodes + 1});
  bool tiled = args.node_start[0] == 0 && args.node_start[args.nodes] == rows;
  for (int64_t g = 0; g < args.nodes; ++g) tiled &= args.node_start[g] <= args.node_start[g + 1];
  if (!tiled) fail("node_start: expected ascending rows of key, from the first to the end");
  args.query_row = dense<int32_t>(query_row, "query_row", {queries});
  for (int64_t q = 0; q < queries; ++q)
    if (args.query_row[q] < (q ? args.query_row[q - 1] : 0) || args.query_row[q] >= rows)
      fail("query_row: expected ascending rows of key");
  if (window < 0) fail("window: expected 0 (none) or more");
  args.window = window;
  check_finite(softcap, "softcap");
  if (softcap < 0) fail("softcap: expected 0 (none) or more");
  args.softcap = float(softcap);
  check_finite(scale, "scale");
  args.scale = float(scale);
  if (threads < 1 || threads > 4096) fail("threads: expected 1 to 4096");
  args.threads = threads;
  if (grad) {
    if (!d_query || !d_key || !d_value) fail("d_query, d_key, d_value: expected all three, since grad is given");
    args.grad = head_rows(*grad, "grad", queries, args.heads, args.width);
    args.d_query = head_rows(*d_query, "d_query", queries, args.heads, args.width);
    args.d_key = head_rows(*d_key, "d_key", rows, args.kv_heads, args.width);
    args.d_value = head_rows(*d_value, "d_value", rows, args.kv_heads, args.width);
  }
  nb::gil_scoped_release release;
  alro::attention(args, bool(grad));
}

}  // namespace

NB_MODULE(_cpp, m) {
  m.doc() =
      "Vectorised CPU kernels of alro_fast.ops.backends.cpp; outputs are written into the arrays passed for them.";
  m.def("instruction_set", [] { return std::string(alro::active_kernels().name); });
  m.def(
      "select_instruction_set", [](const std::string& name) { return alro::select_kernels(name.c_str()); }, "name"_a,
      "False where this machine or this build has no such set; for tests and benchmarks.");
  m.def("tree_attention", &tree_attention, "query"_a, "key"_a, "value"_a, "node_start"_a, "node_parent"_a,
        "query_row"_a, "scale"_a, "window"_a, "softcap"_a, "out"_a, "lse"_a, "grad"_a.none(), "d_query"_a.none(),
        "d_key"_a.none(), "d_value"_a.none(), "threads"_a,
        "Forward; with `grad`, backward (out and lse are then what the forward wrote).");
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
  m.def("rms_norm", &rms_norm, "x"_a, "weight"_a, "eps"_a, "offset"_a, "y"_a, "scale"_a, "threads"_a);
  m.def("rms_norm_backward", &rms_norm_backward, "x"_a, "weight"_a, "offset"_a, "scale"_a, "d_y"_a, "d_x"_a,
        "d_weight"_a.none(), "threads"_a);
  m.def("rotary", &rotary, "x"_a, "cos"_a, "sin"_a, "transpose"_a, "y"_a, "threads"_a);
  m.def("gated", &gated, "gate"_a, "up"_a, "activation"_a, "y"_a, "threads"_a);
  m.def("gated_backward", &gated_backward, "gate"_a, "up"_a, "activation"_a, "d_y"_a, "d_gate"_a, "d_up"_a,
        "threads"_a);
}
