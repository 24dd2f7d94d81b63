#include "decode_instance.cuh"

namespace hqmq {
namespace cuda {

template struct DecodeInstance<Codec16<8>, Codec16<8>, 128, 4>;

}  // namespace cuda
}  // namespace hqmq
