#include "decode_instance.cuh"

namespace hqmq {
namespace cuda {

template struct DecodeInstance<Codec14<4>, Codec14<4>, 256, 8>;

}  // namespace cuda
}  // namespace hqmq
