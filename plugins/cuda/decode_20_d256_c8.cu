#include "decode_instance.cuh"

namespace hqmq {
namespace cuda {

template struct DecodeInstance<Codec20, Codec20, 256, 8>;

}  // namespace cuda
}  // namespace hqmq
