#include "decode_instance.cuh"

namespace hqmq {
namespace cuda {

template struct DecodeInstance<SmallCodec16<2, true>, SmallCodec16<2, true>, 256, 4>;

}  // namespace cuda
}  // namespace hqmq
