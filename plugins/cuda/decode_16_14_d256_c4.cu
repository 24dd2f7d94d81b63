#include "decode_instance.cuh"

namespace hqmq {
namespace cuda {

template struct DecodeInstance<Codec16<2>, Codec14<8>, 256, 4>;

}  // namespace cuda
}  // namespace hqmq
