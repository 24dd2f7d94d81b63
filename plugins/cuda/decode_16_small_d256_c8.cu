#include "decode_instance.cuh"

namespace hqmq {
namespace cuda {

template struct DecodeInstance<SmallCodec16<2, false>, SmallCodec16<2, false>, 256, 8>;

}  // namespace cuda
}  // namespace hqmq
