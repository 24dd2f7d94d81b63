#include "decode_instance.cuh"

namespace hqmq {
namespace cuda {

template struct DecodeInstance<Codec16<4>, Codec14<8>, 64, 4>;

}  // namespace cuda
}  // namespace hqmq
