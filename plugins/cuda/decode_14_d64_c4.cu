#include "decode_instance.cuh"

namespace hqmq {
namespace cuda {

template struct DecodeInstance<Codec14<16>, Codec14<16>, 64, 4>;

}  // namespace cuda
}  // namespace hqmq
