// Launch of the linear with 4-bit weights for a few rows: one instance per dtype, 8 or 16 rows, width of
// groups, and with or without offsets.
#include "quant_linear.cuh"

namespace tilewright::cuda {
namespace {

template <typename T, int NT, bool WIDE>
void launch(const Int4Rows& a, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>((a.N + FEATURES - 1) / FEATURES);
  if (a.offset != nullptr)
    int4_rows_kernel<T, NT, WIDE, true><<<blocks, WARPS * 32, 0, stream>>>(a);
  else
    int4_rows_kernel<T, NT, WIDE, false><<<blocks, WARPS * 32, 0, stream>>>(a);
}

template <typename T, int NT>
void launch_groups(const Int4Rows& a, cudaStream_t stream) {
  if (a.group % COLUMNS == 0)
    launch<T, NT, true>(a, stream);
  else
    launch<T, NT, false>(a, stream);
}

template <typename T>
void launch_rows(const Int4Rows& a, cudaStream_t stream) {
  if (a.M <= 8)
    launch_groups<T, 1>(a, stream);
  else
    launch_groups<T, 2>(a, stream);
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace
}  // namespace tilewright::cuda

extern "C" cudaError_t tilewright_int4_rows(const tilewright::cuda::Int4Rows& given, cudaStream_t stream) {
  using namespace tilewright::cuda;
  Int4Rows a = given;
  if (a.M < 1 || a.M > INT4_ROWS || a.N < 1 || a.K >= INT4_COLUMNS || a.K % 32 || a.group < 1 ||
      a.group % 32 || a.K != a.group * a.G || !aligned(a.x) || !aligned(a.qweight))
    return cudaErrorInvalidValue;
  a.of_group = Divisor::of(static_cast<uint64_t>(a.group / 32));
  switch (a.kind) {
    case Float::BF16: launch_rows<__nv_bfloat16>(a, stream); break;
    case Float::F16: launch_rows<__half>(a, stream); break;
    default: return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}
