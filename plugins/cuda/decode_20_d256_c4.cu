#include "decode_instance.cuh"

namespace hqmq {
namespace cuda {

template struct DecodeInstance<Codec20, Codec20, 256, 4>;

}  // namespace cuda
}  // namespace hqmq
