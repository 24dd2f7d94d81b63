#include "decode_instance.cuh"

namespace hqmq {
namespace cuda {

template struct DecodeInstance<Codec16<4>, Codec12, 128, 4>;

}  // namespace cuda
}  // namespace hqmq
