#include "decode_instance.cuh"

namespace hqmq {
namespace cuda {

template struct DecodeInstance<Codec16<1>, Codec16<1>, 256, 4>;

}  // namespace cuda
}  // namespace hqmq
