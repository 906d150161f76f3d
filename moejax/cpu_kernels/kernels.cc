// Grouped matrix products on a CPU, as XLA custom calls: rows sorted by expert, each row times its own expert's matrix.
//
//   grouped             y[r]  = x[at r] w[e]            e: the expert whose group holds row r
//   grouped_transposed  x[r]  = sum_i y_i[at r] w_i[e]^T
//   outer               w[e]  = sum_r x[at r]^T y[at r]
//
// One expert makes a plain product of it. A matrix is float32, bfloat16 (also as its bits), int8 with a scale per
// output, or int4 with a scale per output and block of inputs (moejax/weights.py); sums are float32. Where the processor
// has instructions for it, few rows meet int4 as integers of 16 bits with a scale per block of inputs. An empty `at` means
// the row itself. Rows past the sum of the groups are zero.
//
// Every element is summed in the same order whatever the number of threads. A group of more than kFew rows is multiplied
// by panels.h, a smaller one by few_rows.h.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "few_rows.h"
#include "panels.h"
#include "values.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr long kSmall = 1 << 18;  // multiply-adds up to which one thread does it

// Runs task(i) for i < count on XLA's threads and this one, which returns when all are done.
template <typename Task>
void parallel(ffi::ThreadPool& pool, long count, long threads, const Task& task) {
  if (threads <= 1 || count <= 1) {
    for (long i = 0; i < count; ++i) task(i);
    return;
  }
  struct State {
    std::atomic<long> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  // A helper that begins after all tasks are taken does not touch `task`, which is gone by then.
  auto work = [state, count, &task] {
    for (long i; (i = state->next.fetch_add(1)) < count;) {
      task(i);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (long i = 1; i < std::min(threads, count); ++i) pool.Schedule(decltype(work)(work));
  work();
  while (state->done.load(std::memory_order_acquire) < count) std::this_thread::yield();
}

// Groups in blocks of about equal size. Returns the rows of all groups.
long blocks(const int32_t* sizes, long experts, long rows, bool halves, std::vector<Task>* tasks) {
  const long most = halves ? 2 * kBlock : kBlock;
  long at = 0;
  for (long e = 0; e < experts; ++e) {
    const long size = std::min<long>(std::max<int32_t>(sizes[e], 0), rows - at);
    const long count = (size + most - 1) / most;
    for (long i = 0; i < count; ++i) {
      const long from = size * i / count, to = size * (i + 1) / count;
      tasks->push_back({e, at + from, to - from});
    }
    at += size;
  }
  return at;
}

// Columns in so many pieces of whole panels that every thread has a few tasks.
long columns_of_task(long tasks, long threads, long columns) {
  const long pieces = tasks == 0 ? 1 : std::max<long>(1, (4 * threads + tasks - 1) / tasks);
  const long panels = (columns + kPanel - 1) / kPanel;
  return (panels + pieces - 1) / pieces * kPanel;
}

using IntVector = ffi::BufferR1<ffi::S32>;
using Int = ffi::BufferR0<ffi::S32>;

ffi::Error refused(const char* what) { return ffi::Error::InvalidArgument(std::string("moejax's CPU kernels: ") + what); }

ffi::ErrorOr<Rows> rows_of(ffi::AnyBuffer a, const int32_t* at) {
  const ffi::DataType type = a.element_type();
  if (type != ffi::F32 && type != ffi::BF16) return ffi::Unexpected(refused("rows are float32 or bfloat16"));
  if (a.dimensions().size() != 2) return ffi::Unexpected(refused("rows have two dimensions"));
  return Rows{type == ffi::BF16, a.untyped_data(), at, a.dimensions()[1]};
}

const int32_t* data_of(IntVector at) { return at.element_count() ? at.typed_data() : nullptr; }

// A matrix from argument *i on, which moves past it and its scale.
ffi::ErrorOr<Matrices> matrices(ffi::RemainingArgs args, size_t* i) {
  auto q = args.get<ffi::AnyBuffer>((*i)++);
  if (!q) return ffi::Unexpected(q.error());
  const auto shape = q->dimensions();
  if (shape.size() != 3) return ffi::Unexpected(refused("matrices have three dimensions"));
  Matrices w{Kind::kFloat, q->untyped_data(), nullptr, shape[1], shape[2], 0};
  switch (q->element_type()) {
    case ffi::F32:
      return w;
    case ffi::BF16:
    case ffi::U16:
      w.kind = Kind::kHalf;
      return w;
    case ffi::S8:
      w.kind = Kind::kInt8;
      break;
    case ffi::U8:
      w.kind = Kind::kInt4;
      w.inputs *= 2;
      break;
    default:
      return ffi::Unexpected(refused("matrices are float32, bfloat16, its bits, int8 or int4"));
  }
  auto scale = args.get<ffi::AnyBuffer>((*i)++);
  if (!scale) return ffi::Unexpected(scale.error());
  const auto of_scale = scale->dimensions();
  const ffi::DataType type = w.kind == Kind::kInt8 ? ffi::F32 : ffi::BF16;
  if (scale->element_type() != type || of_scale.size() != 3 || w.inputs % of_scale[1] != 0) {
    return ffi::Unexpected(refused("a scale that does not fit its matrix"));
  }
  w.scale = scale->untyped_data();
  if (w.kind == Kind::kInt4) w.block = w.inputs / of_scale[1];
  return w;
}

// y_i = x w_i: arguments x, at, sizes, first, the matrices; a result for each matrix.
ffi::Error grouped(ffi::ThreadPool pool, ffi::AnyBuffer x, IntVector at, IntVector sizes, Int first,
                   ffi::RemainingArgs args, ffi::RemainingRets results) {
  std::vector<Product> products;
  std::vector<Rows> y;
  auto rows_of_x = rows_of(x, data_of(at));
  if (!rows_of_x) return rows_of_x.error();
  for (size_t i = 0; i < args.size();) {
    auto w = matrices(args, &i);
    if (!w) return w.error();
    auto result = results.get<ffi::AnyBuffer>(products.size());
    if (!result) return result.error();
    auto rows_of_y = rows_of(**result, nullptr);
    if (!rows_of_y) return rows_of_y.error();
    y.push_back(*rows_of_y);
    products.push_back({*rows_of_x, *w});
    if (w->inputs != rows_of_x->width || w->outputs != y.back().width || w->outputs != y[0].width) {
      return refused("rows, matrices and results do not fit together");
    }
  }
  const long columns = y[0].width;
  const long rows = results.get<ffi::AnyBuffer>(0).value()->dimensions()[0];
  const bool halves = kMultipliesHalves && products[0].x.half;
  std::vector<Task> tasks;
  const long used = blocks(sizes.typed_data(), sizes.element_count(), rows, halves, &tasks);
  for (const Rows& out : y) out.clear(used, rows - used);
  const bool small = used * x.dimensions()[1] * columns * static_cast<long>(y.size()) <= kSmall;
  const long threads = small ? 1 : pool.num_threads();
  const long base = *first.typed_data();
  const auto many = std::stable_partition(tasks.begin(), tasks.end(), [](const Task& t) { return t.rows <= kFew; });
  std::vector<FewRows> few;
  for (auto task = tasks.begin(); task != many; ++task) {
    for (size_t j = 0; j < y.size(); ++j) few.emplace_back(*task, products[j], y[j]);
  }
  std::vector<std::pair<const FewRows*, long>> parts;
  long size = 0;
  for (const FewRows& f : few) size += f.parts() * f.size();
  float* sums = scratch<float>(4, size);
  for (FewRows& f : few) {
    f.sums = sums;
    sums += f.parts() * f.size();
    for (long i = 0; i < f.parts(); ++i) parts.push_back({&f, i});
  }
  const long num_parts = parts.size(), num_many = tasks.end() - many;
  const long step = columns_of_task(num_many, threads, columns), pieces = (columns + step - 1) / step;
  parallel(pool, num_many * pieces + num_parts, threads, [&](long i) {
    if (i >= num_many * pieces) {
      const auto [f, part] = parts[i - num_many * pieces];
      return f->run(part, base);
    }
    const Task& task = many[i / pieces];
    const long from = i % pieces * step, to = std::min(from + step, columns);
    float* a = scratch<float>(3, task.rows * stride(products[0].x.width));
    read_rows(task, products[0].x, halves, a);
    for (size_t j = 0; j < y.size(); ++j) {
      for_panels(y[j], task, from, to, [&](long n, long count, Sums sums) {
        panels_of_product(products[j], task.rows, false, halves, base + task.expert, n, count, a, sums);
      });
    }
  });
  return ffi::Error::Success();
}

// x = sum_i y_i w_i^T: arguments at, sizes, first, then y_i and w_i.
ffi::Error grouped_transposed(ffi::ThreadPool pool, IntVector at, IntVector sizes, Int first, ffi::RemainingArgs args,
                              ffi::Result<ffi::AnyBuffer> result) {
  std::vector<Product> products;
  auto rows_of_x = rows_of(*result, nullptr);
  if (!rows_of_x) return rows_of_x.error();
  const Rows x = *rows_of_x;
  for (size_t i = 0; i < args.size();) {
    auto buffer = args.get<ffi::AnyBuffer>(i++);
    if (!buffer) return buffer.error();
    auto y = rows_of(*buffer, data_of(at));
    if (!y) return y.error();
    auto w = matrices(args, &i);
    if (!w) return w.error();
    if (w->outputs != y->width || w->inputs != x.width || y->half != x.half) {
      return refused("rows, matrices and result do not fit together");
    }
    products.push_back({*y, *w});
  }
  const long rows = result->dimensions()[0];
  const bool halves = kMultipliesHalves && products[0].x.half;
  std::vector<Task> tasks;
  const long used = blocks(sizes.typed_data(), sizes.element_count(), rows, halves, &tasks);
  x.clear(used, rows - used);
  const long threads = used * products[0].x.width * x.width <= kSmall ? 1 : pool.num_threads();
  const long step = columns_of_task(tasks.size(), threads, x.width), pieces = (x.width + step - 1) / step;
  const long base = *first.typed_data();
  parallel(pool, tasks.size() * pieces, threads, [&](long i) {
    const Task& task = tasks[i / pieces];
    const long from = i % pieces * step, to = std::min(from + step, x.width);
    size_t size = 0;
    for (const Product& p : products) size += stride(p.x.width) * task.rows;
    float* all = scratch<float>(3, size);
    float* end = all;
    for (const Product& p : products) end = read_rows(task, p.x, halves, end);
    for_panels(x, task, from, to, [&](long n, long count, Sums sums) {
      const float* a = all;
      for (const Product& p : products) {
        panels_of_product(p, task.rows, true, halves, base + task.expert, n, count, a, sums);
        a += stride(p.x.width) * task.rows;
        sums.add = true;
      }
    });
  });
  return ffi::Error::Success();
}

// w[e] = sum_r x[r]^T y[r], float32 (E, D, F), zero for empty groups.
ffi::Error outer(ffi::ThreadPool pool, ffi::AnyBuffer x_values, IntVector x_at, ffi::AnyBuffer y_values, IntVector y_at,
                 IntVector sizes, ffi::ResultBufferR3<ffi::F32> result) {
  auto rows_of_x = rows_of(x_values, data_of(x_at)), rows_of_y = rows_of(y_values, data_of(y_at));
  if (!rows_of_x) return rows_of_x.error();
  if (!rows_of_y) return rows_of_y.error();
  const Rows x = *rows_of_x, y = *rows_of_y;
  const long experts = sizes.element_count(), inputs = x.width, outputs = y.width;
  const long x_rows = x.at ? x_at.element_count() : x_values.dimensions()[0];
  const int32_t* size = sizes.typed_data();
  std::vector<long> start(experts + 1, 0);
  for (long e = 0; e < experts; ++e) start[e + 1] = std::min<long>(start[e] + std::max<int32_t>(size[e], 0), x_rows);
  float* w = result->typed_data();
  const long threads = start[experts] * inputs * outputs <= kSmall ? 1 : pool.num_threads();
  const long step = columns_of_task(experts, threads, outputs), pieces = (outputs + step - 1) / step;
  parallel(pool, experts * pieces, threads, [&](long i) {
    const long e = i / pieces, from = i % pieces * step, to = std::min(from + step, outputs);
    const long rows = start[e + 1] - start[e];
    float* out = w + e * inputs * outputs;
    if (rows == 0) {
      for (long d = 0; d < inputs; ++d) std::fill(out + d * outputs + from, out + d * outputs + to, 0.f);
      return;
    }
    // x in blocks of kRows columns, y in panels, each row after row.
    constexpr long kDeep = 384;
    const long blocks = (inputs + kRows - 1) / kRows, panels = (to - from + kPanel - 1) / kPanel;
    const long deep = std::min(kDeep, rows), x_next = apart(deep * kRows), y_next = apart(deep * kPanel);
    float* xs = scratch<float>(3, blocks * x_next + panels * y_next + inputs + outputs);
    float* ys = xs + blocks * x_next;
    float* widened = ys + panels * y_next;
    for (long k = 0; k < rows; k += kDeep) {
      const long depth = std::min(kDeep, rows - k);
      for (long r = 0; r < depth; ++r) {
        const float* row = x.floats(start[e] + k + r, widened);
        copy_pieces<kRows>(row, inputs, xs + r * kRows, x_next);
        row = y.floats(start[e] + k + r, widened);
        copy_pieces<kPanel>(row + from, to - from, ys + r * kPanel, y_next);
      }
      for (long p = 0; p < panels; ++p) {
        const long n = from + p * kPanel, count = std::min<long>(kPanel, to - n);
        for (long b = 0; b < blocks; ++b) {
          const long m = std::min<long>(kRows, inputs - b * kRows);
          const float *a = xs + b * x_next, *panel = ys + p * y_next;
          float* at = out + b * kRows * outputs + n;
          if (count == kPanel) {
            meet_all(m, depth, a, 1, kRows, panel, {at, outputs, k > 0});
            continue;
          }
          float sums[kRows * kPanel];
          meet_all(m, depth, a, 1, kRows, panel, {sums, kPanel, false});
          for (long r = 0; r < m; ++r, at += outputs) {
            for (long j = 0; j < count; ++j) at[j] = sums[r * kPanel + j] + (k ? at[j] : 0);
          }
        }
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_grouped, grouped,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<IntVector>()
                                  .Arg<IntVector>()
                                  .Arg<Int>()
                                  .RemainingArgs()
                                  .RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_grouped_transposed, grouped_transposed,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<IntVector>()
                                  .Arg<IntVector>()
                                  .Arg<Int>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_outer, outer,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<IntVector>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<IntVector>()
                                  .Arg<IntVector>()
                                  .Ret<ffi::BufferR3<ffi::F32>>());
