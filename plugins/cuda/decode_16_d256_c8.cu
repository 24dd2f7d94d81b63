#include "decode_instance.cuh"

namespace hqmq {
namespace cuda {

template struct DecodeInstance<Codec16<1>, Codec16<1>, 256, 8>;

}  // namespace cuda
}  // namespace hqmq
