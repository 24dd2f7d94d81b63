#include "decode_instance.cuh"

namespace hqmq {
namespace cuda {

template struct DecodeInstance<Codec16<4>, Codec16<4>, 64, 8>;

}  // namespace cuda
}  // namespace hqmq
